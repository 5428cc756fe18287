"""The parallel layout that a recipe's flags ask for, and what it demands of sequences and batches."""

from collections.abc import Mapping, Sequence
from math import lcm
from typing import Any, NamedTuple

from megatron_elastic.curriculum import Stage


class Ranks(NamedTuple):
    """How one copy of the model is split.

    Attributes:
        tp, cp: tensor- and context-parallel size.
        ep, etp: expert-parallel and expert tensor-parallel size.
        copy: ranks of one copy.
        tokens: a sequence's length must be a multiple of this.
    """

    tp: int
    cp: int
    copy: int
    tokens: int
    ep: int = 1
    etp: int = 1

    @property
    def sharing_experts(self) -> int:
        """Data-parallel ranks, one after the other, that share experts: they must run the same budget at a time."""
        return max(1, self.ep * self.etp // (self.tp * self.cp))


def length_fault(length: int, ranks: Ranks) -> str | None:
    """What is wrong with a sequence length on a layout; None where nothing is."""
    if length % ranks.tokens == 0:
        return None
    return (
        f"sequence_length: {length} must be a multiple of {ranks.tokens}: context parallelism takes 2 x CP equal "
        "slices, sequence parallelism TP x CP equal parts"
    )


def ranks_of(megatron: Mapping[str, Any], faults: list[str]) -> Ranks:
    """How the flags split one copy of the model."""
    sizes: list[int] = []
    for name in (
        *("tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size"),
        *("expert-model-parallel-size", "expert-tensor-parallel-size"),
    ):
        # Experts are split over as many tensor-parallel ranks as the rest where nothing else is said.
        size = megatron.get(name, sizes[0] if name.startswith("expert-tensor") else 1)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            if not name.startswith("tensor"):  # that one is part of the shape, and judged with it
                faults.append(f"megatron.{name}: {size!r} must be a whole number, at least 1")
            size = 1
        sizes.append(size)
    tp, pp, cp, ep, etp = sizes
    slices = 2 * cp if cp > 1 else 1
    parts = tp * cp if megatron.get("sequence-parallel") else 1
    return Ranks(tp=tp, cp=cp, copy=tp * pp * cp, tokens=lcm(slices, parts), ep=ep, etp=etp)


def interleaving_faults(
    megatron: Mapping[str, Any],
    stages: Sequence[Stage],
    roles: Mapping[str, int],
    data_parallel: int,
    faults: list[str],
) -> None:
    """Megatron's interleaved schedule runs groups of as many microbatches as there are pipeline stages.

    Args:
        megatron: the recipe's flags; the separators in the layer pattern make the virtual stages.
        stages: of the curriculum.
        roles: microbatches of a base microbatch, in training and in evaluation.
        data_parallel: data-parallel size.
        faults: what is wrong is added here.
    """
    size = megatron.get("pipeline-model-parallel-size", 1)
    segments = str(megatron.get("hybrid-layer-pattern", "")).count("|") + 1
    if not isinstance(size, int) or size < 2 or segments <= size:
        return
    for number, stage in enumerate(stages):
        base = stage.global_batch_size // max(1, stage.micro_batch_size * data_parallel)
        for when, count in roles.items():
            if base * count % size:
                faults.append(
                    f"elastic.stages[{number}].global_batch_size: {stage.global_batch_size} makes {base * count} "
                    f"microbatches a step in {when} ({count} for each of {base} base microbatches); with virtual "
                    f"pipeline stages they must be a multiple of pipeline-model-parallel-size {size}"
                )
