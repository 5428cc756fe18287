"""`megatron-elastic export`: a checkpoint, or one budget of a family, in Hugging Face's format."""

import argparse
import re
import sys
from pathlib import Path

from megatron_elastic.cli import options
from megatron_elastic.cli.output import show

HELP = "write a checkpoint, or a budget of a family, in Hugging Face's format"
DESCRIPTION = """\
Write a model as a nemotron_h folder: safetensors, config.json, and the tokenizer that came with the
parent. It takes a parent, an extracted model, or with --budget one budget of a family, cut as it is
read. With --nested the folder holds the whole family: the parent's weights once, and slice.py, which
cuts any budget (`python slice.py --budget NAME --out DIR`). Where layers differ in size the model is
a nemotron_h_puzzle; which engines cannot load it is said. Tensor by tensor, without a GPU; the
checkpoint is verified first, and what was written is read back (unless --no-verify says otherwise);
stopped, it leaves nothing behind."""

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def _size(text: str) -> int:
    """A number of bytes, `5GB` for one; argparse reports anything else as bad usage."""
    found = re.fullmatch(r"(\d+)(KB|MB|GB)?", text.strip().upper())
    if found is None or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 5GB, 500MB, or a number of bytes")
    return int(found[1]) * _UNITS[found[2] or ""]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments on its own parser."""
    options.describe(parser, DESCRIPTION)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="what to export")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--budget", metavar="NAME", help="of a family: the budget to write")
    what.add_argument("--nested", action="store_true", help="of a family: all of it, with the script that cuts it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; new or empty")
    parser.add_argument(
        "--shard-size", type=_size, metavar="SIZE", default=5 * 10**9, help="the most that a file holds (default: 5GB)"
    )
    parser.add_argument(
        "--like",
        type=Path,
        metavar="DIR",
        help="Hugging Face folder to take tokenizer and config.json from (default: what came with the parent)",
    )
    options.no_verify(parser)
    options.as_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask for and return the exit status."""
    from megatron_elastic.hf.exporting import export_model

    made = export_model(
        arguments.checkpoint,
        arguments.out,
        budget=arguments.budget,
        nested=arguments.nested,
        shard_bytes=arguments.shard_size,
        like=arguments.like,
        verify=arguments.verify,
        progress=options.bars(),
    )
    for warning in made["warnings"]:
        print(f"megatron-elastic: warning: {warning}", file=sys.stderr)
    show(made, as_json=arguments.json)
    return 0
