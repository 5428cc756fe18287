"""The package's own errors: what the user can mend carries a message, a rule and a remedy."""

from collections.abc import Iterable


class ElasticError(Exception):
    """Base of every error that a user can cause and mend."""


class FaultsError(ElasticError):
    """Carries every fault found, not only the first.

    Attributes:
        faults: one sentence each.
    """

    def __init__(self, faults: Iterable[str], source: str) -> None:
        self.faults = list(faults)
        lines = "\n".join(f"  - {fault}" for fault in self.faults)
        super().__init__(f"{source}: {len(self.faults)} fault(s)\n{lines}")


class RecipeError(FaultsError):
    """A recipe, or a flag, that cannot be run."""

    def __init__(self, faults: Iterable[str], source: str = "recipe") -> None:
        super().__init__(faults, source)


class HFError(FaultsError):
    """A folder in Hugging Face's format that cannot be read, or a model that the format cannot hold."""


class CheckpointError(ElasticError):
    """A checkpoint that is missing, damaged, or not what the command needs."""


class CorpusError(ElasticError):
    """A text folder, tokenizer or data set that cannot be used."""


class CacheError(ElasticError):
    """A teacher cache that is incomplete, damaged, or another teacher's."""
