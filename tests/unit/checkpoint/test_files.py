"""Checkpoints written and read without Megatron: names, parts, laziness, and what a failure leaves behind."""

import errno
import io
import itertools
import json
import pickle
import weakref
from argparse import Namespace
from enum import Enum

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_elastic import checkpoint
from megatron_elastic.checkpoint import LazyTensor
from megatron_elastic.checkpoint.plain import load_plain
from megatron_elastic.errors import CheckpointError
from megatron_elastic.layout import Layout, ModelShape
from megatron_elastic.metadata import Metadata
from tests.unit import sharded, small_parent

LAYER = "decoder.layers.0"
SHAPE = ModelShape(
    pattern="M-",
    vocab=8,
    hidden=6,
    ffn=5,
    attention_heads=2,
    query_groups=1,
    head_dim=4,
    mamba_heads=2,
    mamba_head_dim=2,
    mamba_groups=1,
    mamba_state=3,
)
LAYOUT = Layout(SHAPE, 1)
METADATA = Metadata(kind="extracted", shape=SHAPE, ffn_blocks=1, flags={"hidden-size": 6}, budget="half")


class Colour(Enum):
    """A class that a reader without it must survive."""

    RED = 1


def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embedding.word_embeddings.weight": torch.randn(8, 6, generator=generator),
        f"{LAYER}.norm.weight": torch.randn(6, generator=generator).bfloat16(),
        f"{LAYER}.mixer.in_proj.weight": torch.randn(16, 6, generator=generator),
        f"{LAYER}.mixer.conv1d_weight": torch.randn(10, 1, 4, generator=generator),
        f"{LAYER}.mixer.conv1d_bias": torch.randn(10, generator=generator),
        f"{LAYER}.mixer.A_log": torch.randn(2, generator=generator),
        "decoder.layers.1.mlp.linear_fc1.weight": torch.randn(5, 6, generator=generator),
        "output_layer.weight": torch.randn(8, 6, generator=generator),
    }


def write(path, tensors=None, **other):
    common = {"args": Namespace(hidden_size=6, colour=Colour.RED, dtype=torch.bfloat16), **other.pop("common", {})}
    lazy = small_parent.stored(values() if tensors is None else tensors, LAYOUT)
    return checkpoint.write_checkpoint(path, lazy, common=common, **other)


def test_what_is_written_is_read(tmp_path):
    path = write(tmp_path / "model", metadata=METADATA)
    assert path == tmp_path / "model" / "release"
    assert checkpoint.find_checkpoint(tmp_path / "model") == path == checkpoint.find_checkpoint(path)
    assert {name: info.shape for name, info in checkpoint.parameters(path).items()} == {
        name: tuple(tensor.shape) for name, tensor in values().items()
    }
    for name, tensor in values().items():
        read = checkpoint.read_parameter(path, name)
        assert torch.equal(read, tensor), name
        assert read.dtype == tensor.dtype == checkpoint.parameters(path)[name].dtype, name
    assert checkpoint.read_metadata(path) == METADATA


def test_parts_are_stored_as_megatron_names_them(tmp_path):
    path = write(tmp_path / "model")
    stored = checkpoint.tensor_names(path)
    assert f"{LAYER}.mixer.in_proj.weight" not in stored
    assert stored[f"{LAYER}.mixer.in_proj.weight.dt"].shape == (2, 6)
    assert stored[f"{LAYER}.mixer.conv1d.weight.B"].shape == (3, 1, 4)
    whole = values()[f"{LAYER}.mixer.in_proj.weight"]
    assert torch.equal(checkpoint.read_tensor(path, f"{LAYER}.mixer.in_proj.weight.x"), whole[4:8])
    assert not torch.equal(checkpoint.read_tensor(path, f"{LAYER}.mixer.in_proj.weight.z"), whole[4:8])


RUNS = {
    "all": None, "prefix": [*range(20)], "long runs": [*range(3, 15), *range(20, 32)], "joined": [*range(9, 32)],
    "a run backwards": [*range(16, 32), *range(16)], "short runs": [0, 1, 5, 6, 7, 30], "shuffled": [31, 0, 17, 4],
}  # fmt: skip


