"""Settings of a recipe that are plain numbers: the stages of the curriculum, the parent's training, evaluation, calibration."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the curriculum; sizes are in base samples (what a user feeds, not how often budgets reuse it).

    Attributes:
        iterations: optimizer steps.
        sequence_length: tokens.
        global_batch_size: base samples a step.
        micro_batch_size: base samples a microbatch on each data-parallel rank.
        weights: share of the loss of each budget, largest budget first; sums to 1.
    """

    iterations: int
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    weights: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Validation during training: every `interval` steps, on `iterations` global batches of base samples."""

    interval: int = 1000
    iterations: int = 1


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Text for importance scores: `samples` sequences of `sequence_length` tokens from the training data."""

    samples: int = 1024
    sequence_length: int = 8192
    batch_size: int = 8


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
