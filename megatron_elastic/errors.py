"""The package's own errors: what the user can mend carries a message, a rule and a remedy."""

from collections.abc import Iterable


class ElasticError(Exception):
    """Base of every error that a user can cause and mend."""


class RecipeError(ElasticError):
    """A recipe, or a flag, that cannot be run: carries every fault found, not only the first."""

    def __init__(self, faults: Iterable[str], source: str = "recipe") -> None:
        self.faults = list(faults)
        lines = "\n".join(f"  - {fault}" for fault in self.faults)
        super().__init__(f"{source}: {len(self.faults)} fault(s)\n{lines}")


class CheckpointError(ElasticError):
    """A checkpoint that is missing, damaged, or not what the command needs."""


class CorpusError(ElasticError):
    """A text folder, tokenizer or data set that cannot be used."""
