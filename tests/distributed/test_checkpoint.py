"""Checkpoints between core's own saving on two ranks and this package's reading in one process."""

import json
import shutil

import pytest
import torch

from megatron_elastic import checkpoint
from megatron_elastic.budget import Selection
from megatron_elastic.errors import CheckpointError
from megatron_elastic.extraction import cut
from megatron_elastic.layout import ModelShape
from tests.distributed.launch import run_ranks
from tests.unit.checkpoint.test_integrity import DAMAGE

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    run_ranks("checkpoint_body.py", 2, folder)
    return folder


def test_two_ranks_shards_read_as_whole_parameters(root):
    path = root / "original" / "iter_0000003"
    whole = torch.load(root / "whole.pt")
    assert checkpoint.parameters(path).keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(checkpoint.read_parameter(path, name), tensor), name


def test_rewritten_checkpoint_has_the_same_entries(root):
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    original, again = (
        FileSystemReader(path).read_metadata().state_dict_metadata
        for path in (root / "original" / "iter_0000003", root / "again" / "release")
    )
    assert original.keys() == again.keys()


def test_common_state_travels(root):
    common = checkpoint.read_common(root / "again" / "release")
    assert common["args"] == {"tensor_model_parallel_size": 2, "hidden_size": 48}
    assert common["iteration"] == 3


@pytest.mark.parametrize("kind", ["dp_reshardable", "fully_reshardable"])
def test_optimizer_entries_are_not_of_the_model(root, kind):
    stored, model = (names(root / kind) for names in (checkpoint.tensor_names, checkpoint.model_tensor_names))
    assert model.keys() == checkpoint.model_tensor_names(root / "original" / "iter_0000003").keys()
    assert len(stored) > len(model)


# Of the model in plain_model.py.
SHAPE = ModelShape(
    pattern="M-M*", vocab=64, hidden=48, ffn=80, attention_heads=8, query_groups=2, head_dim=4, mamba_heads=8,
    mamba_head_dim=6, mamba_groups=2, mamba_state=10,
)  # fmt: skip


def extracted(source, out, **kept):
    """File name -> digest of the model that is cut out."""
    selection = Selection.from_dict({**SHAPE.full, "hidden": 20, "ffn": 40, "mamba_heads": 4, **kept})
    cut(source, out, shape=SHAPE, ffn_blocks=8, flags={}, selection=selection)
    files = json.loads((out / "release" / "integrity.json").read_text())["files"]
    return {name: digest for name, digest in files.items() if name.endswith(".distcp")}


def test_what_is_extracted_does_not_depend_on_the_layout_that_saved(root, tmp_path):
    two = extracted(root / "original" / "iter_0000003", tmp_path / "two")
    one = extracted(root / "one" / "iter_0000003", tmp_path / "one")
    assert one == two
    assert one != extracted(root / "one" / "iter_0000003", tmp_path / "other", attention_heads=4)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_what_core_saved_is_refused_by_name(root, tmp_path, kind):
    path = tmp_path / "iter_0000003"
    shutil.copytree(root / "original" / "iter_0000003", path)
    checkpoint.find_verified(path)
    damage, message = DAMAGE[kind]
    damage(path)
    with pytest.raises(CheckpointError, match=message.replace("__0_", "__[01]_")):
        cut(path, tmp_path / "out", shape=SHAPE, ffn_blocks=8, flags={}, selection=Selection.from_dict(SHAPE.full))
    assert [each.name for each in tmp_path.iterdir()] == ["iter_0000003"]
