"""A parent, its calibration text and the layouts on which its importance is compared with one process."""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from megatron_elastic.checkpoint import write_checkpoint
from megatron_elastic.flags import model_shape
from megatron_elastic.importance import DepthRanking, Scores
from megatron_elastic.importance.calibration import CalibrationText
from megatron_elastic.layout import Layout
from tests.distributed import standalone_parent as parent
from tests.unit import small_parent

PATTERN = "M-*M|-M*-"
HEAD_CHANNELS = 3
REMOVALS = 3
SAMPLES, LENGTH, BATCH = 9, 24, 2
EVEN_SAMPLES = 8
"""Of the layout with expert tensor parallelism, where gloo would have to gather unequal numbers of tokens."""
RANKS = 4

_PLAIN = {flag: value for flag, value in parent.FLAGS.items() if "parallel" not in flag}
FLAGS = {**_PLAIN, "hybrid-layer-pattern": PATTERN}
TP, PP, SP = "tensor-model-parallel-size", "pipeline-model-parallel-size", "sequence-parallel"
EP, ETP = "expert-model-parallel-size", "expert-tensor-parallel-size"
EXPERT_FLAGS = {
    **FLAGS, "hybrid-layer-pattern": "ME*|E-M", "num-experts": 4, "moe-ffn-hidden-size": 16, "moe-router-topk": 2,
    "moe-shared-expert-intermediate-size": 24, "moe-router-score-function": "sigmoid",
    "moe-router-enable-expert-bias": True, "moe-router-topk-scaling-factor": 2.5,
    "moe-router-load-balancing-type": "none",
}  # fmt: skip
DENSE_LAYOUTS: dict[str, dict[str, Any]] = {
    "DP 4": {},
    "TP 2 x DP 2": {TP: 2},
    "TP 2, SP x DP 2": {TP: 2, SP: True},
    "PP 2 x DP 2": {PP: 2},
    "TP 2, SP x PP 2": {TP: 2, PP: 2, SP: True},
    "PP 2, 2 virtual stages x DP 2": {PP: 2, "hybrid-layer-pattern": "M-|*M|-M|*-"},
}
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "EP 4": {EP: 4},
    "EP 2 x PP 2": {EP: 2, PP: 2},
    "TP 2, SP x EP 2, expert TP 2": {TP: 2, SP: True, EP: 2, ETP: 2},
    "TP 2, SP x EP 2, expert TP 1": {TP: 2, SP: True, EP: 2, ETP: 1},
}
LAYOUTS = {
    **{name: (FLAGS, layout, "dense", SAMPLES) for name, layout in DENSE_LAYOUTS.items()},
    **{
        name: (EXPERT_FLAGS, layout, "experts", EVEN_SAMPLES if layout.get(ETP) == 2 else SAMPLES)
        for name, layout in EXPERT_LAYOUTS.items()
    },
}
"""Name -> the parent's flags, those of the layout, the name of its checkpoint, calibration samples."""


def layout(flags: dict[str, Any]) -> Layout:
    """Of the parent that flags describe."""
    shape = model_shape(flags, [])
    assert shape is not None
    return Layout(shape, parent.BLOCKS, 2)


def write_parent(folder: Path, flags: dict[str, Any]) -> None:
    """Its checkpoint, fp64."""
    found = layout(flags)
    write_checkpoint(folder, small_parent.stored(parent.weights(found), found), common={})


def write_text(prefix: Path) -> None:
    """Its calibration text."""
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    text = numpy.random.default_rng(0).integers(60, size=SAMPLES * LENGTH + 7).astype(numpy.uint16)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    builder.add_document(text, [len(text)])
    builder.finalize(f"{prefix}.idx")


def _prepared(folder: Path, flags: dict[str, Any], checkpoint: str, samples: int, data_rank: int | None) -> Any:
    """The model on the groups that are initialised, fp64, and this rank's batches."""
    from megatron.core import parallel_state

    from megatron_elastic import standalone
    from megatron_elastic.importance.ranking import dealt_flags
    from megatron_elastic.training import load_parent

    text = CalibrationText(folder / "text", samples=samples, sequence_length=LENGTH, vocab=60)
    rank = parallel_state.get_data_parallel_rank() if data_rank is None else data_rank
    ranks = parallel_state.get_data_parallel_world_size()
    model = standalone.build_plain_model(dealt_flags(flags, [samples], ranks), torch.float64)
    load_parent(model, folder / checkpoint)
    return model, [text.tokens(batch) for batch in text.batches(BATCH, rank, ranks)]


def measure(folder: Path, flags: dict[str, Any], checkpoint: str, samples: int, data_rank: int | None = None) -> Scores:
    """Width and depth scores.

    Args:
        folder: of the checkpoint and the text.
        flags: of the parent, layout included.
        checkpoint: its name in the folder.
        samples: of calibration text.
        data_rank: whose samples this rank takes; None for its own.
    """
    from megatron_elastic.importance.collect import collect_scores
    from megatron_elastic.importance.depth import rank_depth

    model, batches = _prepared(folder, flags, checkpoint, samples, data_rank)
    width = collect_scores(model, batches, head_channels=HEAD_CHANNELS)
    depth = rank_depth(model, batches, removals=REMOVALS)
    return Scores(width.hidden, width.layers, width.calibration, depth)


class Stop(Exception):
    """Ends every rank at the same place."""


def interrupted(folder: Path, flags: dict[str, Any], checkpoint: str, samples: int) -> DepthRanking:
    """The order of the layers, found by a ranking that is stopped in its second round and goes on."""
    from megatron_elastic.importance.depth import rank_depth

    model, batches = _prepared(folder, flags, checkpoint, samples, None)

    def stop(done: int, planned: int) -> None:
        if done > 0.7 * planned:
            raise Stop

    state = folder / "state.json"
    with contextlib.suppress(Stop):
        rank_depth(model, batches, removals=REMOVALS, state=state, progress=stop)
    torch.distributed.barrier()  # what rank 0 wrote
    assert len(json.loads(state.read_text())["removed"]) == 1
    return rank_depth(model, batches, removals=REMOVALS, state=state)


def worst(found: Scores, expected: Scores) -> float:
    """Largest relative deviation of any score, of widths and layers."""
    errors = [_deviation(found.hidden, expected.hidden)]
    assert {n: set(axes) for n, axes in found.layers.items()} == {n: set(axes) for n, axes in expected.layers.items()}
    for number, axes in expected.layers.items():
        errors += [_deviation(found.layers[number][axis], tensor) for axis, tensor in axes.items()]
    assert found.depth is not None
    assert expected.depth is not None
    for ours, theirs in zip(found.depth.rounds, expected.depth.rounds, strict=True):
        if set(ours) != set(theirs):
            return float("inf")
        errors += [abs(ours[number] / score - 1.0) for number, score in theirs.items()]
    return max(errors)


def _deviation(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(((a - b).abs() / b.abs().clamp(min=1e-300)).max())
