"""Files of a teacher cache: what is written is read, by whomever; what is damaged, missing or torn is told."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_elastic.curriculum import TeacherCache
from megatron_elastic.distillation import cache_files
from megatron_elastic.distillation.cache_files import RECORD, CacheIndex, CacheWriter, EntryLayout, recover
from megatron_elastic.errors import CacheError

LAYOUT = EntryLayout(tokens=5, top_k=3, precision="fp16")
TEXT = 2**63 + 7


def key_of(number: int) -> bytes:
    return hashlib.blake2b(bytes([number]), digest_size=16).digest()


def entry_of(number: int, layout: EntryLayout = LAYOUT) -> np.ndarray[Any, Any]:
    draw = np.random.default_rng(number)
    entry = np.empty((), layout.dtype)
    entry["ids"] = draw.integers(0, 2**31 - 1, entry["ids"].shape)
    entry["log_probs"] = -draw.random(entry["log_probs"].shape)
    entry["ghost"] = -draw.random(entry["ghost"].shape)
    return entry


def writer(folder: Path) -> CacheWriter:
    folder.mkdir(exist_ok=True)
    return CacheWriter(folder, CacheIndex(folder, LAYOUT))


def write(folder: Path, *numbers: int, text: int = TEXT) -> None:
    with writer(folder) as opened:
        for number in numbers:
            opened.add(key_of(number), text, number, entry_of(number), commit=True)


def read(folder: Path, number: int) -> Any:
    return CacheIndex(folder, LAYOUT).read(key_of(number))


def same(found: Any, number: int) -> bool:
    return found is not None and found.tobytes() == entry_of(number).tobytes()


def test_several_writers_one_reader(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    with writer(tmp_path) as one, writer(tmp_path) as other:
        for number, opened in ((3, one), (4, other), (5, one)):
            opened.add(key_of(number), TEXT, number, entry_of(number), commit=False)
    index = CacheIndex(tmp_path, LAYOUT)
    assert len(index) == 5
    assert all(same(index.read(key_of(number)), number) for number in range(1, 6))
    assert not same(index.read(key_of(1)), 2)
    assert index.read(key_of(6)) is None
    assert key_of(6) not in index
    assert index.samples(TEXT) == 5
    assert index.samples(TEXT + 1) == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".data", ".index"}


def test_an_entry_is_written_once_and_its_samples_are_counted(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with writer(tmp_path) as opened:
        opened.add(key_of(1), TEXT, 1, entry_of(9), commit=True)  # the same sample again, with other sums
        opened.add(key_of(2), TEXT, 3, entry_of(2), commit=True)  # the same tokens as another sample
        for number in (4, 4):
            opened.add(key_of(number), TEXT, number, entry_of(number), commit=True)
    assert all(path.read_bytes() == content for path, content in before.items())
    index = CacheIndex(tmp_path, LAYOUT)
    assert (len(index), index.samples(TEXT)) == (3, 4)
    assert same(index.read(key_of(1)), 1)
    added = [path for path in tmp_path.glob("*.data") if path not in before]
    assert [path.stat().st_size for path in added] == [LAYOUT.dtype.itemsize]


def test_a_step_that_is_run_again_takes_the_place_of_its_first_try(tmp_path: Path) -> None:
    with writer(tmp_path) as opened:
        opened.add(key_of(1), TEXT, 1, entry_of(9), commit=False)
        opened.add(key_of(2), TEXT, 2, entry_of(2), commit=False)
        opened.add(key_of(1), TEXT, 1, entry_of(1), commit=False)
        opened.commit()
    assert same(read(tmp_path, 1), 1)
    assert same(read(tmp_path, 2), 2)
    assert len(CacheIndex(tmp_path, LAYOUT)) == 2


def test_what_was_not_committed_is_left_out_after_an_error(tmp_path: Path) -> None:
    opened = writer(tmp_path)
    opened.add(key_of(1), TEXT, 1, entry_of(1), commit=False)
    opened.commit()
    opened.add(key_of(2), TEXT, 2, entry_of(2), commit=False)
    opened.add(key_of(3), TEXT, 3, entry_of(3), commit=True)
    opened.__exit__(KeyError, KeyError(), None)
    index = CacheIndex(tmp_path, LAYOUT)
    assert [key_of(number) in index for number in (1, 2, 3)] == [True, False, True]
    assert same(index.read(key_of(3)), 3)
    opened = writer(tmp_path / "empty")
    opened.add(key_of(1), TEXT, 1, entry_of(1), commit=False)
    opened.__exit__(KeyError, KeyError(), None)
    assert list((tmp_path / "empty").iterdir()) == []


def test_full_files_are_followed_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_files, "FILE_BYTES", 2 * LAYOUT.dtype.itemsize)
    write(tmp_path, *range(7))
    assert len(list(tmp_path.glob("*.data"))) == 4
    assert all(same(read(tmp_path, number), number) for number in range(7))


KILLED = """
import os, sys
from pathlib import Path
from tests.unit.test_cache_files import TEXT, entry_of, key_of, writer
opened = writer(Path(sys.argv[1]))
for number in (1, 2):
    opened.add(key_of(number), TEXT, number, entry_of(number), commit=True)
