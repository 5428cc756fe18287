"""An extraction or a sort that goes slowly and tells where it is; run by test_stops.py in processes of their own."""

import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_elastic import extraction
from megatron_elastic.checkpoint import integrity, writing
from megatron_elastic.cli.main import main

PAUSE = 0.05
"""Seconds at every place that is told."""


def _telling(pipe: Connection, place: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def told(*args: Any, **kwargs: Any) -> Any:
        pipe.send(place)
        time.sleep(PAUSE)
        return function(*args, **kwargs)

    return told


def extract(source: Path, out: Path, pipe: Connection) -> None:
    """`megatron-elastic extract`, telling through the pipe when it checks, cuts and verifies."""
    # Where the tests run in the background the shell has turned Ctrl-C off, and a child inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    integrity._check_digests = _telling(pipe, "checking", integrity._check_digests)
    extraction.read_entries = _telling(pipe, "writing", extraction.read_entries)
    writing.file_digests = _telling(pipe, "verifying", writing.file_digests)  # type: ignore[attr-defined]
    sys.exit(main(["extract", "--checkpoint", str(source), "--budget", "p100", "--out", str(out)]))
