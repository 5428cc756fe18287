"""Scores: the aggregation, and the one file that holds them."""

import pytest
import torch

from megatron_elastic.errors import CheckpointError
from megatron_elastic.importance.accumulators import SequenceNorms
from megatron_elastic.importance.scores import DepthRanking, Scores, mamba_scores
from tests.unit.small_parent import SHAPE

DEPTH = DepthRanking("iterative", (2, 0, 1), ({0: 0.5, 1: 0.7, 2: 0.1}, {0: 0.6, 1: 0.9}), 6, 9)
CALIBRATION = {"samples": 4, "sequence_length": 7, "data": "corpus/train", "checkpoint": "parent", "seed": None}


def scores():
    def drawn(size: int) -> torch.Tensor:
        return torch.rand(size, dtype=torch.float64)

    return Scores(
        torch.arange(12, dtype=torch.float64),
        {
            0: {"mamba_heads": drawn(8), "mamba_head_dim": drawn(2)},
            1: {"ffn": drawn(16)},
            2: {"attention_heads": drawn(8)},
        },
        CALIBRATION,
        DEPTH,
    )


def test_mean_over_the_sequence_then_l2_over_the_samples():
    # Two samples of two tokens: means 2 and 4 for the first entry, 0.5 and 0 for the second.
    norms = SequenceNorms()
    norms.add(torch.tensor([[[1.0, 1.0], [4.0, 0.0]], [[3.0, 0.0], [4.0, 0.0]]]))
    assert norms.value().tolist() == pytest.approx([20**0.5, 0.5], abs=1e-15)


def test_batches_add_up_to_one_batch():
    values = torch.rand(9, 6, 5, dtype=torch.float64)
    whole, parts = SequenceNorms(), SequenceNorms()
    whole.add(values)
    for batch in values.split(2, dim=1):
        parts.add(batch)
    # Sums of squares in another order.
    torch.testing.assert_close(parts.value(), whole.value(), rtol=1e-15, atol=0)
    parts.add(values[:, :1])
    assert (parts.value() > whole.value()).all()


def test_low_precision_is_averaged_in_fp32_and_summed_in_fp64():
    norms, value = SequenceNorms(), torch.full((4096, 1, 1), 0.1, dtype=torch.bfloat16)
    norms.add(value)
    assert norms.value().dtype == torch.float64
    # fp32 summation of 4096 equal numbers; a bf16 sum would be off by percents.
    assert norms.value().item() == pytest.approx(value[0].item(), rel=1e-5)


def test_nothing_seen_is_an_error():
    with pytest.raises(ValueError, match="no activation"):
        SequenceNorms().value()


def test_mamba_heads_share_channels_and_are_judged_by_the_best_of_them():
    channels = torch.tensor([[3.0, 4, 0], [0, 0, 8], [5, 12, 0]])
    whole = mamba_scores(channels, 3)
    assert whole["mamba_head_dim"].tolist() == pytest.approx([34**0.5, 160**0.5, 8])
    assert whole["mamba_heads"].tolist() == [5, 8, 13]
    # The best channel of all heads together is the second: by it alone the second head says nothing.
    assert mamba_scores(channels, 1)["mamba_heads"].tolist() == [4, 0, 12]
    assert mamba_scores(channels, 2)["mamba_heads"].tolist() == [4, 8, 12]
    assert mamba_scores(channels, 2)["mamba_head_dim"].tolist() == whole["mamba_head_dim"].tolist()


def test_saved_and_loaded_are_the_same(tmp_path):
    saved = scores()
    saved.save(tmp_path / "new" / "scores.pt")
    loaded = Scores.load(tmp_path / "new" / "scores.pt")
    assert torch.equal(loaded.hidden, saved.hidden)
    assert loaded.calibration == CALIBRATION
    assert {n: sorted(axes) for n, axes in loaded.layers.items()} == {
        0: ["mamba_head_dim", "mamba_heads"], 1: ["ffn"], 2: ["attention_heads"],
    }  # fmt: skip
    assert loaded.depth == DEPTH
    assert [DEPTH.score(number) for number in DEPTH.order] == [0.1, 0.6, 0.9]
    assert all(torch.equal(loaded.layers[n][axis], t) for n, axes in saved.layers.items() for axis, t in axes.items())
    assert loaded.faults(SHAPE) == []
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["scores.pt"]


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    scores().save(tmp_path / "scores.pt")
    before = (tmp_path / "scores.pt").read_bytes()

    def full_disk(values, path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        scores().save(tmp_path / "scores.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["scores.pt"]
    assert (tmp_path / "scores.pt").read_bytes() == before


class Foreign:
    """An object that must not be unpickled."""


def test_files_of_something_else_are_refused(tmp_path):
    path = tmp_path / "scores.pt"
    with pytest.raises(CheckpointError, match="no such file; make it with"):
        Scores.load(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Scores.load(path)
    torch.save({"object": Foreign()}, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Scores.load(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="a file of something else"):
        Scores.load(path)
    for schema in (1, 9):
        torch.save({"schema": schema, "hidden": torch.zeros(2), "layers": {}, "calibration": {}}, path)
        with pytest.raises(CheckpointError, match=f"schema {schema}, this version reads 2: make it with"):
            Scores.load(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Scores.load(tmp_path)


def test_faults_name_what_does_not_fit():
    made = scores()
    assert made.faults(SHAPE) == []
    short = Scores(
        made.hidden[:3],
        {0: {"ffn": torch.zeros(16), "mamba_head_dim": torch.zeros(2)}, 1: made.layers[1]},
        depth=DepthRanking("one-shot", (1, 0), ({0: 0.5, 1: 0.1},), 3, 4),
    )
    assert short.faults(SHAPE) == [
        "layer 0, ffn: not in the parent",
        "layer 0, mamba_heads: missing",
        "layer 2, attention_heads: missing",
        "hidden: (3,) scores, the parent has 12 entries",
        "depth: an order of 2 layers, the parent has 3",
    ]
