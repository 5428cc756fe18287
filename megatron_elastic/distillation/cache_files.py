"""Files of a teacher cache: entries of one size, found by a key of 16 bytes.

A writer has a pair of files, `NAME.data` of entries and `NAME.index` of one record for each, which are called
`NAME.data.part` and `NAME.index.part` until they are full or the writer ends. An entry is written before its record,
and a record when the step that it belongs to is committed: a killed writer leaves whole entries, which `recover` takes
over, and at most a tail that no record tells of. A file with its final name never changes, and nothing depends on which
rank wrote it.
"""

import errno
import fcntl
import io
import os
import socket
import time
import zlib
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_elastic.errors import CacheError

RECORD = np.dtype([("key", "<u8", 2), ("text", "<u8"), ("sample", "<u8"), ("slot", "<i4"), ("checksum", "<u4")])
"""Key; text and number of the sample; place in the data file, or `ELSEWHERE`; CRC-32 of the entry."""
ELSEWHERE = -1
"""Stands for a slot where the entry itself is in another file: the same text came again."""
FILE_BYTES = 2**32
"""A data file that is as large is full."""
_FOOTER = np.dtype([("mark", "S4"), ("checksum", "<u4")])
_MARK = b"MEtc"
_OPEN_FILES = 64
_DATA, _INDEX, _PART = ".data", ".index", ".part"
_REMEDY = "remove it and the file of the same name beside it, and run the stage once with `mode: write`"


class EntryLayout(NamedTuple):
    """What an entry holds: ids `[s, k]` int32, their log-probabilities `[s, k]`, and the ghost's `[s]` fp32.

    Attributes:
        tokens: `s`.
        top_k: `k`.
        precision: `fp16` or `fp32`.
    """

    tokens: int
    top_k: int
    precision: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of one entry."""
        kept = (self.tokens, self.top_k)
        value = {"fp16": "<f2", "fp32": "<f4"}[self.precision]
        return np.dtype([("ids", "<i4", kept), ("log_probs", value, kept), ("ghost", "<f4", (self.tokens,))])


def _lock(stream: IO[bytes] | io.FileIO) -> bool:
    """Whether this process now holds a file that no other one holds; where there are no locks, it does."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True


def _finish(stem: Path, records: NDArray[Any]) -> None:
    """Gives a pair of files their final names, the index last: it says that the data is there."""
    data, index = (Path(f"{stem}{kind}{_PART}") for kind in (_DATA, _INDEX))
    footer = np.array([(_MARK, zlib.crc32(records.tobytes()))], _FOOTER)
    with index.open("r+b") as stream:
        stream.truncate(records.nbytes)
        stream.seek(0, os.SEEK_END)
        stream.write(footer.tobytes())
        stream.flush()
        os.fsync(stream.fileno())
    data.replace(f"{stem}{_DATA}")
    index.replace(f"{stem}{_INDEX}")


