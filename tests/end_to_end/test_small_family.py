"""`train` on a small model: two stages on PP=2, selections given by hand. How it stops is in `test_stops.py`."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_elastic.checkpoint import find_checkpoint, read_metadata, tensor_names
from tests.end_to_end import small_run
from tests.rank_server import RankServer

ROUTER = {"iterations": 4, "warmup": 1, "tolerance": 0.06}
SELECTIONS = {"whole": {}, "half": {"hidden": 20, "ffn": 48, "mamba_heads": 4, "attention_heads": 2}}


@pytest.fixture(scope="module")
def server() -> Iterator[RankServer]:
    with RankServer() as started:
        yield started


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


def test_forked_ranks_make_the_same_family(run: tuple[Path, str], server: RankServer, tmp_path: Path) -> None:
    """What the other tests rely on: ranks of the fork server train what torchrun's ranks do, bit for bit."""
    folder = tmp_path / "forked"
    shutil.copytree(run[0], folder, ignore=shutil.ignore_patterns("family"))
    small_run.write_recipe(folder, small_run.WITHOUT_WANDB, router=ROUTER)
    forked = server.train(folder)
    assert forked.status == 0, forked.text()[-3000:]
    for iteration in range(1, 6):
        one, other = small_run.state(run[0], iteration), small_run.state(folder, iteration)
        assert small_run.different(one, other) == ["elastic.metadata"]  # it has the flags for wandb


def test_given_selections_need_no_router(run: tuple[Path, str], server: RankServer, tmp_path: Path) -> None:
    folder = tmp_path / "given"
    shutil.copytree(run[0], folder, ignore=shutil.ignore_patterns("family"))
    stages = small_run.ELASTIC["stages"][:1]
    small_run.write_recipe(folder, small_run.WITHOUT_WANDB, selections=SELECTIONS, stages=stages)
    done = server.train(folder)
    assert done.status == 0, done.text()[-3000:]
    path = find_checkpoint(folder / "family")
    metadata = read_metadata(path)
    assert metadata is not None
    assert metadata.selections[1].as_dict() == {**small_run.SHAPE.full, **SELECTIONS["half"]}
    assert not [name for name in tensor_names(path) if "router" in name]


def test_another_family_in_the_way_is_refused(run: tuple[Path, str], server: RankServer, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(run[0], folder)
    budgets = [{"name": "whole", "fraction": 1.0}, {"name": "small", "fraction": 0.55}]
    small_run.write_recipe(folder, router=ROUTER, budgets=budgets)
    done = server.train(folder)
    assert done.status == 1
    assert "another family" in done.text()
