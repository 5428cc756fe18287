"""`megatron-elastic extract`: one budget as a standalone checkpoint."""

import argparse
from pathlib import Path

from megatron_elastic.cli import options
from megatron_elastic.cli.output import show

HELP = "cut one budget out of a family into a standalone checkpoint"
DESCRIPTION = """\
Write the submodel of one budget as a checkpoint of its own, of the submodel's own sizes, which
stock Megatron-Core loads. Nothing is trained: it computes what the budget computes inside the
family. Tensor by tensor, without a GPU: it needs about twice the memory of the largest tensor. The
family is verified first, and what was written is read back (unless --no-verify says otherwise);
stopped, it leaves nothing behind."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments on its own parser."""
    options.describe(parser, DESCRIPTION)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="the family")
    parser.add_argument("--budget", required=True, metavar="NAME", help="the budget, or a share between two: 0.6")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; new or empty")
    options.no_verify(parser)
    options.as_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask for and return the exit status."""
    from megatron_elastic.extraction import extract_budget

    made = extract_budget(
        arguments.checkpoint, arguments.budget, arguments.out, verify=arguments.verify, progress=options.bars()
    )
    show(made, as_json=arguments.json)
    return 0