@pytest.mark.parametrize("shards", [1, 4])
def test_entries_are_read_in_the_order_that_is_asked_for(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(checkpoint.reading, "_BLOCK_BYTES", 5 * 32 * 32 * 4)  # five rows at once
    generator = torch.Generator().manual_seed(0)
    names = {"a.weight": 0, "b.fc2.weight": 1}  # sharded along the first and the last dimension
    tensors = {name: torch.randn(32, 32, 32, generator=generator) for name in names}
    lazy = {name: LazyTensor((32, 32, 32), torch.float32, lambda t=t: t) for name, t in tensors.items()}
    path = sharded.write(tmp_path / "model", lazy, shards=shards)
    for name, tensor in tensors.items():
        for (number, rows), columns in itertools.product(enumerate(RUNS.values()), RUNS.values()):
            middle = [*RUNS.values()][(3 * number + 1) % len(RUNS)]
            wanted = [None if each is None else torch.tensor(each) for each in (rows, middle, columns)]
            expected = tensor
            for dimension, each in enumerate(wanted):
                expected = expected if each is None else expected.index_select(dimension, each)
            assert torch.equal(checkpoint.read_entries(path, name, wanted), expected)
        assert not torch.equal(expected, tensor[:4, :4, :4])


def test_common_keeps_plain_values(tmp_path):
    path = write(tmp_path / "model", iteration=7, common={"iteration": 7, "optimizer": {"param_groups": []}})
    common = checkpoint.read_common(path)
    assert common == {"checkpoint_version": 3.0, "iteration": 7, "args": Namespace(hidden_size=6, dtype=torch.bfloat16)}
    assert path.name == "iter_0000007"


def test_common_of_older_checkpoints(tmp_path):
    path = write(tmp_path / "model")
    index = path / ".metadata"
    stored = FileSystemReader(path).read_metadata()
    del stored.state_dict_metadata["common_state/shard_0_1"]
    index.write_bytes(pickle.dumps(stored))
    with pytest.raises(CheckpointError, match=r"common\.pt"):
        checkpoint.read_common(path)
    torch.save({"iteration": 3, "noise": torch.ones(3), "args": Namespace(c=Colour.RED, layers=2)}, path / "common.pt")
    assert checkpoint.read_common(path) == {"iteration": 3, "args": Namespace(layers=2)}


def test_reading_runs_nothing_that_a_file_names(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (tmp_path.joinpath("harm").touch, ())

    torch.save({"args": Harmful(), "iteration": 1}, tmp_path / "harmful")
    assert load_plain(io.BytesIO((tmp_path / "harmful").read_bytes())) == {"iteration": 1}
    assert not (tmp_path / "harm").exists()


def test_fused_norms_and_foreign_tensors(tmp_path):
    tensors = {
        "decoder.layers.0.mixer.in_proj.layer_norm_weight": torch.ones(6),
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight": torch.zeros(6),
        "optimizer.state.exp_avg.decoder.final_norm.weight": torch.ones(6),
        "chained_0.optimizer.state.exp_avg.decoder.final_norm.weight": torch.ones(6),
        "decoder.final_norm.weight": torch.ones(6),
    }
    path = write(tmp_path / "model", tensors)
    assert set(checkpoint.parameters(path)) == {
        "decoder.layers.0.norm.weight",
        "decoder.layers.1.pre_mlp_layernorm.weight",
        "decoder.final_norm.weight",
    }
    assert torch.equal(checkpoint.read_parameter(path, "decoder.layers.1.pre_mlp_layernorm.weight"), torch.zeros(6))
    assert len(checkpoint.tensor_names(path)) == 5
    assert len(checkpoint.model_tensor_names(path)) == 3
    assert checkpoint.read_metadata(path) is None


def test_one_tensor_is_alive_at_a_time(tmp_path):
    alive, most = [], []

    def read():
        tensor = torch.zeros(16, 6)
        alive[:] = [each for each in alive if each() is not None]
        alive.append(weakref.ref(tensor))
        most.append(len(alive))
        return tensor

    tensors = {f"decoder.layers.{number}.mixer.D": LazyTensor((16, 6), torch.float32, read) for number in range(6)}
    checkpoint.write_checkpoint(tmp_path / "model", tensors, common={})
    assert most == [1] * 6


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_behind(tmp_path, failure):
    def fail():
        raise failure

    told = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else CheckpointError

    tensors = {
        **small_parent.stored(values(), LAYOUT),
        "decoder.final_norm.weight": LazyTensor((6,), torch.float32, fail),
    }
    with pytest.raises(told, match=None if told is KeyboardInterrupt else "model cannot be written .No space left"):
        checkpoint.write_checkpoint(tmp_path / "model", tensors, common={})
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_is_not_what_was_announced_is_told(tmp_path):
    wrong = {"a": LazyTensor((3,), torch.float32, lambda: torch.zeros(4))}
    with pytest.raises(CheckpointError, match=r"a is \(4,\) torch.float32, where \(3,\)"):
        checkpoint.write_checkpoint(tmp_path / "model", wrong, common={})
    assert list(tmp_path.iterdir()) == []


def test_existing_folders(tmp_path):
    (tmp_path / "model").mkdir()
    path = write(tmp_path / "model", metadata=METADATA)
    with pytest.raises(CheckpointError, match="exists already: remove it"):
        write(tmp_path / "model")
    assert checkpoint.read_metadata(path) == METADATA
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_a_whole_parameter_where_parts_are_stored_is_told(tmp_path):
    name = f"{LAYER}.mixer.in_proj.weight"
    with pytest.raises(CheckpointError, match=r"stored in parts: give each of .*weight\.dt"):
        checkpoint.write_checkpoint(
            tmp_path / "model", {name: LazyTensor((16, 6), torch.float32, lambda: torch.zeros(16, 6))}, common={}
        )
    assert list(tmp_path.iterdir()) == []


def test_missing_and_foreign_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.find_checkpoint(tmp_path)
    (tmp_path / checkpoint.TRACKER).write_text("7")
    with pytest.raises(CheckpointError, match=r"iter_0000007/.metadata is missing.* --ckpt-format torch_dist"):
        checkpoint.find_checkpoint(tmp_path)
    (tmp_path / checkpoint.TRACKER).write_text("seven")
    with pytest.raises(CheckpointError, match="'seven'"):
        checkpoint.find_checkpoint(tmp_path)
    path = write(tmp_path / "model")
    with pytest.raises(CheckpointError, match="no parameter 'decoder"):
        checkpoint.read_parameter(path, "decoder.nothing.weight")
    with pytest.raises(CheckpointError, match="no tensor 'common_state/shard_0_1'"):
        checkpoint.read_tensor(path, "common_state/shard_0_1")
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(CheckpointError, match="format 'zarr'"):
        checkpoint.find_checkpoint(path)


def test_damaged_files_are_told(tmp_path):
    path = write(tmp_path / "model")
    for file in path.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(CheckpointError, match="copy the checkpoint again"):
        checkpoint.read_parameter(path, "output_layer.weight")
    (path / ".metadata").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
        checkpoint.parameters(path)
