"""Checkpoints between core's own saving on two ranks and this package's reading in one process."""

import pytest
import torch

from megatron_elastic import checkpoint
from tests.distributed.launch import run_ranks

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
