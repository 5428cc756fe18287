"""Whether a checkpoint is whole: every file that it needs is there, and has the bytes that were saved.

The manifest is Megatron's own (`--verify-integrity`): the SHA-256 of every file, written after everything else. A
checkpoint without one was saved with that flag off; of it only the sizes can be checked.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megatron_elastic.checkpoint.names import INDEX, MANIFEST
from megatron_elastic.checkpoint.reading import find_checkpoint, index
from megatron_elastic.errors import CheckpointError

_ALGORITHM = "sha256"
_THREADS = 4
_CHUNK = 1 << 20

_whole: dict[Path, tuple[tuple[str, int, int], ...]] = {}
"""Checkpoints that this process found whole -> name, size and time of change of their files then."""


def write_atomically(file: Path, text: str) -> None:
    """Writes a small file so that it is there whole, the old one or the new one, whatever stops this process."""
    new = file.with_name(f"{file.name}.tmp")
    with new.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)


def write_manifest(path: Path, digests: Mapping[str, str]) -> None:
    """Writes the manifest that Megatron's `verify_integrity` reads.

    Args:
        path: folder of the iteration.
        digests: file name -> SHA-256 in hexadecimal digits.
    """
    write_atomically(path / MANIFEST, json.dumps({"algorithm": _ALGORITHM, "files": dict(digests)}, indent=2))


def _read_manifest(path: Path) -> dict[str, str] | None:
    """File name -> digest; None where the checkpoint was saved without a manifest."""
    file = path / MANIFEST
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_bytes())
        algorithm, digests = found["algorithm"], found["files"]
        pairs = {str(name): str(digest) for name, digest in digests.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}): copy the checkpoint again") from error
    if algorithm != _ALGORITHM:
        raise CheckpointError(f"{file}: algorithm {algorithm!r}, this version knows {_ALGORITHM}")
    return pairs


@contextmanager
def _bar(label: str | None, size: int) -> Iterator[object]:
    """A progress bar in bytes, which needs a package that reading alone does not."""
    if label is None:
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=size, desc=label, unit="B", unit_scale=True) as bar:
        yield bar


def file_digests(path: Path, names: list[str], label: str | None) -> dict[str, str]:
    """SHA-256 of each file of a folder; `label` is that of a progress bar, None for no bar."""
    with _bar(label, sum((path / name).stat().st_size for name in names)) as bar:

        def digest(name: str) -> str:
            found, chunk = hashlib.sha256(), memoryview(bytearray(_CHUNK))
            with (path / name).open("rb", buffering=0) as stream:
                while count := stream.readinto(chunk):
                    found.update(chunk[:count])
                    if bar is not None:
                        bar.update(count)  # type: ignore[attr-defined]
            return found.hexdigest()

        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(zip(names, pool.map(digest, names), strict=True))


def _check_digests(path: Path, wanted: Mapping[str, str], progress: bool = False) -> None:
    for name in wanted:
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing, {MANIFEST} lists it: copy the checkpoint again")
    found = file_digests(path, list(wanted), f"checking {path.name}" if progress else None)
    wrong = [name for name in wanted if found[name] != wanted[name]]
    if wrong:
        more = f" ({len(wrong) - 1} more files too)" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{path / wrong[0]} is damaged{more}: its SHA-256 is {found[wrong[0]][:12]}..., {MANIFEST} says "
            f"{wanted[wrong[0]][:12]}...: copy the checkpoint again"
        )


def _needed(path: Path) -> dict[str, int]:
    """File name -> bytes that the index refers to."""
    found: dict[str, int] = {}
    for place in index(path).storage_data.values():
        end = place.offset + place.length
        found[place.relative_path] = max(end, found.get(place.relative_path, 0))
    return found


def _state(path: Path) -> tuple[tuple[str, int, int], ...]:
    files = ((each.name, each.stat()) for each in path.iterdir() if each.is_file())
    return tuple(sorted((name, status.st_size, status.st_mtime_ns) for name, status in files))


def digests_of(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint: what its manifest says, or, without one, of the files as they are.

    Args:
        path: folder of the iteration.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    found = _read_manifest(path)
    return found or file_digests(path, sorted(each.name for each in path.iterdir() if each.is_file()), None)


def has_manifest(path: Path) -> bool:
    """Whether a checkpoint was saved with Megatron's `--verify-integrity`."""
    return (path / MANIFEST).exists()


def verify(path: Path, *, progress: bool = False, digests: bool = True) -> None:
    """Refuses a checkpoint that is not whole; what this process has checked already is not read again.

    Args:
        path: folder of the iteration.
        progress: whether to show a bar.
        digests: whether to compare the bytes, where there is a manifest, and not the sizes alone.

    Raises:
        CheckpointError: a file is missing, too short, changed, or not listed; the message names it.
    """
    manifest = _read_manifest(path) if digests else None
    state = _state(path)
    if _whole.get(path) == state:
        return
    if manifest is not None:
        if INDEX not in manifest:
            raise CheckpointError(f"{path / MANIFEST} does not list {INDEX}: copy the checkpoint again")
        # First what says which files there are: nothing in it may be believed before.
        _check_digests(path, {INDEX: manifest[INDEX]})
    for name, size in _needed(path).items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, {INDEX} refers to it: copy the checkpoint again")
        if file.stat().st_size < size:
            raise CheckpointError(
                f"{file} is truncated: {file.stat().st_size} bytes, {INDEX} refers to {size}: copy the checkpoint again"
            )
        if manifest is not None and name not in manifest:
            raise CheckpointError(f"{file} is not listed in {MANIFEST}, and {INDEX} refers to it: it was added later")
    if manifest is not None:
        _check_digests(path, {name: digest for name, digest in manifest.items() if name != INDEX}, progress)
        _whole[path] = state


def add_manifest(path: Path, *, progress: bool = False) -> None:
    """Writes the manifest of a checkpoint that was saved without one, as it is now."""
    verify(path)
    names = sorted(each.name for each in path.iterdir() if each.is_file())
    write_manifest(path, file_digests(path, names, f"checking {path.name}" if progress else None))


def find_verified(directory: str | Path, *, progress: bool = False, digests: bool = True) -> Path:
    """`find_checkpoint`, and `verify` of what it finds.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    path = find_checkpoint(directory)
    verify(path, progress=progress, digests=digests)
    return path
