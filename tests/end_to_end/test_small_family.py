"""`train` on a small model: two stages on PP=2, stopped and resumed bit for bit, selections given by hand."""

import shutil
from pathlib import Path

import pytest
import torch

from megatron_elastic.checkpoint import find_checkpoint, read_metadata, read_tensor, tensor_names
from tests.end_to_end import small_run

ROUTER = {"iterations": 4, "warmup": 1, "tolerance": 0.06}
SELECTIONS = {"whole": {}, "half": {"hidden": 20, "ffn": 48, "mamba_heads": 4, "attention_heads": 2}}


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, router and both optimizers of the newest checkpoint."""
    path = find_checkpoint(folder / "family")
    names = [name for name in tensor_names(path) if "rng" not in name]
    return {name: read_tensor(path, name) for name in names}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run with a router, and what it printed."""
    folder = tmp_path_factory.mktemp("small")
    small_run.prepare(folder, router=ROUTER)
    done = small_run.train(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


def test_two_stages_decide_and_report_every_budget(run: tuple[Path, str]) -> None:
    folder, printed = run
    metadata = read_metadata(find_checkpoint(folder / "family"))
    assert metadata is not None
    assert metadata.iteration == 5
    assert metadata.stage == 2
    assert len(metadata.selections) == 2
    assert metadata.selections[0].as_dict() == small_run.SHAPE.full
    assert metadata.selections[1] != metadata.selections[0]
    for word in ("kd whole", "kd half", "stage 2", "the router is frozen", "base samples 12"):
        assert word in printed, word
    assert list((folder / "family" / "tensorboard").glob("events*"))
    assert list(folder.glob("**/offline-run-*")), "wandb wrote no offline run"


def test_resumed_equals_never_stopped(run: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    shutil.copytree(run[0], folder)
    # As if killed after iteration 2: inside stage 1, before the router is frozen.
    for iteration in (3, 4, 5):
        shutil.rmtree(folder / "family" / f"iter_{iteration:07d}")
    (folder / "family" / "latest_checkpointed_iteration.txt").write_text("2")
    before = state(folder)
    done = small_run.train(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    resumed, straight = state(folder), state(run[0])
    assert set(resumed) == set(straight)
    assert [name for name in straight if not torch.equal(resumed[name], straight[name])] == []
    assert [name for name in straight if "router" in name and not torch.equal(before[name], straight[name])]


def test_given_selections_need_no_router(run: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "given"
    shutil.copytree(run[0], folder, ignore=shutil.ignore_patterns("family"))
    stages = small_run.ELASTIC["stages"][:1]
    small_run.write_recipe(folder, selections=SELECTIONS, stages=stages)
    done = small_run.train(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    path = find_checkpoint(folder / "family")
    metadata = read_metadata(path)
    assert metadata is not None
    assert metadata.selections[1].as_dict() == {**small_run.SHAPE.full, **SELECTIONS["half"]}
    assert not [name for name in tensor_names(path) if "router" in name]


def test_another_family_in_the_way_is_refused(run: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(run[0], folder)
    budgets = [{"name": "whole", "fraction": 1.0}, {"name": "small", "fraction": 0.55}]
    small_run.write_recipe(folder, router=ROUTER, budgets=budgets)
    done = small_run.train(folder)
    assert done.returncode == 1
    assert "another family" in done.stderr
