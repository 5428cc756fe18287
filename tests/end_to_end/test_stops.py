"""However a run is stopped, resumed, rerun or made to skip: the family is the one of a run that never was."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_elastic.checkpoint import TRACKER
from tests.end_to_end import kills, small_run
from tests.end_to_end.kills import FAULTS, LAST, Reference
from tests.rank_server import RankServer, Run, hook

ROUTER_STEP = "elastic.router.optimizer.nets.hidden.0.weight.step"


@pytest.fixture(scope="module")
def server() -> Iterator[RankServer]:
    with RankServer() as started:
        yield started


@pytest.fixture(scope="module")
def straight(server: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("stops")
    (folder / "start").mkdir()
    small_run.prepare(folder / "start")
    return Reference(server, folder / "straight", folder / "start", {})


@pytest.fixture(scope="module")
def straight_async(server: RankServer, straight: Reference) -> Reference:
    """The same with asynchronous saves."""
    folder = straight.folder.parent
    return Reference(server, folder / "straight-async", folder / "start", {"async-save": True})


def equals(folder: Path, reference: Reference, *, but: tuple[str, ...] = ()) -> bool:
    """Whether a folder's newest checkpoint is the uninterrupted run's last one, bit for bit."""
    return set(small_run.different(small_run.state(folder), reference.states[LAST])) <= set(but)


def rank_text(run: Run, rank: int) -> str:
    return Path(f"{run.output}-rank-{rank}").read_text()


def texts(run: Run) -> list[str]:
    """What rank 0 read for training and evaluation, in order."""
    return re.findall(r"watch \| read (\w+ \| \w+ [T\d])", rank_text(run, 0))


@pytest.mark.parametrize("stop", [2, 3, 4, 5])
def test_resumed_equals_never_stopped(server: RankServer, straight: Reference, tmp_path: Path, stop: int) -> None:
    """2: the router learns; 3: the stage changes; 4: the router has just been frozen; 5: sliced training."""
    folder = kills.fresh(tmp_path / "resumed", straight.folder)
    shutil.copytree(straight.folder / "family", folder / "family")
    for iteration in range(stop + 1, LAST + 1):
        shutil.rmtree(folder / "family" / f"iter_{iteration:07d}")
    (folder / "family" / TRACKER).write_text(str(stop))
    run = server.train(folder)
    assert run.status == 0, run.text()[-3000:]
    assert equals(folder, straight)
    assert small_run.different(straight.states[stop], straight.states[LAST])
    losses, rates, judged = kills.told(run.text())
    assert sorted(losses) == list(range(stop + 1, LAST + 1))
    assert losses.items() <= straight.losses.items()
    assert rates.items() <= straight.rates.items()
    assert judged.items() <= straight.judged.items()
    assert len(set(straight.losses.values())) == len(set(straight.rates.values())) == LAST


@pytest.mark.parametrize("kind", kills.KINDS)
def test_killed_at_any_moment(
    server: RankServer, straight: Reference, straight_async: Reference, tmp_path: Path, kind: str
) -> None:
    """One moment of each kind; `tests/soak.sh` has five."""
    moment = next(m for m in reversed(kills.moments(1)) if m.kind == kind)
    reference = straight_async if moment.is_async else straight
    outcome = kills.kill_and_resume(server, tmp_path / "killed", moment, reference)
    assert outcome.faults == (), moment


def test_sigterm_saves_and_the_same_command_goes_on(server: RankServer, straight: Reference, tmp_path: Path) -> None:
    folder = kills.fresh(tmp_path / "terminated", straight.folder)
    run = server.train(folder, hooks=[hook(f"{FAULTS}:terminate", victim=1, phase="step 2")])
    assert run.status == 130
    lines = [line for line in run.output.read_text().splitlines() if line.startswith("megatron-elastic:")]
    assert lines == [f"megatron-elastic: stopped at iteration 2 of {LAST}; run the same command again to go on"]
    assert small_run.different(small_run.state(folder), straight.states[2]) == []
    run = server.train(folder)
    assert run.status == 0
    assert equals(folder, straight)


def test_sigterm_to_the_command_under_torchrun(straight: Reference, tmp_path: Path) -> None:
    """The real command, after its first save: torchrun's SIGTERM goes to everything that a rank has started."""
    folder = kills.fresh(tmp_path / "command", straight.folder)
    stages = [{**kills.STAGES[0], "iterations": 2000}]
    small_run.write_recipe(folder, small_run.WITHOUT_WANDB, router=kills.ROUTER, stages=stages, save_interval=3)
    command = [sys.executable, "-m", "megatron_elastic", "train", "recipe.yaml", "--ranks", "2"]
    environment = {**os.environ, "PYTHONPATH": str(small_run.ROOT), "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "losses of iteration 4 " in line:
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
        status = process.wait(60)
    iteration = int((folder / "family" / TRACKER).read_text())
    assert status == 130, rest
    assert 4 <= iteration < 2000
    assert "exiting program after receiving SIGTERM" in (folder / "logs" / "train-stage-1.log").read_text()
    told = f"megatron-elastic: stopped at iteration {iteration} of 2000; run the same command again to go on"
    assert rest.splitlines()[-1] == told
    step = small_run.state(folder)[ROUTER_STEP]
    assert step == min(iteration, kills.ROUTER["iterations"])


def test_a_rerun_steps_the_router_once(server: RankServer, straight: Reference, tmp_path: Path) -> None:
    folder = kills.fresh(tmp_path / "rerun", straight.folder)
    reject = hook(f"{FAULTS}:reject_once", victim=1, iteration=3)
    run = server.train(folder, hooks=[reject, hook(f"{FAULTS}:watch")])
    assert run.status == 0, run.text()[-3000:]
    assert "Need to rerun step" in run.text()
    assert equals(folder, straight)
    assert kills.told(run.text())[0] == straight.losses
    # The same microbatches in the same roles and order: first as they come, then again.
    again = [line.removeprefix("again ") for line in texts(run) if line.startswith("again")]
    first = [line.removeprefix("first ") for line in texts(run) if line.startswith("first")]
    assert len(again) == 6
    assert [line[-1] for line in again] == ["T", "1", "0"] * 2
    assert again == next(first[n : n + 6] for n in range(len(first)) if first[n] == again[0])
    assert first == [line.removeprefix("first ") for line in texts(straight.run)]
    # Without the guard the router steps twice.
    folder = kills.fresh(tmp_path / "fault", straight.folder)
    run = server.train(folder, hooks=[reject, hook(f"{FAULTS}:commit_early")])
    assert run.status == 0, run.text()[-3000:]
    steps = [(small_run.state(folder, n)[ROUTER_STEP], straight.states[n][ROUTER_STEP]) for n in (2, 3)]
    assert steps == [(2, 2), (4, 3)]


def test_the_teacher_stays_in_evaluation_mode(straight: Reference) -> None:
    """The student goes from training to evaluation and back in the same run."""
    modes = re.findall(r"watch \| teacher \| iteration (\d) \| (\w+) \| (\w+)", rank_text(straight.run, 1))
    assert {teacher for _, teacher, _ in modes} == {"evaluation"}
    assert [student for _, _, student in modes][:6] == ["training"] * 4 + ["evaluation"] * 2
    assert ("3", "evaluation", "training") in modes


def test_nan_on_one_rank_is_told_and_nothing_is_committed(
    server: RankServer, straight: Reference, tmp_path: Path
) -> None:
    folder = kills.fresh(tmp_path / "nan", straight.folder)
    spoil = hook(f"{FAULTS}:spoil_loss", victim=1, iteration=3, value="nan", student=0, times=1)
    run = server.train(folder, hooks=[spoil])
    assert run.status == 1
    assert "17" in run.output.read_text()  # Megatron's own status of a result that could not be reproduced
    assert "iteration 3, rank 1: the KD loss of budget half is NaN" in run.text()
    assert small_run.different(small_run.state(folder), straight.states[2]) == []
    # Persistent: Megatron saves what it needs to find the cause; its own flags go on without that iteration.
    persistent = hook(f"{FAULTS}:spoil_loss", victim=1, iteration=3, value="inf", student=1, times=9)
    run = server.train(folder, hooks=[persistent])
    assert run.status == 1
    # The first step after a start is not validated by the state machine.
    assert "iteration 3, rank 1: the KD loss of budget whole is infinite. The first step" in run.text()
    assert small_run.different(small_run.state(folder), straight.states[2]) == []
    run = server.train(folder)
    assert run.status == 0, run.text()[-3000:]
    assert equals(folder, straight)


def test_skipping_reads_the_text_and_steps_nothing(server: RankServer, straight: Reference, tmp_path: Path) -> None:
    skip = {"iterations-to-skip": [2], "rerun-mode": "disabled"}
    folder = kills.fresh(tmp_path / "skip", straight.folder, skip)
    run = server.train(folder, hooks=[hook(f"{FAULTS}:watch")])
    assert run.status == 0, run.text()[-3000:]
    never = texts(straight.run)
    # Without the evaluation after iteration 2: two base microbatches, three roles.
    assert texts(run) == never[:12] + never[18:]
    assert sorted(kills.told(run.text())[0]) == [1, 3, 4, 5, 6]
    end = small_run.state(folder)
    assert end[ROUTER_STEP] == kills.ROUTER["iterations"] - 1
    assert small_run.different(end, straight.states[LAST])
    for iteration in (4, 5, 6):
        shutil.rmtree(folder / "family" / f"iter_{iteration:07d}")
    (folder / "family" / TRACKER).write_text("3")
    assert server.train(folder).status == 0
    assert small_run.different(small_run.state(folder), end) == []
    # What it is for: a loss that is NaN every time. Megatron saves, to look at it on another GPU, and ends with 16.
    folder = kills.fresh(tmp_path / "persistent", straight.folder)
    spoil = hook(f"{FAULTS}:spoil_loss", victim=1, iteration=2, value="nan", student=0, times=9)
    run = server.train(folder, hooks=[spoil])
    assert run.status == 1
    assert "16" in run.output.read_text()
    assert "iteration 2, rank 1: the KD loss of budget half is NaN" in run.text()
    assert small_run.different(small_run.state(folder), straight.states[1]) == []
    kills.write_recipe(folder, skip)
    run = server.train(folder, hooks=[spoil])
    assert run.status == 0, run.text()[-3000:]
    assert small_run.different(small_run.state(folder), end) == []


def test_a_slow_asynchronous_save_is_of_its_own_iteration(
    server: RankServer, straight: Reference, straight_async: Reference, tmp_path: Path
) -> None:
    folder = kills.fresh(tmp_path / "slow", straight.folder, {"async-save": True})
    run = server.train(folder, hooks=[hook(f"{FAULTS}:slow_writer", seconds=1.5)])
    assert run.status == 0, run.text()[-3000:]
    for iteration in range(1, LAST + 1):
        found = small_run.state(folder, iteration)
        assert small_run.different(found, straight_async.states[iteration]) == []
        # The recipe's flags are in the description; everything else is what synchronous saves hold.
        assert small_run.different(found, straight.states[iteration]) == ["elastic.metadata"]
    for live in (False, True):
        # Where core copies nothing (host memory) the family's tensors are right all the same, unless they are given
        # to the writer as they are.
        folder = kills.fresh(tmp_path / f"live-{live}", straight.folder, {"async-save": True})
        run = server.train(folder, hooks=[hook(f"{FAULTS}:slow_writer", seconds=1.5, copies=False, live=live)])
        assert run.status == 0, run.text()[-3000:]
        wrong = small_run.different(small_run.state(folder, 1), straight_async.states[1])
        assert "decoder.final_norm.weight" in wrong
        assert any(name.startswith("elastic.router.") for name in wrong) == live
