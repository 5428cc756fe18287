"""A parent, its calibration text and the layouts on which its importance is compared with one process."""

from pathlib import Path
from typing import Any

import torch

from megatron_elastic.checkpoint import write_checkpoint
from megatron_elastic.flags import model_shape
from megatron_elastic.importance import Scores
from megatron_elastic.importance.calibration import CalibrationText
from megatron_elastic.layout import Layout
from tests.distributed import standalone_parent as parent
from tests.unit import small_parent

PATTERN = "M-*M|-M*-"
HEAD_CHANNELS = 3
REMOVALS = 3
SAMPLES, LENGTH, BATCH = 9, 24, 2
RANKS = 4

_PLAIN = {flag: value for flag, value in parent.FLAGS.items() if "parallel" not in flag}
FLAGS = {**_PLAIN, "hybrid-layer-pattern": PATTERN}
TP, PP, SP = "tensor-model-parallel-size", "pipeline-model-parallel-size", "sequence-parallel"
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP 4": {},
    "TP 2 x DP 2": {TP: 2},
    "TP 2, SP x DP 2": {TP: 2, SP: True},
    "PP 2 x DP 2": {PP: 2},
    "TP 2, SP x PP 2": {TP: 2, PP: 2, SP: True},
    "PP 2, 2 virtual stages x DP 2": {PP: 2, "hybrid-layer-pattern": "M-|*M|-M|*-"},
}


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


def measure(folder: Path, flags: dict[str, Any], checkpoint: str = "parent", data_rank: int | None = None) -> Scores:
    """Width and depth scores on the groups that are initialised, fp64.

    Args:
        folder: of the checkpoint and the text.
        flags: of the parent, layout included.
        checkpoint: its name in the folder.
        data_rank: whose samples this rank takes; None for its own.
    """
    from megatron.core import parallel_state

    from megatron_elastic import standalone
    from megatron_elastic.importance.collect import collect_scores
    from megatron_elastic.importance.depth import rank_depth
    from megatron_elastic.training import load_parent

    text = CalibrationText(folder / "text", samples=SAMPLES, sequence_length=LENGTH, vocab=60)
    rank = parallel_state.get_data_parallel_rank() if data_rank is None else data_rank
    numbers = text.batches(BATCH, rank, parallel_state.get_data_parallel_world_size())
    batches = [text.tokens(batch) for batch in numbers]
    model = standalone.build_plain_model(flags, torch.float64)
    load_parent(model, folder / checkpoint)
    width = collect_scores(model, batches, head_channels=HEAD_CHANNELS)
    depth = rank_depth(model, batches, removals=REMOVALS)
    return Scores(width.hidden, width.layers, width.calibration, depth)


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
