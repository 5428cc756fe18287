"""Files that are hashed while they are written, and reach the disk while the next ones are made."""

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

_SYNC_BYTES = 64 << 20
"""A file goes to the disk whenever about as much of it is new, so that the disk does not wait for the file's end."""
_HASHED_ALONE = 1 << 16
"""Fewer bytes are hashed before they are written: handing them to another thread takes longer."""
_THREADS = 4
"""Files that wait for the disk at once: file systems write several of them in one go."""
_OPEN_FILES = 32
"""The most files that wait for the disk: each holds a descriptor."""


class WrittenFile:
    """A file being written; made by `Disk.file`.

    Attributes:
        file: what is written to.
        size: bytes written.
        synced: done when the disk has what it was last asked to take.
    """

    def __init__(self, file: BinaryIO, hashing: ThreadPoolExecutor, syncing: ThreadPoolExecutor) -> None:
        self.size = 0
        self.file, self._sha256 = file, hashlib.sha256()
        self._hashing, self._syncing = hashing, syncing
        self._unsynced, self.synced = 0, Future[None]()
        self.synced.set_result(None)

    def write(self, data: Any) -> int:
        """Writes and hashes bytes, side by side; returns their number."""
        view = memoryview(data).cast("B")
        if view.nbytes < _HASHED_ALONE:
            self._sha256.update(view)
            self.file.write(view)
        else:
            hashed = self._hashing.submit(self._sha256.update, view)
            try:
                self.file.write(view)
            finally:
                _wait_for(hashed)  # the memory is the caller's
        self.size += view.nbytes
        self._unsynced += view.nbytes
        if self._unsynced >= _SYNC_BYTES and self.synced.done():
            self.synced.result()
            self.file.flush()
            self._unsynced, self.synced = 0, self._syncing.submit(os.fdatasync, self.file.fileno())
        return view.nbytes

    def flush(self) -> None:
        """Nothing to do: `Disk` brings what was written to the disk."""

    def digest(self) -> str:
        """SHA-256 of what was written, in hexadecimal digits."""
        return self._sha256.hexdigest()


def _wait_for(hashed: Future[None]) -> None:
    """Until it is done, also where a signal wants to end this thread."""
    stop: BaseException | None = None
    while not hashed.done():
        try:
            hashed.result()
        except KeyboardInterrupt as error:
            stop = error
    if stop is not None:
        raise stop


class Disk:
    """Writes files one after the other; at its end all of them are on the disk.

    Args:
        read_again: whether they are read again to be compared: the operating system then forgets what it has written,
            so that they come from the disk.
    """

    def __init__(self, *, read_again: bool) -> None:
        self._read_again = read_again
        self._waiting: deque[tuple[WrittenFile, Future[None]]] = deque()

    def __enter__(self) -> Self:
        self._hashing, self._syncing = ThreadPoolExecutor(1), ThreadPoolExecutor(_THREADS)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                while self._waiting:
                    self._wait()
        finally:
            self._syncing.shutdown(cancel_futures=True)
            self._hashing.shutdown()
            for written, _ in self._waiting:
                written.file.close()

    @contextlib.contextmanager
    def file(self, path: Path) -> Iterator[WrittenFile]:
        """A new file, for writing.

        Raises:
            OSError: the disk is full or faulty, for this file or one before it.
        """
        with contextlib.ExitStack() as failed:
            written = WrittenFile(failed.enter_context(path.open("wb")), self._hashing, self._syncing)
            yield written
            written.file.flush()
            failed.pop_all()
        self._waiting.append((written, self._syncing.submit(self._to_disk, written)))
        if len(self._waiting) > _OPEN_FILES:
            self._wait()

    def _wait(self) -> None:
        written, synced = self._waiting[0]
        written.synced.result()
        synced.result()
        written.file.close()
        self._waiting.popleft()

    def _to_disk(self, written: WrittenFile) -> None:
        number = written.file.fileno()
        os.fsync(number)
        if self._read_again and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
