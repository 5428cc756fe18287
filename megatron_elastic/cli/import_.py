"""`megatron-elastic import`: a Hugging Face model as a Megatron checkpoint."""

import argparse
from pathlib import Path

from megatron_elastic.cli import options
from megatron_elastic.cli.output import show

HELP = "make a Megatron checkpoint of a nemotron_h model in Hugging Face's format"
DESCRIPTION = """\
Write a nemotron_h model (Nemotron-H, Nemotron Nano: Mamba-2, attention, MLP and MoE layers) as a
torch_dist checkpoint: the parent that `rank`, `sort` and `evaluate` start from. Bit for bit, tensor
by tensor, without a GPU. The folder is only read, and code that lies in it is never run. Tokenizer
and config.json travel with the checkpoint, for `export`. What was written is read back; stopped, it
leaves nothing behind."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments on its own parser."""
    options.describe(parser, DESCRIPTION)
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="folder with config.json and safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; new or empty")
    options.as_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask for and return the exit status."""
    from megatron_elastic.hf.importing import import_model

    made = import_model(arguments.hf, arguments.out, progress=options.bars())
    show(made, as_json=arguments.json)
    return 0
