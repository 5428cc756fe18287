"""Text files to token data: a byte-level BPE tokenizer and megatron-core's `IndexedDataset`, the same bytes every time.

One document is one file, its tokens followed by the tokenizer's end-of-text token. Every output is written beside its
place and renamed into it, so an interrupted run leaves no half-written file.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_elastic.documents import Document, read_documents, split_documents, within
from megatron_elastic.errors import CorpusError

END_OF_TEXT = "<|endoftext|>"

_FORMAT = 1
_TRAINING_SAMPLE = 64_000_000  # bytes that a tokenizer is trained on at most: merges hardly move beyond it
_ENCODE_BATCH = 4_000_000  # bytes encoded at a time, which bounds memory on a large folder


@dataclass(frozen=True)
class DatasetSummary:
    """Counts of one data set; `tokens` includes one end-of-text token a file."""

    files: int
    bytes: int
    tokens: int


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> int:
    """Train a byte-level BPE tokenizer, save it to `folder`, and return its vocabulary size (smaller on little text).

    `transformers.AutoTokenizer` and Megatron's `--tokenizer-type HuggingFaceTokenizer` load the folder without a
    network; `<|endoftext|>`, token 0, is its end-of-text token.

    Raises:
        CorpusError: `vocab_size` cannot hold the 256 bytes and the end-of-text token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise CorpusError(f"vocabulary of {vocab_size}: a byte-level tokenizer needs 257 or more. Try 2048.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    saved = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
    saved.save_pretrained(folder)
    return len(saved)


def build_corpus(
    out: Path,
    text: Path | None = None,
    *,
    vocab_size: int = 2048,
    validation_fraction: float = 0.04,
    minimum_validation_tokens: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """Write `out/tokenizer`, `out/train.{bin,idx}`, `out/validation.{bin,idx}`, `out/corpus.json`; return the last one.

    A second call with the same text and settings reads `corpus.json` and does nothing else. `unigram_entropy` is that
    of the validation tokens under their own distribution, in nats.

    Args:
        out: the folder to write to.
        text: a text folder; None is the interpreter's own library.
        vocab_size: tokens in the tokenizer, 257 or more.
        validation_fraction: share of the bytes that is held out, by whole files.
        minimum_validation_tokens: fewer are an error.
        progress: show bars on standard error.

    Raises:
        CorpusError: the folder or a setting cannot be used; nothing is left half-written.
    """
    documents = read_documents(text)
    train, validation = split_documents(documents.files, validation_fraction)
    fingerprint = _fingerprint(train, validation, vocab_size)
    done = _finished(out, fingerprint)
    if done is not None:
        _require_validation(done, minimum_validation_tokens)
        return done
    existed = out.exists()
    work = out / ".building"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        done = _build(work, documents.skipped, train, validation, vocab_size, progress)
        _require_validation(done, minimum_validation_tokens)
        done["fingerprint"] = fingerprint
        _publish(work, out, done)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not existed and not any(out.iterdir()):
            out.rmdir()
    return done


def build_dataset(text: Path, tokenizer: Path, out: Path, *, progress: bool = False) -> DatasetSummary:
    """Encode every text file under `text` with an existing tokenizer into `out.bin` and `out.idx`.

    Raises:
        CorpusError: the folder is missing or holds no text, or the tokenizer cannot be loaded or names no eos_token.
    """
    documents = read_documents(text)
    encoder = _load_tokenizer(tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.building")
    try:
        counts = _write_dataset(temporary, documents.files, encoder, progress)
        for suffix in ("bin", "idx"):
            os.replace(f"{temporary}.{suffix}", f"{out}.{suffix}")
    finally:
        for suffix in ("bin", "idx"):
            Path(f"{temporary}.{suffix}").unlink(missing_ok=True)
    return DatasetSummary(files=len(documents.files), bytes=documents.size, tokens=sum(counts))


def unigram_entropy(counts: Sequence[int]) -> float:
    """Return the entropy of these counts, in nats: the best loss that a model without context can reach."""
    total = sum(counts)
    return -math.fsum(count / total * math.log(count / total) for count in counts if count)


def _fingerprint(train: Sequence[Document], validation: Sequence[Document], vocab_size: int) -> str:
    """Name everything that the written bytes depend on, the tokenizer library's version included."""
    from importlib.metadata import version

    parts = [
        [_FORMAT, vocab_size, version("tokenizers"), version("transformers")],
        [[os.fsencode(document.name).hex(), document.digest] for document in train],
        [[os.fsencode(document.name).hex(), document.digest] for document in validation],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _outputs(folder: Path) -> dict[str, int]:
    """Return name -> bytes of every file that a corpus is made of, save `corpus.json`."""
    files = [folder / f"{name}.{suffix}" for name in ("train", "validation") for suffix in ("bin", "idx")]
    files += sorted((folder / "tokenizer").glob("*"))
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files if path.is_file()}


def _finished(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return the summary of the corpus in `out` if it is the one asked for and whole, else None."""
    try:
        summary: Any = json.loads((out / "corpus.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(summary, dict) or summary.get("fingerprint") != fingerprint:
        return None
    return summary if summary.get("outputs") == _outputs(out) else None


def _publish(work: Path, out: Path, summary: dict[str, Any]) -> None:
    """Move finished outputs from `work` into `out`.

    The old summary goes first and the new one comes last, so that a mix of two corpora is never taken for a whole one.
    """
    summary["outputs"] = _outputs(work)
    (work / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    (out / "corpus.json").unlink(missing_ok=True)
    shutil.rmtree(out / "tokenizer", ignore_errors=True)
    names = [path.name for path in work.iterdir() if path.name != "corpus.json"]
    for name in [*sorted(names), "corpus.json"]:
        os.replace(work / name, out / name)


def _build(
    work: Path,
    skipped: int,
    train: Sequence[Document],
    validation: Sequence[Document],
    vocab_size: int,
    progress: bool,
) -> dict[str, Any]:
    """Train the tokenizer on the training files, encode both splits into `work`, and return the counts."""
    train_tokenizer(_sample(train), vocab_size, work / "tokenizer")
    encoder = _load_tokenizer(work / "tokenizer")
    splits: dict[str, dict[str, int]] = {}
    counts: list[int] = []
    for name, files in (("train", train), ("validation", validation)):
        counts = _write_dataset(work / name, files, encoder, progress)
        splits[name] = {"files": len(files), "bytes": sum(file.size for file in files), "tokens": sum(counts)}
    return {
        "schema": _FORMAT,
        **splits,
        "files_skipped": skipped,
        "vocab_size": len(encoder),
        "end_of_text": END_OF_TEXT,
        "unigram_entropy": unigram_entropy(counts),
    }


def _require_validation(summary: dict[str, Any], minimum: int) -> None:
    tokens = summary["validation"]["tokens"]
    if tokens < minimum:
        raise CorpusError(
            f"{tokens} validation tokens: {minimum} or more are needed. Give more text or a larger validation fraction."
        )


def _sample(files: Sequence[Document]) -> Iterator[str]:
    for document in within(files, _TRAINING_SAMPLE):
        yield document.text()


def _load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer from a folder, never from a hub.

    Raises:
        CorpusError: there is none in it, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise CorpusError(f"tokenizer folder {folder} does not exist. `megatron-elastic corpus --out DIR` makes one.")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    # The tokenizer library raises plain Exception for a damaged file.
    except Exception as error:
        raise CorpusError(
            f"tokenizer folder {folder} cannot be loaded by transformers.AutoTokenizer ({error}). Give a folder with "
            "tokenizer.json and tokenizer_config.json."
        ) from error
    if tokenizer.eos_token_id is None:
        raise CorpusError(f"tokenizer folder {folder} names no eos_token: documents could not be told apart. Add one.")
    return tokenizer


def _write_dataset(prefix: Path, files: Sequence[Document], tokenizer: Any, progress: bool) -> list[int]:
    """Encode files into `prefix.bin` and `prefix.idx` and return how often each token was written."""
    import numpy
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from tqdm import tqdm

    # Not len(): a vocabulary may have holes, and the largest token must fit.
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    dtype = DType.optimal_dtype(vocab_size)
    counts = numpy.zeros(vocab_size, dtype=numpy.int64)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    size = sum(document.size for document in files)
    label = f"encoding {prefix.name.strip('.').removesuffix('.building')}"
    with tqdm(total=size, desc=label, unit="B", unit_scale=True, disable=not progress) as bar:
        for batch in _batches(files):
            # Text that spells a special token stays text: the end-of-text token marks the ends of files only.
            rows = tokenizer(
                [document.text() for document in batch],
                add_special_tokens=False,
                return_attention_mask=False,
                split_special_tokens=True,
                verbose=False,
            )["input_ids"]
            for row in rows:
                tokens = numpy.array([*row, tokenizer.eos_token_id], dtype=dtype)
                counts += numpy.bincount(tokens, minlength=vocab_size)
                builder.add_document(tokens, [len(tokens)])
            bar.update(sum(document.size for document in batch))
    builder.finalize(f"{prefix}.idx")
    return [int(count) for count in counts]


def _batches(files: Sequence[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in files:
        batch.append(document)
        size += document.size
        if size >= _ENCODE_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
