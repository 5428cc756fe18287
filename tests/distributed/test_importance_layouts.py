"""Importance is the same on every layout as in one process: fp64."""

import pytest
import torch

from megatron_elastic.importance import Scores
from tests.distributed import importance_kit as kit
from tests.distributed.launch import run_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.is_available(), reason="fp64 proofs on the CPU adaptation, which refuses CUDA"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the ranks measured, beside what one process measures."""
    from megatron_elastic import standalone

    path = tmp_path_factory.mktemp("importance")
    kit.write_text(path / "text")
    kit.write_parent(path / "dense", kit.FLAGS)
    kit.write_parent(path / "experts", kit.EXPERT_FLAGS)
    whole = {(checkpoint, samples): flags for flags, _, checkpoint, samples in kit.LAYOUTS.values()}
    with standalone.single_process():
        for (checkpoint, samples), flags in whole.items():
            kit.measure(path, flags, checkpoint, samples).save(path / f"{checkpoint} {samples}.pt")
    run_ranks("importance_body.py", kit.RANKS, path)
    return path


@pytest.mark.parametrize("name", kit.LAYOUTS)
def test_scores_are_those_of_one_process(folder, name):
    _, _, checkpoint, samples = kit.LAYOUTS[name]
    expected, found = Scores.load(folder / f"{checkpoint} {samples}.pt"), Scores.load(folder / f"{name}.pt")
    # fp64: sums over ranks in another order; core's expert router rounds its scores to fp32, one way or the other.
    assert kit.worst(found, expected) < (1e-7 if checkpoint == "experts" else 1e-13)
    assert found.depth is not None
    assert expected.depth is not None
    assert found.depth.order == expected.depth.order
    assert found.depth.layer_forwards == expected.depth.layer_forwards
    assert found.depth.layer_forwards_naive == expected.depth.layer_forwards_naive


def test_a_rank_that_reads_another_ranks_text_shows(folder):
    expected = Scores.load(folder / f"experts {kit.SAMPLES}.pt")
    assert kit.worst(Scores.load(folder / "another rank's text.pt"), expected) > 1e-3
