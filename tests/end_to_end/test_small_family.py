"""`train` on a small model: two stages on PP=2, selections given by hand. How it stops is in `test_stops.py`."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_elastic.checkpoint import find_checkpoint, find_verified, read_metadata, tensor_names
from megatron_elastic.errors import CheckpointError
from megatron_elastic.extraction import extract_budget
from tests.end_to_end import small_run
from tests.end_to_end.wandb_records import offline_runs
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


def test_both_stages_are_one_run_in_wandb(run: tuple[Path, str]) -> None:
    """With the elastic section as config, curves a budget, the router, the decided budgets, checkpoints."""
    first, second = offline_runs(run[0])
    assert first["id"] == second["id"]
    assert {first["group"], first["job_type"]} == {"small", "elastic"}
    assert first["config"]["elastic"]["stage"] == 1
    assert second["config"]["elastic"]["stage"] == 2
    assert [budget["name"] for budget in second["config"]["elastic"]["budgets"]] == ["whole", "half"]
    assert second["config"]["num_layers"] == len(small_run.SHAPE.pattern)  # Megatron's own flags
    assert len(first["history"]["kd half"]) == 3
    assert len(second["history"]["kd half"]) == 2
    assert first["history"]["router/half/cost_over_target"]
    assert "router/budgets/nrows" not in first["history"]  # decided in the second stage
    assert second["history"]["router/budgets/nrows"] == [2]
    assert first["artifacts"]["family"] == "model"


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


def mount(folder: Path, size: str, *options: str) -> None:
    """A file system in memory of a given size; skips the test where this user cannot have one."""
    words = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "none", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a full disk needs a file system of its own, which cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder `family` with room for one checkpoint of the small run with selections, not for two."""
    family = tmp_path / "given" / "family"
    family.mkdir(parents=True)
    mount(family, "1800k")
    yield family
    subprocess.run(["umount", str(family)], check=True)


def test_given_selections_need_no_router_and_a_full_disk_costs_one_save(
    run: tuple[Path, str], server: RankServer, small_disk: Path
) -> None:
    folder = small_disk.parent
    ignored = shutil.ignore_patterns("family", "logs", "wandb-logs")
    shutil.copytree(run[0], folder, ignore=ignored, dirs_exist_ok=True)
    stages = small_run.ELASTIC["stages"][:1]
    small_run.write_recipe(folder, small_run.WITHOUT_WANDB, selections=SELECTIONS, stages=stages)
    done = server.train(folder)
    assert done.status == 1
    message = "family: a checkpoint could not be saved (No space left on device); the one before it is whole"
    assert message in done.text()
    assert read_metadata(find_verified(small_disk / "iter_0000001")) is not None
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\)"):
        extract_budget(small_disk / "iter_0000001", "whole", small_disk / "whole")
    assert [each.name for each in small_disk.iterdir() if "whole" in each.name] == []
    mount(small_disk, "100m", "remount")
    done = server.train(folder)
    assert done.status == 0, done.text()[-3000:]
    path = find_verified(small_disk)
    assert path.name == "iter_0000003"
    metadata = read_metadata(path)
    assert metadata is not None
    assert metadata.selections[1].as_dict() == {**small_run.SHAPE.full, **SELECTIONS["half"]}
    assert not [name for name in tensor_names(path) if "router" in name]


def test_a_damaged_family_is_refused_once_by_the_launcher_and_by_ranks(run: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(run[0], folder)
    shard = folder / "family" / "iter_0000005" / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    for launcher in ([], ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]):
        done = small_run.train(folder, launcher=launcher)
        assert done.returncode == 1
        assert done.stderr.count("megatron-elastic: error:") == 1
        assert "family/iter_0000005/__1_0.distcp is damaged: its SHA-256 is" in done.stderr


def test_another_family_in_the_way_is_refused(run: tuple[Path, str], server: RankServer, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(run[0], folder)
    budgets = [{"name": "whole", "fraction": 1.0}, {"name": "small", "fraction": 0.55}]
    small_run.write_recipe(folder, router=ROUTER, budgets=budgets)
    done = server.train(folder)
    assert done.status == 1
    assert "another family" in done.text()
