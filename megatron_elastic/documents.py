"""Text files of a folder, or of the interpreter's own library: found, read and split, always in the same order."""

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_elastic.errors import CorpusError

DEFAULT_LIMIT = 12_000_000
"""Bytes taken from the interpreter's own library: enough for minutes of training, encoded in seconds."""

# Fixtures are no text that anybody would read; installed packages differ between machines with the same interpreter.
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})
_LIBRARY_SUFFIXES = frozenset({".py", ".pyi", ".txt", ".rst", ".md", ".html", ".css", ".def", ".ps1", ".c"})


@dataclass(frozen=True)
class Document:
    """One text file: `name` is its path inside the folder, with `/`; `size` in bytes; `digest` of its content."""

    name: str
    path: Path
    size: int
    digest: str

    def text(self) -> str:
        """Return the file's text, line ends untouched."""
        return self.path.read_bytes().decode("utf-8")


@dataclass(frozen=True)
class Documents:
    """What a folder holds: its text files by ascending name, and how many files were no UTF-8 text."""

    files: tuple[Document, ...]
    skipped: int

    @property
    def size(self) -> int:
        """Return the number of bytes in all files."""
        return sum(document.size for document in self.files)


def find_documents(folder: Path | None = None) -> list[Path]:
    """List the candidate files under `folder`, or the interpreter's own library where it is None, by ascending name.

    A folder given by the user is taken whole, save hidden files. From the interpreter's library come sources and
    documentation: no test fixtures, no installed packages.

    Raises:
        CorpusError: the folder is missing or is no folder.
    """
    root = _root(folder)
    own = folder is None
    found: list[tuple[str, Path]] = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and not (own and name in _SKIPPED_FOLDERS)]
        for name in names:
            path = Path(parent, name)
            if name.startswith(".") or (own and path.suffix not in _LIBRARY_SUFFIXES) or not path.is_file():
                continue
            found.append((path.relative_to(root).as_posix(), path))
    return [path for _, path in sorted(found)]


def read_documents(folder: Path | None = None, *, limit: int | None = None) -> Documents:
    """Read every candidate file once: keep UTF-8 text, count what is binary, empty or undecodable.

    Args:
        folder: a text folder; None is the interpreter's own library.
        limit: bytes kept at most, chosen by name's hash so that no folder is favoured. None: no limit for a folder,
            `DEFAULT_LIMIT` for the library.

    Raises:
        CorpusError: the folder is missing or holds no text.
    """
    root = _root(folder)
    limit = DEFAULT_LIMIT if limit is None and folder is None else limit
    kept: list[Document] = []
    skipped = 0
    for path in find_documents(folder):
        content = path.read_bytes()
        if _is_text(content):
            name = path.relative_to(root).as_posix()
            kept.append(Document(name, path, len(content), hashlib.sha256(content).hexdigest()))
        else:
            skipped += 1
    if limit is not None:
        kept = within(kept, limit)
    if not kept:
        raise CorpusError(
            f"{root}: no UTF-8 text file in it ({skipped} binary, empty or undecodable). Give a folder with text files."
        )
    return Documents(tuple(kept), skipped)


def split_documents(files: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Split files into (train, validation): in the order of their names' hashes, files go to validation while they fit.

    Whole files only, so validation never sees half of a trained file; `fraction` is of the bytes. A content that occurs
    twice is kept once, or the same text could stand on both sides.

    Raises:
        CorpusError: `fraction` is not between 0 and 1, or there are fewer than two different files.
    """
    if not 0.0 < fraction < 1.0:
        raise CorpusError(f"validation fraction {fraction}: it must be between 0 and 1, both excluded. 0.04 is usual.")
    distinct = list({document.digest: document for document in reversed(files)}.values())
    if len(distinct) < 2:
        raise CorpusError(f"{len(distinct)} different text file(s): a split by file needs 2 or more. Add files.")
    target = fraction * sum(document.size for document in distinct)
    validation: set[str] = set()
    taken = 0
    for document in sorted(distinct, key=_hash_order):
        if taken + document.size <= target:
            validation.add(document.name)
            taken += document.size
    if not validation:
        validation.add(min(distinct, key=lambda document: (document.size, document.name)).name)
    ordered = sorted(distinct, key=lambda document: document.name)
    return (
        [document for document in ordered if document.name not in validation],
        [document for document in ordered if document.name in validation],
    )


def within(files: Sequence[Document], limit: int) -> list[Document]:
    """Keep the files that fit into `limit` bytes, taken in the order of their names' hashes; return them by name."""
    kept: list[Document] = []
    size = 0
    for document in sorted(files, key=_hash_order):
        if size + document.size <= limit:
            kept.append(document)
            size += document.size
    return sorted(kept, key=lambda document: document.name)


def _root(folder: Path | None) -> Path:
    if folder is None:
        return Path(sysconfig.get_path("stdlib"))
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.exists() else "does not exist"
        raise CorpusError(f"text folder {folder} {kind}. Give a folder with UTF-8 text files.")
    return folder


def _is_text(content: bytes) -> bool:
    if not content.strip() or b"\0" in content:
        return False
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _hash_order(document: Document) -> str:
    return hashlib.sha256(document.name.encode("utf-8", "surrogateescape")).hexdigest()
