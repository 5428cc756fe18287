"""`megatron-elastic corpus`: text files to a tokenizer and token data, or one data set more for a tokenizer."""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_elastic.cli.output import stdout_to_stderr
from megatron_elastic.errors import CorpusError

HELP = "make token data from text files (by default, those that come with this Python)"
DESCRIPTION = """\
Without --tokenizer: train a byte-level BPE tokenizer and write OUT/tokenizer, OUT/train.{bin,idx},
OUT/validation.{bin,idx} (whole files are held out) and OUT/corpus.json. Run again on the same text, it does nothing.
With --tokenizer: encode the text with that tokenizer and write OUT.bin and OUT.idx, one data set more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments on its own parser."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="folder of UTF-8 text files")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="existing tokenizer; needs --text")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or with --tokenizer the file prefix")
    parser.add_argument("--vocab-size", type=int, default=2048, metavar="N", help="tokens, 257 or more (default: 2048)")
    parser.add_argument(
        "--validation-fraction", type=float, default=0.04, metavar="X", help="bytes held out, a share (default: 0.04)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a sentence")


def _build(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The counts, and a sentence that says them."""
    from megatron_elastic.corpus import build_corpus, build_dataset

    progress = sys.stderr.isatty() and not os.environ.get("CI")
    if arguments.tokenizer is None:
        summary = build_corpus(
            arguments.out,
            arguments.text,
            vocab_size=arguments.vocab_size,
            validation_fraction=arguments.validation_fraction,
            progress=progress,
        )
        sentence = (
            f"{arguments.out}: {summary['train']['tokens']:,} training tokens, "
            f"{summary['validation']['tokens']:,} validation tokens, "
            f"vocabulary {summary['vocab_size']}, unigram entropy {summary['unigram_entropy']:.3f} nats"
        )
    else:
        if arguments.text is None:
            raise CorpusError("--tokenizer without --text: one data set more needs a folder of text files. Add --text.")
        dataset = build_dataset(arguments.text, arguments.tokenizer, arguments.out, progress=progress)
        summary = dataclasses.asdict(dataset)
        sentence = f"{arguments.out}.bin: {dataset.tokens:,} tokens of {dataset.files} files"
    return summary, sentence


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask for, print the counts, and return the exit status.

    Raises:
        CorpusError: the text, the tokenizer or a setting cannot be used.
    """
    with stdout_to_stderr():
        summary, sentence = _build(arguments)
    print(json.dumps(summary) if arguments.json else sentence)
    return 0