opened.add(key_of(3), TEXT, 3, entry_of(3), commit=False)
os._exit(9)
"""


def test_what_a_killed_writer_left_is_taken_over(tmp_path: Path) -> None:
    left = tmp_path / "left"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(left)], check=False)
    assert killed.returncode == 9
    parts = {path.name: path.read_bytes() for path in left.iterdir()}
    assert {name.rpartition(".")[2] for name in parts} == {"part"}
    index = next(name for name in parts if ".index" in name)
    data = next(name for name in parts if ".data" in name)
    torn = {
        "as it is": (parts, 2),
        "a record in part": ({**parts, index: parts[index][:-3]}, 1),
        "an entry in part": ({**parts, data: parts[data][: LAYOUT.dtype.itemsize + 5]}, 1),
        "an entry that is other bytes": ({**parts, data: b"?" + parts[data][1:]}, 0),
        "between two names": ({data.removesuffix(".part"): parts[data], index: parts[index] + b"12345678"}, 2),
    }
    for case, (files, good) in torn.items():
        folder = tmp_path / case
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        assert len(CacheIndex(folder, LAYOUT)) == 0
        assert recover(folder, LAYOUT) == good, case
        assert [same(read(folder, number), number) for number in (1, 2, 3)] == [good > 0, good > 1, False], case
        assert recover(folder, LAYOUT) == 0
        assert not list(folder.glob("*.part"))


def test_the_part_of_a_living_writer_stays(tmp_path: Path) -> None:
    with writer(tmp_path) as opened:
        opened.add(key_of(1), TEXT, 1, entry_of(1), commit=True)
        assert recover(tmp_path, LAYOUT) == 0
        assert len(CacheIndex(tmp_path, LAYOUT)) == 0
    assert same(read(tmp_path, 1), 1)


def damaged(folder: Path, suffix: str, change: Any) -> Path:
    write(folder, 1, 2)
    path = next(folder.glob(f"*{suffix}"))
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content))
    return path


def flipped(content: bytearray) -> bytearray:
    content[LAYOUT.dtype.itemsize // 2 if len(content) > 200 else RECORD.itemsize + 2] ^= 4
    return content


@pytest.mark.parametrize(
    ("suffix", "change", "text"),
    [
        (".data", lambda content: content[:-1], "was truncated or changed"),
        (".data", lambda content: content + b"x", "was truncated or changed"),
        (".data", flipped, "entry 0 is not what was written"),
        (".index", lambda content: content[:-1], "which no index has"),
        (".index", lambda content: content[: RECORD.itemsize] + content[-8:], "its checksum is another one"),
        (".index", flipped, "its checksum is another one"),
        (".index", lambda content: b"", "which no index has"),
    ],
)
def test_damage_is_told_with_the_files_name(tmp_path: Path, suffix: str, change: Any, text: str) -> None:
    path = damaged(tmp_path, suffix, change)
    with pytest.raises(CacheError, match=text) as told:
        read(tmp_path, 1)
    assert path.name in str(told.value)
    assert "mode: write" in str(told.value)


def test_a_missing_data_file_is_told(tmp_path: Path) -> None:
    write(tmp_path, 1)
    next(tmp_path.glob("*.data")).unlink()
    with pytest.raises(CacheError, match=r"\.data is missing"):
        CacheIndex(tmp_path, LAYOUT)


def test_another_size_of_entries_is_told(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(CacheError, match="refers to 1 entries of 180"):
        CacheIndex(tmp_path, LAYOUT._replace(precision="fp32", top_k=4))


def test_what_an_entry_takes() -> None:
    for precision in ("fp16", "fp32"):
        settings = TeacherCache(folder="cache", top_k=9, precision=precision)
        assert EntryLayout(128, 9, precision).dtype.itemsize == 128 * settings.bytes_per_token
    assert LAYOUT.dtype.itemsize == 5 * (3 * (4 + 2) + 4)
    assert EntryLayout(8192, 64, "fp32").dtype.itemsize == 8192 * (64 * 8 + 4)