def recover(folder: Path, layout: EntryLayout) -> int:
    """Takes over what writers left that were killed; a part that a living one holds stays.

    Returns:
        Entries taken over.
    """
    size, taken = layout.dtype.itemsize, 0
    for part in sorted(folder.glob(f"*{_INDEX}{_PART}")):
        stem = Path(str(part).removesuffix(f"{_INDEX}{_PART}"))
        data = Path(f"{stem}{_DATA}{_PART}")
        with part.open("r+b") as stream:  # for writing: locks of some network file systems ask for it
            if not _lock(stream):
                continue
            if not data.exists():  # killed between the two names
                data = Path(f"{stem}{_DATA}")
                data.replace(f"{stem}{_DATA}{_PART}")
                data = Path(f"{stem}{_DATA}{_PART}")
            content = stream.read()
            records = np.frombuffer(content[: len(content) // RECORD.itemsize * RECORD.itemsize], RECORD)
            with data.open("r+b") as entries:
                good = 0
                for record in records:
                    if record["slot"] != ELSEWHERE:
                        entries.seek(int(record["slot"]) * size)
                        if zlib.crc32(entries.read(size)) != record["checksum"]:
                            break
                    good += 1
                records = records[:good]
                entries.truncate(int((records["slot"].max(initial=ELSEWHERE)) + 1) * size)
            if good:
                _finish(stem, records)
            else:
                data.unlink()
                part.unlink()
            taken += good
    return taken


class CacheIndex:
    """What a folder holds, of files with their final names, when it is opened; 20 bytes of memory an entry.

    Raises:
        CacheError: a file is damaged, missing, or too short; the message names it.
    """

    def __init__(self, folder: Path, layout: EntryLayout) -> None:
        self.folder, self.layout = folder, layout
        self._files = sorted(folder.glob(f"*{_INDEX}"))
        counts = []
        for path in self._files:
            records = self._records(path)
            data, slots = path.with_suffix(_DATA), int(records["slot"].max(initial=ELSEWHERE)) + 1
            if not data.is_file():
                raise CacheError(f"{data} is missing, {path.name} refers to it: {_REMEDY}")
            if data.stat().st_size != slots * layout.dtype.itemsize:
                raise CacheError(
                    f"{data} has {data.stat().st_size} bytes, {path.name} refers to {slots} entries of "
                    f"{layout.dtype.itemsize}: it was truncated or changed; {_REMEDY}"
                )
            counts.append(int((records["slot"] != ELSEWHERE).sum()))
        total = sum(counts)
        self._keys, self._places = np.empty(total, "<u8"), np.empty(total, [("file", "<i4"), ("record", "<i8")])
        begin = 0
        for number, (path, count) in enumerate(zip(self._files, counts, strict=True)):
            records = self._records(path)
            kept = np.flatnonzero(records["slot"] != ELSEWHERE)
            part = slice(begin, begin + count)
            self._keys[part], self._places["file"][part] = records["key"][kept, 0], number
            self._places["record"][part] = kept
            begin += count
        order = np.argsort(self._keys, kind="stable")
        self._keys, self._places = self._keys[order], self._places[order]
        self._open = lru_cache(maxsize=_OPEN_FILES)(self._mapped)

    def __len__(self) -> int:
        return len(self._keys)

    def _records(self, path: Path) -> NDArray[Any]:
        records = path.stat().st_size - _FOOTER.itemsize
        if records < 0 or records % RECORD.itemsize:
            raise CacheError(f"{path} has {path.stat().st_size} bytes, which no index has: {_REMEDY}")
        content = np.memmap(path, mode="r")
        footer = np.frombuffer(content[records:].tobytes(), _FOOTER)[0]
        found: NDArray[Any] = content[:records].view(RECORD)
        if footer["mark"] != _MARK or footer["checksum"] != zlib.crc32(found.data):
            raise CacheError(f"{path} is damaged, its checksum is another one: {_REMEDY}")
        return found

    def _mapped(self, number: int) -> tuple[NDArray[Any], NDArray[Any]]:
        path = self._files[number]
        records = np.memmap(path, mode="r")[: -_FOOTER.itemsize].view(RECORD)
        return records, np.memmap(path.with_suffix(_DATA), self.layout.dtype, mode="r")

    def _find(self, key: bytes) -> tuple[int, Any] | None:
        """File and record of a key."""
        wanted = np.frombuffer(key, "<u8")
        place = int(np.searchsorted(self._keys, wanted[0]))
        while place < len(self._keys) and self._keys[place] == wanted[0]:
            number, row = (int(each) for each in self._places[place])
            record = self._open(number)[0][row]
            if record["key"][1] == wanted[1]:
                return number, record
            place += 1
        return None

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) is not None

    def read(self, key: bytes) -> NDArray[Any] | None:
        """A copy of an entry, or None where it is not there.

        Raises:
            CacheError: it is not what was written.
        """
        found = self._find(key)
        if found is None:
            return None
        number, record = found
        raw = self._open(number)[1][int(record["slot"])].tobytes()
        if zlib.crc32(raw) != record["checksum"]:
            raise CacheError(
                f"{self._files[number].with_suffix(_DATA)} is damaged: entry {record['slot']} is not what was written; "
                f"{_REMEDY}"
            )
        entry: NDArray[Any] = np.frombuffer(raw, self.layout.dtype)[0]
        return entry

    def samples(self, text: int) -> int:
        """Different samples of a text that are there."""
        found = [records["sample"][records["text"] == text] for records in map(self._records, self._files)]
        return len(np.unique(np.concatenate(found))) if found else 0


class CacheWriter:
    """Adds entries to a folder; what is there already is not written again.

    A sample of training waits for `commit`: its step may be run again, and then takes the place of the first try.
    """

    def __init__(self, folder: Path, index: CacheIndex) -> None:
        self.folder, self.index = folder, index
        self._own: set[bytes] = set()
        self._told: set[tuple[int, int]] = set()
        self._pending: dict[tuple[int, int], Any] = {}
        self._pair: tuple[Path, io.FileIO, io.FileIO] | None = None
        self._slots, self._records = 0, list[bytes]()

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Gives the files their names; what was not committed is left out after an error."""
        if kind is None:
            self.commit()
        self._finish_pair()

    def _streams(self) -> tuple[io.FileIO, io.FileIO]:
        if self._pair is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            stem = self.folder / f"{socket.gethostname()}-{os.getpid()}-{time.time_ns():x}"
            # Locked by its index: `recover` of another run leaves it.
            index = io.FileIO(f"{stem}{_INDEX}{_PART}", "x")
            _lock(index)
            self._pair = stem, io.FileIO(f"{stem}{_DATA}{_PART}", "x"), index
            self._slots, self._records = 0, []
        return self._pair[1], self._pair[2]

    def add(self, key: bytes, text: int, sample: int, entry: NDArray[Any], *, commit: bool) -> None:
        """Adds a sample.

        Args:
            key: 16 bytes.
            text: which text the sample is of.
            sample: its number there.
            entry: 0-dim, of the layout's dtype.
            commit: at once, rather than with the step.
        """
        place = text, sample
        if place in self._told:
            return
        before = self._pending.get(place)
        slot, checksum = ELSEWHERE, 0
        if key not in self.index and key not in self._own:
            raw = entry.tobytes()
            data, _ = self._streams()
            slot = int(before["slot"]) if before is not None and before["slot"] != ELSEWHERE else self._slots
            data.seek(slot * len(raw))
            data.write(raw)
            self._slots, checksum = max(self._slots, slot + 1), zlib.crc32(raw)
        self._pending[place] = np.array((np.frombuffer(key, "<u8"), text, sample, slot, checksum), RECORD)
        if commit:
            self._commit([place])

    def commit(self) -> None:
        """Tells of the entries that wait: their step is made."""
        self._commit(list(self._pending))

    def _commit(self, places: list[tuple[int, int]]) -> None:
        for place in places:
            record = self._pending.pop(place)
            _, index = self._streams()
            if record["slot"] != ELSEWHERE:
                self._own.add(record["key"].tobytes())
            self._told.add(place)
            self._records.append(record.tobytes())
            index.write(self._records[-1])
        if not self._pending and self._slots * self.index.layout.dtype.itemsize >= FILE_BYTES:
            self._finish_pair()

    def _finish_pair(self) -> None:
        if self._pair is None:
            return
        stem, data, index = self._pair
        records = np.frombuffer(b"".join(self._records), RECORD)
        data.truncate((int(records["slot"].max(initial=ELSEWHERE)) + 1) * self.index.layout.dtype.itemsize)
        os.fsync(data.fileno())
        data.close()
        if len(records):
            _finish(stem, records)
        else:
            for kind in (_DATA, _INDEX):
                Path(f"{stem}{kind}{_PART}").unlink()
        index.close()
        self._pair = None
