"""`train` on a small model: two stages on PP=2, stopped and resumed bit for bit, selections given by hand."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_elastic.checkpoint import find_checkpoint, find_verified, read_metadata, read_tensor, tensor_names
from megatron_elastic.errors import CheckpointError
from megatron_elastic.extraction import extract_budget
from tests.end_to_end import small_run

ROUTER = {"iterations": 4, "warmup": 1, "tolerance": 0.06}
SELECTIONS = {"whole": {}, "half": {"hidden": 20, "ffn": 48, "mamba_heads": 4, "attention_heads": 2}}


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, router and both optimizers of the newest checkpoint."""
    path = find_checkpoint(folder)
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
    # As if killed while iteration 3 was saved and the tracker of iteration 2 was written: inside stage 1, before the
    # router is frozen.
    for iteration in (4, 5):
        shutil.rmtree(folder / "family" / f"iter_{iteration:07d}")
    (folder / "family" / "iter_0000003" / "integrity.json").unlink()
    (folder / "family" / "latest_checkpointed_iteration.txt").write_text("")
    before = state(folder / "family" / "iter_0000002")
    done = small_run.train(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "iter_0000003: removed, a save was stopped there (integrity.json is missing)" in done.stdout
    assert "set to 2, the newest whole iteration (it said nothing)" in done.stdout
    resumed, straight = state(folder / "family"), state(run[0] / "family")
    assert set(resumed) == set(straight)
    assert [name for name in straight if not torch.equal(resumed[name], straight[name])] == []
    assert [name for name in straight if "router" in name and not torch.equal(before[name], straight[name])]


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
    run: tuple[Path, str], small_disk: Path
) -> None:
    folder = small_disk.parent
    ignored = shutil.ignore_patterns("family", "logs", "wandb-logs")
    shutil.copytree(run[0], folder, ignore=ignored, dirs_exist_ok=True)
    stages = small_run.ELASTIC["stages"][:1]
    small_run.write_recipe(folder, selections=SELECTIONS, stages=stages)
    done = small_run.train(folder)
    assert done.returncode == 1
    message = "family: a checkpoint could not be saved (No space left on device); the one before it is whole"
    assert done.stderr.count("error:") == 1
    assert message in done.stderr
    assert read_metadata(find_verified(small_disk / "iter_0000001")) is not None
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\)"):
        extract_budget(small_disk / "iter_0000001", "whole", small_disk / "whole")
    assert [each.name for each in small_disk.iterdir() if "whole" in each.name] == []
    mount(small_disk, "100m", "remount")
    done = small_run.train(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
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


def test_another_family_in_the_way_is_refused(run: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(run[0], folder)
    budgets = [{"name": "whole", "fraction": 1.0}, {"name": "small", "fraction": 0.55}]
    small_run.write_recipe(folder, router=ROUTER, budgets=budgets)
    done = small_run.train(folder)
    assert done.returncode == 1
    assert "another family" in done.stderr
