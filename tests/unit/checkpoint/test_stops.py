"""An extraction that a signal stops leaves nothing behind; what a killed one left, the next one removes."""

import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from megatron_elastic.checkpoint import find_verified
from megatron_elastic.errors import CheckpointError
from megatron_elastic.extraction import extract_budget
from tests.unit.checkpoint import stops_body
from tests.unit.checkpoint.test_integrity import family


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    family(folder)
    return folder


@contextmanager
def running(source: Path, out: Path) -> Iterator[tuple[BaseProcess, Connection]]:
    """An extraction in a process of its own."""
    context = multiprocessing.get_context("forkserver")  # one import of torch for all of them
    context.set_forkserver_preload(["tests.unit.checkpoint.stops_body"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=stops_body.extract, args=(source, out, there))
    process.start()
    there.close()
    try:
        yield process, here
    finally:
        process.kill()
        process.join(60)


def wait_for(pipe: Connection, place: str, times: int) -> None:
    """Until the process has come to a place that often."""
    while times:
        assert pipe.poll(120), f"it did not come to {place}"
        times -= pipe.recv() == place


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(("place", "times"), [("checking", 2), ("writing", 1), ("writing", 12), ("verifying", 1)])
def test_a_stopped_extraction_leaves_nothing(
    source: Path, tmp_path: Path, place: str, times: int, number: signal.Signals
) -> None:
    with running(source, tmp_path / "out") as (process, pipe):
        wait_for(pipe, place, times)
        assert process.pid is not None
        if place != "checking":
            assert [each.suffix for each in tmp_path.iterdir()] == [".partial"]
        os.kill(process.pid, number)
        process.join(60)
        # Before anything is written SIGTERM has nothing to clean up, and ends the process as it ends any other.
        assert process.exitcode == (130 if place != "checking" or number == signal.SIGINT else -number)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_ones_leftover_is_removed_and_a_living_ones_is_not(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(source, out) as (process, pipe):
        wait_for(pipe, "writing", 3)
        process.kill()
        process.join(60)
        killed = tmp_path / f".out.{socket.gethostname()}.{process.pid}.partial"
    assert list(tmp_path.iterdir()) == [killed]
    elsewhere = tmp_path / ".out.another-host.1.partial"
    elsewhere.mkdir()
    with running(source, out) as (process, pipe):
        wait_for(pipe, "writing", 3)
        assert process.pid is not None
        living = tmp_path / f".out.{socket.gethostname()}.{process.pid}.partial"
        assert sorted(tmp_path.iterdir()) == sorted([elsewhere, living])  # the killed one's is gone
        os.kill(process.pid, signal.SIGSTOP)
        extract_budget(source, "p100", out)
        assert living.is_dir()
        find_verified(out)
        os.kill(process.pid, signal.SIGCONT)
        process.join(60)
        assert process.exitcode == 1  # the place is taken now
    assert sorted(tmp_path.iterdir()) == sorted([elsewhere, out])
    with pytest.raises(CheckpointError, match="exists already"):
        extract_budget(source, "p100", out)
