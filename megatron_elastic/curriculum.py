"""Settings of a recipe that are plain numbers: curriculum, loss, the parent's training, evaluation, calibration."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from megatron_elastic.errors import ElasticError


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the curriculum; sizes are in base samples (what a user feeds, not how often budgets reuse it).

    Attributes:
        iterations: optimizer steps.
        sequence_length: tokens.
        global_batch_size: base samples a step.
        micro_batch_size: base samples a microbatch on each data-parallel rank.
        weights: share of the loss of each budget, largest budget first; sums to 1.
        teacher: `frozen`, or `trainable`: the full budget, as it is at this step, teaches the others, and itself learns
            from the text (Nemotron Elastic, section 'Losses'); or one of the two for each budget by name (`frozen`
            where it is not named), the full one `trainable` where it learns from the text.
        ce_weight: factor on the full budget's cross entropy where it learns from the text (alpha).
    """

    iterations: int
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    weights: tuple[float, ...]
    teacher: str | Mapping[str, str] = "frozen"
    ce_weight: float = 1.0

    def teachers(self, budgets: Sequence[str]) -> tuple[str, ...]:
        """The teacher of each budget: one of `TEACHERS`."""
        if isinstance(self.teacher, str):
            return (self.teacher,) * len(budgets)
        return tuple(self.teacher.get(name, "frozen") for name in budgets)


DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


@dataclass(frozen=True, kw_only=True)
class DistillationLoss:
    """What a budget learns from its teacher, and from the text beside it.

    Attributes:
        kind: `forward_kl`, KL(teacher || student); `reverse_kl`, KL(student || teacher); or `jsd`, the generalised
            Jensen-Shannon divergence `beta KL(teacher || m) + (1 - beta) KL(student || m)` to their mixture
            `m = beta teacher + (1 - beta) student`.
        beta: the teacher's share of the mixture, between 0 and 1; for `jsd` only.
        ce_weight: factor on the cross entropy of the labels, added to the divergence (which has factor 1).
    """

    kind: str = "forward_kl"
    beta: float = 0.5
    ce_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            raise ElasticError(f"elastic.loss.kind: {self.kind!r} must be one of {list(DIVERGENCES)}")
        if not 0.0 < self.beta < 1.0:
            raise ElasticError(
                f"elastic.loss.beta: {self.beta} must lie between 0 and 1; at 0 and 1 use forward_kl or reverse_kl"
            )
        if self.ce_weight < 0.0:
            raise ElasticError(f"elastic.loss.ce_weight: {self.ce_weight} must not be negative")


FORWARD_KL = DistillationLoss()
CACHE_MODES = ("auto", "write", "read")
CACHE_PRECISIONS = ("fp16", "fp32")


@dataclass(frozen=True, kw_only=True)
class TeacherCache:
    """Where the frozen teacher's most probable tokens are kept, so that it runs once for a text.

    Attributes:
        folder: of the cache.
        top_k: tokens that are kept; the probability of all others is one entry more, the ghost token's.
        mode: of every stage: `write` (the teacher runs, and what is not in the cache is added), `read` (no teacher is
            loaded; whatever is missing is an error), or `auto` (`read` where the whole stage is there, else `write`).
        precision: of the kept log-probabilities, `fp16` or `fp32`; the ghost's is always fp32.
    """

    folder: str
    top_k: int
    mode: str = "auto"
    precision: str = "fp16"

    @property
    def bytes_per_token(self) -> int:
        """On disk: ids of four bytes and log-probabilities, and the ghost's in fp32."""
        return self.top_k * (4 + (2 if self.precision == "fp16" else 4)) + 4

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str) or not self.folder:
            raise ElasticError(f"elastic.teacher_cache.folder: {self.folder!r} must be a folder")
        for key, known in (("mode", CACHE_MODES), ("precision", CACHE_PRECISIONS)):
            if getattr(self, key) not in known:
                raise ElasticError(
                    f"elastic.teacher_cache.{key}: {getattr(self, key)!r} must be one of {list(known)}"
                )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Validation during training: every `interval` steps, on `iterations` global batches of base samples."""

    interval: int = 1000
    iterations: int = 1


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Text for importance scores: `samples` sequences of `sequence_length` tokens from the training data.

    Attributes:
        samples: for the scores of widths.
        sequence_length: tokens.
        batch_size: sequences that run together.
        depth_samples: for the order of the layers, which keeps what enters every layer in host memory.
    """

    samples: int = 1024
    sequence_length: int = 8192
    batch_size: int = 8
    depth_samples: int = 256


@dataclass(frozen=True, kw_only=True)
class PretrainRun:
    """Training of the parent, on the recipe's own data.

    Attributes:
        save: checkpoint folder.
        iterations: optimizer steps.
        sequence_length: tokens.
        global_batch_size: samples a step.
        micro_batch_size: samples a microbatch on each data-parallel rank.
        megatron: flags on top of the recipe's (a learning rate, another layout); they may not change the model.
    """

    save: str
    iterations: int
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    megatron: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> Stage:
        """The run as a curriculum of one stage."""
        return Stage(
            iterations=self.iterations,
            sequence_length=self.sequence_length,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            weights=(1.0,),
        )


TEACHERS = ("frozen", "trainable")


def _value(kind: Any, raw: Any, name: str) -> tuple[Any, str | None]:
    """One value as its field's type, and what is wrong with it."""
    if kind not in (int, float):
        return tuple(raw) if isinstance(raw, list) else raw, None
    if isinstance(raw, bool) or not isinstance(raw, int | float) or (kind is int and not float(raw).is_integer()):
        return None, f"{name}: {raw!r} must be {'a whole' if kind is int else 'a'} number"
    if raw < 0 and not name.endswith(".seed"):
        return None, f"{name}: {raw!r} must not be negative"
    return kind(raw), None


def section[T](cls: type[T], raw: Any, name: str, faults: list[str]) -> T | None:
    """A dataclass from a mapping; unknown, missing and mistyped keys become faults.

    Args:
        cls: the dataclass.
        raw: what the recipe holds.
        name: of the section, for messages.
        faults: what is wrong is added here.

    Returns:
        None where anything is wrong.
    """
    if not isinstance(raw, Mapping):
        faults.append(f"{name}: {raw!r} must be a mapping")
        return None
    known = {each.name: each for each in fields(cls)}  # type: ignore[arg-type]
    before, values = len(faults), dict[str, Any]()
    for key in sorted(set(raw) - set(known), key=str):
        faults.append(f"{name}.{key}: unknown key; known are {sorted(known)}")
    for key in (key for key in raw if key in known):
        values[key], fault = _value(known[key].type, raw[key], f"{name}.{key}")
        if fault is not None:
            faults.append(fault)
    required = (key for key, each in known.items() if each.default is MISSING and each.default_factory is MISSING)
    faults.extend(f"{name}.{key}: required" for key in required if key not in raw)
    if len(faults) > before:
        return None
    try:
        return cls(**values)
    except ElasticError as error:  # what the class itself refuses
        faults.append(str(error))
        return None
