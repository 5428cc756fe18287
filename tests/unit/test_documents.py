"""Which files are text, in which order, and on which side of the split."""

from pathlib import Path

import pytest

from megatron_elastic.documents import DEFAULT_LIMIT, Document, find_documents, read_documents, split_documents, within
from megatron_elastic.errors import CorpusError


def names(paths: list[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def document(name: str, size: int) -> Document:
    return Document(name=name, path=Path(name), size=size, digest=name)


def test_a_folder_is_taken_whole_but_for_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.md", "tests/d.py", ".git/config", "a/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    assert names(find_documents(tmp_path), tmp_path) == ["a/c.md", "b.txt", "tests/d.py"]


def test_files_that_are_no_text_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("naïve\r\nline", "utf-8", newline="")
    (tmp_path / "binary").write_bytes(b"ab\0cd")
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "empty").write_bytes(b" \n")
    documents = read_documents(tmp_path)
    assert [file.name for file in documents.files] == ["text"]
    assert documents.skipped == 3
    assert documents.files[0].text() == "naïve\r\nline"
    assert documents.size == 12  # bytes: ï takes two


def test_the_library_is_real_text_without_fixtures() -> None:
    documents = read_documents()
    assert 4_000_000 < documents.size <= DEFAULT_LIMIT
    folders = {part for file in documents.files for part in Path(file.name).parts[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert any(file.name.startswith("json/") for file in documents.files)


def test_a_limit_keeps_what_fits(tmp_path: Path) -> None:
    files = [document(f"{index:02}", 10) for index in range(20)]
    kept = within(files, 55)
    assert len(kept) == 5
    assert kept == sorted(kept, key=lambda file: file.name)
    assert kept == within(list(reversed(files)), 55)
    assert [file.name for file in kept] != [f"{index:02}" for index in range(5)]


def test_the_split_is_by_file_and_never_larger_than_asked() -> None:
    files = [document(f"{index:03}", 1 + index % 7) for index in range(200)]
    train, validation = split_documents(files, 0.1)
    assert not {file.name for file in train} & {file.name for file in validation}
    assert sorted([*train, *validation], key=lambda file: file.name) == files
    share = sum(file.size for file in validation) / sum(file.size for file in files)
    assert 0.09 < share <= 0.1
    assert split_documents(list(reversed(files)), 0.1) == (train, validation)
    assert split_documents(files, 0.2)[1] != validation


def test_the_same_content_never_stands_on_both_sides() -> None:
    files = [Document(f"{index}", Path(f"{index}"), 10, digest=str(index % 5)) for index in range(50)]
    train, validation = split_documents(files, 0.4)
    assert not {file.digest for file in train} & {file.digest for file in validation}
    assert len(train) + len(validation) == 5


def test_a_file_larger_than_the_share_leaves_the_smallest_for_validation() -> None:
    train, validation = split_documents([document("large", 1000), document("small", 900)], 0.05)
    assert [file.name for file in validation] == ["small"]
    assert [file.name for file in train] == ["large"]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(CorpusError, match="between 0 and 1"):
        split_documents([document("a", 1), document("b", 1)], fraction)


def test_one_file_cannot_be_split() -> None:
    with pytest.raises(CorpusError, match="needs 2 or more"):
        split_documents([document("a", 1)], 0.5)


def test_a_missing_folder_a_file_and_an_empty_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="does not exist"):
        read_documents(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"\0")
    with pytest.raises(CorpusError, match="is a file"):
        read_documents(tmp_path / "file")
    with pytest.raises(CorpusError, match="no UTF-8 text file in it"):
        read_documents(tmp_path)
