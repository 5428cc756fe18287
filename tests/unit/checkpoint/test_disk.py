"""Files that reach the disk in the background: what they hold, what is told of them, and what a fault does."""

import errno
import hashlib
import os
import threading
from pathlib import Path

import pytest

from megatron_elastic.checkpoint import disk

PIECES = [b"a", os.urandom(1 << 17), b"", os.urandom((1 << 17) + 1), b"z" * 100]


def write(path: Path, pieces: list[bytes], *, read_again: bool = True) -> list[str]:
    with disk.Disk(read_again=read_again) as written:
        digests = []
        for number, piece in enumerate(pieces):
            with written.file(path / str(number)) as file:
                file.write(piece)
                file.write(b"end")
            assert file.size == len(piece) + 3
            digests.append(file.digest())
    return digests


@pytest.mark.parametrize("read_again", [True, False])
def test_files_hold_what_was_written_and_digests_are_theirs(tmp_path: Path, read_again: bool) -> None:
    pieces = PIECES * 10  # more than may wait for the disk at once
    digests = write(tmp_path, pieces, read_again=read_again)
    for number, piece in enumerate(pieces):
        content = (tmp_path / str(number)).read_bytes()
        assert content == piece + b"end"
        assert hashlib.sha256(content).hexdigest() == digests[number]
    assert len(set(digests)) == len(PIECES)


def test_every_file_is_synchronised_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    sync = os.fsync

    def slow(number: int) -> None:
        name = os.readlink(f"/proc/self/fd/{number}")
        threading.Event().wait(0.01)
        sync(number)
        seen.append(name)

    monkeypatch.setattr(os, "fsync", slow)
    write(tmp_path, PIECES)
    assert sorted(seen) == [str(tmp_path / str(number)) for number in range(len(PIECES))]


@pytest.mark.parametrize("call", ["fsync", "fdatasync"])
def test_a_fault_in_the_background_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def broken(number: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(disk, "_SYNC_BYTES", 1)
    write(tmp_path, PIECES)
    monkeypatch.setattr(os, call, broken)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="broken"):
        write(tmp_path, PIECES)
    assert len(os.listdir("/proc/self/fd")) == len(before)
