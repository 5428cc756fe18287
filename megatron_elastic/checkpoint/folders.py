"""A folder that is there whole or not at all, whatever stops its writer."""

import os
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_elastic.errors import CheckpointError
from megatron_elastic.signals import terminated_as_interrupt

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def require_free(target: Path) -> None:
    """Refuses a folder that something is in already.

    Raises:
        CheckpointError: with the remedy.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists already: remove it, or choose another folder")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()  # this process has only begun: its namesake is gone


def remove_leftovers(target: Path) -> None:
    """Removes what writers of `target` left that were killed on this host; a living one's, or another host's, stays."""
    if not target.parent.is_dir():
        return
    name = re.compile(rf"\.{re.escape(target.name)}\.{re.escape(socket.gethostname())}\.(\d+)\.partial")
    for entry in target.parent.iterdir():
        found = name.fullmatch(entry.name)
        if found and not _alive(int(found[1])):
            shutil.rmtree(entry)


@contextmanager
def whole_or_nothing(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its place at the end, and is gone after a failure or a signal.

    Its name tells host and process, so that a later writer can tell a killed one's leftover from a living one's.

    Raises:
        CheckpointError: `target` is taken.
    """
    require_free(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    partial = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.partial")
    with terminated_as_interrupt():
        try:
            partial.mkdir()
            yield partial
            require_free(target)
            partial.rename(target)
        finally:
            # A second Ctrl-C waits until the folder is gone.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
            try:
                shutil.rmtree(partial, ignore_errors=True)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
