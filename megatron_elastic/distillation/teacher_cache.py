"""What a teacher cache is for a recipe: whose it is, by what its entries are found, and which stages it has whole.

Entries are the teacher's top-k log-probabilities at the recipe's temperature: those at another one follow from the kept
tokens, but the ghost's does not. An entry is a whole sample of a stage, however it was split over ranks.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_elastic.checkpoint import digests_of, find_checkpoint, write_atomically
from megatron_elastic.config import Recipe
from megatron_elastic.curriculum import TeacherCache
from megatron_elastic.distillation.cache_files import CacheIndex, EntryLayout, recover
from megatron_elastic.errors import CacheError
from megatron_elastic.ops.packing import documents_from_cu_seqlens
from megatron_elastic.precision import QUANTISED

_NAME = "cache.json"
_VERSION = 1
TRAINING, VALIDATION = "training", "validation"


def identity_of(recipe: Recipe, settings: TeacherCache) -> dict[str, Any]:
    """What decides the content of an entry, beside its text.

    The teacher is told by the SHA-256 of its checkpoint's files: from Megatron's manifest where there is one, else of
    the files as they are. The same weights saved anew, on another layout, are another teacher here.

    Raises:
        CheckpointError: there is no teacher.
    """
    files = sorted(digests_of(find_checkpoint(recipe.teacher)).items())
    return {
        "version": _VERSION,
        "teacher": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        "top_k": settings.top_k,
        "vocabulary": recipe.family.shape.vocab,
        "temperature": float(recipe.temperature),
        "precision": settings.precision,
        "arithmetic": _arithmetic(recipe),
    }


def _arithmetic(recipe: Recipe) -> str:
    """What the teacher is computed in: in another precision it says something else."""
    if recipe.teacher_precision == QUANTISED:
        return str(recipe.precision)
    return "bf16" if recipe.megatron.get("bf16") else "fp32"


def sample_key(identity: Mapping[str, Any], tokens: Tensor, cu_seqlens: Tensor | None) -> bytes:
    """16 bytes that a sample's entry is found by: a hash of the identity, of its tokens, and of where documents end.

    Args:
        identity: of the cache.
        tokens: `[s]`, on the host.
        cu_seqlens: of the sample, where documents are kept apart.
    """
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16)
    digest.update(tokens.int().numpy().tobytes())
    if cu_seqlens is not None:
        # The ends are padded to one length in a batch: what counts is the document of each token.
        digest.update(b"documents" + documents_from_cu_seqlens(cu_seqlens, tokens.numel()).numpy().tobytes())
    return digest.digest()


def text_of(recipe: Recipe, number: int, kind: str) -> tuple[int, int]:
    """A number that tells the samples of a stage from others, and how many they are.

    It only counts what is there: an entry is found by its tokens.

    Args:
        recipe: checked.
        number: of the stage, from 1.
        kind: `TRAINING` or `VALIDATION`.
    """
    stage = recipe.stages[number - 1]
    prefix = recipe.train_data if kind == TRAINING else recipe.validation_data
    batches = stage.iterations if kind == TRAINING else recipe.evaluation.iterations
    samples = batches * stage.global_batch_size
    apart = bool(recipe.megatron.get("dataloader-inter-document-masking"))
    with Path(f"{prefix}.idx").open("rb") as stream:
        index = hashlib.file_digest(stream, "sha256").hexdigest()
    facts = [index, Path(f"{prefix}.bin").stat().st_size, kind, stage.sequence_length, samples, apart]
    # Megatron shuffles by this seed.
    facts.append(int(recipe.megatron.get("seed", 1234)) + number)
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little"), samples


class StagePlan:
    """What one stage has of a cache, and whether it reads or writes."""

    def __init__(self, recipe: Recipe, number: int, settings: TeacherCache) -> None:
        """Looks at the cache; takes over what a killed run left, where the stage may write.

        Args:
            recipe: checked.
            number: of the stage, from 1.
            settings: of the cache.

        Raises:
            CacheError: it is another teacher's, of other settings, damaged, or incomplete where it is to be read.
            CheckpointError: there is no teacher.
        """
        self.settings, self.identity = settings, identity_of(recipe, settings)
        self.root, length = Path(settings.folder), recipe.stages[number - 1].sequence_length
        self.layout = EntryLayout(length, settings.top_k, settings.precision)
        self.folder = self.root / f"sequences-of-{length}"
        _check_identity(self.root, self.identity, settings.mode)
        if settings.mode != "read":
            recover(self.folder, self.layout)
        self.texts = {kind: text_of(recipe, number, kind) for kind in (TRAINING, VALIDATION)}
        index = CacheIndex(self.folder, self.layout)
        self.entries = len(index)
        self.there = {kind: index.samples(text) for kind, (text, _) in self.texts.items()}
        missing = [kind for kind, (_, samples) in self.texts.items() if self.there[kind] < samples]
        if missing and settings.mode == "read":
            counts = ", ".join(f"{self.there[kind]} of {self.texts[kind][1]} {kind} samples" for kind in self.texts)
            raise CacheError(
                f"{self.root}: stage {number} is not complete: {counts} of {length} tokens are there"
                f"{_others(self.root, self.folder)}. Run the stage once with `mode: write` or `auto`, to its end"
            )
        self.reads = not missing and settings.mode != "write"

    def describe(self) -> str:
        """One line for the log."""
        counts = ", ".join(f"{self.there[kind]} of {self.texts[kind][1]} {kind} samples" for kind in self.texts)
        how = "read, and no teacher is loaded" if self.reads else "written; the teacher runs"
        return f"teacher cache {self.root}: {how} ({counts} are there, of {self.layout.dtype.itemsize} bytes each)"

    def begin(self) -> None:
        """Makes the folder of a cache that is written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.root / _NAME).exists():
            write_atomically(self.root / _NAME, json.dumps(self.identity, indent=2))


def _check_identity(root: Path, identity: Mapping[str, Any], mode: str) -> None:
    file = root / _NAME
    if not file.exists():
        if mode == "read":
            raise CacheError(f"{root} is no teacher cache, {_NAME} is missing: write one with `mode: write`")
        return
    try:
        found = dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise CacheError(f"{file} is damaged ({error!r}): give another folder, or remove the cache") from error
    different = [
        f"{name} is {_short(found.get(name))}, the recipe's {_short(identity.get(name))}"
        for name in sorted({*found, *identity})
        if found.get(name) != identity.get(name)
    ]
    if different:
        raise CacheError(
            f"{root} was written with other settings: {'; '.join(different)}. Give elastic.teacher_cache.folder "
            "another folder, or mend the recipe"
        )


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 16 else repr(value)


def _others(root: Path, folder: Path) -> str:
    """What else a cache has, for a message."""
    lengths = sorted(int(each.name.rpartition("-")[2]) for each in root.glob("sequences-of-*") if each != folder)
    parts = len(list(folder.glob("*.index.part")))
    found = f", and {parts} file(s) of runs that did not end" if parts else ""
    return f"{found}; sequences of other lengths: {lengths}" if lengths else found


def check_cache(recipe: Recipe) -> None:
    """Refuses a recipe whose cache cannot serve it, before any rank starts.

    Raises:
        CacheError: the cache is another teacher's, or of other settings.
        CheckpointError: there is no teacher.
    """
    if recipe.teacher_cache is not None:
        settings = recipe.teacher_cache
        _check_identity(Path(settings.folder), identity_of(recipe, settings), settings.mode)
