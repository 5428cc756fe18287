"""One node's part: what a stop means for whoever gives the command again. Its launcher is a stand-in for torchrun."""

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_elastic.checkpoint import TRACKER
from megatron_elastic.cli import contact, launch, node
from megatron_elastic.errors import ElasticError

# Saves what SAVES lists, then ends with STATUS, or waits for SIGTERM, which may make it save once more.
LAUNCHER = """
import os, pathlib, signal, sys, time
tracker = pathlib.Path(os.environ["TRACKER"])
if os.environ.get("AT_TERM") is not None:
    def stop(number, frame):
        time.sleep(float(os.environ.get("TAKES", "0")))
        if os.environ["AT_TERM"]:
            tracker.write_text(os.environ["AT_TERM"])
        sys.exit(1)
    signal.signal(signal.SIGTERM, stop)
if os.environ.get("SAVES"):
    tracker.write_text(os.environ["SAVES"])
pathlib.Path(os.environ["TRACKER"] + ".started").touch()
while os.environ.get("AT_TERM") is not None:
    time.sleep(0.02)
sys.exit(int(os.environ.get("STATUS", "0")))
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "Run":
    return Run(monkeypatch, tmp_path)


class Run:
    """A run of two stages, to iterations 10 and 20, whose launcher does what the variables say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.monkeypatch = monkeypatch
        self.save = folder / "family"
        self.save.mkdir()
        self.tracker = self.save / TRACKER
        parts = [node.Part("stage 1", "one", 10), node.Part("stage 2", "two", 20)]
        monkeypatch.setattr(node, "_parts", lambda arguments: (str(self.save), parts))
        monkeypatch.setattr(contact, "SEEN_WITHIN", 0.5)
        monkeypatch.setattr(launch, "gpu_count", lambda: 0)

    def __call__(self, at: int = 0, node_rank: int = 0, **variables: str) -> int:
        if at:
            self.tracker.write_text(str(at))
        for name, value in {"TRACKER": str(self.tracker), **variables}.items():
            self.monkeypatch.setenv(name, value)
        arguments = argparse.Namespace(
            nodes=1, node_rank=node_rank, master_port=29500, command="train", recipe="r.yaml"
        )
        arguments.launcher = [sys.executable, "-c", LAUNCHER]
        if "AT_TERM" in variables:
            threading.Thread(target=self.terminate, daemon=True).start()
        return node.run(arguments)

    def terminate(self) -> None:
        started = Path(f"{self.tracker}.started")
        deadline = time.monotonic() + 120
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("node_rank", [0, 1])
def test_ranks_that_end_early_with_a_checkpoint_were_stopped(run: Run, node_rank: int) -> None:
    """By the signal on another node, or at `exit-duration-in-mins`."""
    with pytest.raises(KeyboardInterrupt, match="stopped at iteration 7 of 20"):
        run(at=5, node_rank=node_rank, SAVES="7")


def test_ranks_that_end_early_without_one_have_failed(run: Run) -> None:
    with pytest.raises(ElasticError, match="stage 1 ended before iteration 10 was saved"):
        run(at=5)


def test_a_fault_is_no_stop(run: Run) -> None:
    with pytest.raises(ElasticError, match="status 3"):
        run(at=5, SAVES="7", STATUS="3")


def test_a_stop_with_a_newer_checkpoint_is_one(run: Run) -> None:
    with pytest.raises(KeyboardInterrupt, match="stopped at iteration 12 of 20"):
        run(at=11, AT_TERM="12")


def test_a_stop_that_saves_nothing_is_a_failure(run: Run) -> None:
    """Or a scheduler would start it again and again."""
    with pytest.raises(ElasticError, match="stage 2 was stopped before anything newer than iteration 11 was saved"):
        run(at=11, AT_TERM="")


def test_the_ranks_get_the_time_that_torchruns_variable_says(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda pid, number: (killed.append(number), os.kill(pid, number)))
    with pytest.raises(ElasticError):
        run(at=11, AT_TERM="12", TAKES="60", **{launch.SHUTDOWN: "-9"})  # one second in all
    assert killed == [signal.SIGKILL]
