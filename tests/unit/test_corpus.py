"""Text to token data: the same bytes every time, nothing lost on the way, nothing left half-done."""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from megatron_elastic import corpus
from megatron_elastic.cli import corpus as command
from megatron_elastic.corpus import END_OF_TEXT, build_corpus, build_dataset, train_tokenizer, unigram_entropy
from megatron_elastic.documents import read_documents, split_documents
from megatron_elastic.errors import CorpusError

WORDS = ["the", "hidden", "state", "of", "a", "layer", "is", "kept", "as", "prefix", "every", "block", "and", "head"]


def write_text(folder: Path, files: int = 24, seed: int = 0) -> Path:
    generator = numpy.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        words = generator.choice(WORDS, size=60 + 5 * index)
        (folder / f"{index:02}.txt").write_text(f"naïve {index}\n    " + " ".join(words) + "\n", "utf-8")
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def built(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    build_corpus(out, text, vocab_size=300, validation_fraction=0.2)
    return out


def read_dataset(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [[int(token) for token in dataset[index]] for index in range(len(dataset))]


def test_the_same_text_gives_the_same_bytes(text: Path, built: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from megatron_elastic.corpus import build_corpus;"
        "build_corpus(Path(sys.argv[1]), Path(sys.argv[2]), vocab_size=300, validation_fraction=0.2)"
    )
    # Another process with another hash seed and number of threads: nothing may come from their order.
    environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3", "TOKENIZERS_PARALLELISM": "true"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(text)], check=True, env=environment)
    assert digests(tmp_path) == digests(built)
    assert sorted(digests(built)) == [
        "corpus.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "train.bin",
        "train.idx",
        "validation.bin",
        "validation.idx",
    ]


def test_other_text_gives_other_bytes(built: Path, tmp_path: Path) -> None:
    build_corpus(tmp_path / "out", write_text(tmp_path / "text", seed=1), vocab_size=300, validation_fraction=0.2)
    before, after = digests(built), digests(tmp_path / "out")
    assert all(before[name] != after[name] for name in ("corpus.json", "train.bin", "validation.bin"))


def test_every_document_decodes_to_its_file(text: Path, built: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(built / "tokenizer"), local_files_only=True)
    splits = split_documents(read_documents(text).files, 0.2)
    assert all(splits)
    for name, files in zip(("train", "validation"), splits, strict=True):
        documents = read_dataset(built / name)
        assert all(tokens[-1] == tokenizer.eos_token_id for tokens in documents)
        assert [tokenizer.decode(tokens[:-1]) for tokens in documents] == [file.text() for file in files]


def test_the_summary_counts_what_is_on_disk(built: Path) -> None:
    summary = json.loads((built / "corpus.json").read_text())
    for name in ("train", "validation"):
        documents = read_dataset(built / name)
        assert summary[name]["files"] == len(documents)
        assert summary[name]["tokens"] == sum(map(len, documents))
        assert (built / f"{name}.bin").stat().st_size == 2 * summary[name]["tokens"]  # uint16
    counts = numpy.unique(numpy.concatenate(read_dataset(built / "validation")), return_counts=True)[1]
    share = counts / counts.sum()
    # 1e-12: both sum a few hundred fp64 terms below 1, in different orders.
    assert math.isclose(summary["unigram_entropy"], float(-(share * numpy.log(share)).sum()), rel_tol=1e-12)
    assert summary["vocab_size"] == 300


def test_entropy_is_in_nats() -> None:
    assert math.isclose(unigram_entropy([5, 0, 5]), math.log(2))
    assert unigram_entropy([7]) == 0.0


def test_megatron_reads_the_tokenizer(built: Path) -> None:
    from megatron.core.tokenizers import MegatronTokenizer

    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(built / "tokenizer"), metadata_path={"library": "huggingface"}
    )
    assert tokenizer.vocab_size == 300
    assert tokenizer.eod == 0
    tokens = tokenizer.tokenize("naïve\n    the block")
    assert 0 not in tokens
    assert tokenizer.detokenize(tokens) == "naïve\n    the block"


def test_a_second_run_writes_nothing(text: Path, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}

    def refuse(*arguments: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(corpus, "_build", refuse)
    build_corpus(built, text, vocab_size=300, validation_fraction=0.2)
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before
    with pytest.raises(AssertionError, match="built again"):
        build_corpus(built, text, vocab_size=301, validation_fraction=0.2)


def test_a_damaged_corpus_is_built_again(text: Path, tmp_path: Path) -> None:
    build_corpus(tmp_path, text, vocab_size=280, validation_fraction=0.2)
    before = digests(tmp_path)
    (tmp_path / "train.bin").write_bytes(b"short")
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    build_corpus(tmp_path, text, vocab_size=280, validation_fraction=0.2)
    assert digests(tmp_path) == before


def test_an_interrupted_run_leaves_the_old_corpus(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_corpus(tmp_path, text, vocab_size=280, validation_fraction=0.2)
    before = digests(tmp_path)

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "_write_dataset", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(tmp_path, text, vocab_size=290, validation_fraction=0.2)
    assert digests(tmp_path) == before


def test_text_that_spells_the_end_of_text_stays_text(built: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(f"one {END_OF_TEXT} two")
    summary = build_dataset(tmp_path / "text", built / "tokenizer", tmp_path / "deep" / "more")
    (tokens,) = read_dataset(tmp_path / "deep" / "more")
    assert tokens.count(0) == 1
    assert tokens[-1] == 0
    assert summary.tokens == len(tokens)
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["more.bin", "more.idx"]


def test_large_vocabularies_take_wider_tokens(tmp_path: Path, text: Path) -> None:
    from transformers import AutoTokenizer

    train_tokenizer(["a b"], 257, tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"))
    tokenizer.add_tokens([f"<unused{index}>" for index in range(65_500)])
    tokenizer.save_pretrained(tmp_path / "wide")
    narrow = build_dataset(text, tmp_path / "tokenizer", tmp_path / "narrow")
    wide = build_dataset(text, tmp_path / "wide", tmp_path / "wide_data")
    assert narrow.tokens == wide.tokens
    assert (tmp_path / "narrow.bin").stat().st_size == 2 * narrow.tokens
    assert (tmp_path / "wide_data.bin").stat().st_size == 4 * wide.tokens
    assert read_dataset(tmp_path / "narrow") == read_dataset(tmp_path / "wide_data")


def test_bad_settings_leave_nothing(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CorpusError, match="does not exist"):
        build_corpus(out, tmp_path / "nowhere")
    with pytest.raises(CorpusError, match="between 0 and 1"):
        build_corpus(out, text, validation_fraction=2.0)
    with pytest.raises(CorpusError, match="257 or more"):
        build_corpus(out, text, vocab_size=256, validation_fraction=0.2)
    assert not out.exists()
    with pytest.raises(CorpusError, match=r"\d+ validation tokens: 50000 or more"):
        build_corpus(out, text, vocab_size=280, validation_fraction=0.2, minimum_validation_tokens=50_000)
    assert not out.exists()


def test_an_unusable_tokenizer_is_named(text: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="does not exist"):
        build_dataset(text, tmp_path / "nowhere", tmp_path / "data")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="cannot be loaded"):
        build_dataset(text, tmp_path / "empty", tmp_path / "data")
    train_tokenizer(["a b"], 257, tmp_path / "tokenizer")
    settings = tmp_path / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": None}))
    with pytest.raises(CorpusError, match="names no eos_token"):
        build_dataset(text, tmp_path / "tokenizer", tmp_path / "data")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(CorpusError, match="cannot be loaded"):
        build_dataset(text, tmp_path / "tokenizer", tmp_path / "data")
    assert not list(tmp_path.glob("*data*"))


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def test_the_command_builds_and_adds(
    text: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ["--text", str(text), "--json"]
    command.run(parse("--out", str(built), "--vocab-size", "300", "--validation-fraction", "0.2", *shared))
    assert json.loads(capsys.readouterr().out)["validation"]["tokens"] > 0
    command.run(parse("--out", str(tmp_path / "more"), "--tokenizer", str(built / "tokenizer"), *shared))
    assert json.loads(capsys.readouterr().out)["tokens"] == sum(map(len, read_dataset(tmp_path / "more")))
    with pytest.raises(CorpusError, match="Add --text"):
        command.run(parse("--out", str(tmp_path / "other"), "--tokenizer", str(built / "tokenizer")))
