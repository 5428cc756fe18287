"""`megatron-elastic rank`: importance of channels, neurons and heads."""

import argparse
from pathlib import Path

from megatron_elastic.cli import options

HELP = "measure the importance of channels, neurons and heads of a parent"
DESCRIPTION = """\
Run the parent over calibration text (elastic.calibration: samples, sequence_length, batch_size;
from elastic.train_data) and write the importance of every hidden channel, FFN neuron, Mamba head
and attention head to one file, in one process."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments on its own parser."""
    options.describe(parser, DESCRIPTION)
    options.recipe(parser)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="the parent (torch_dist)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write")


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask for and return the exit status."""
    from megatron_elastic.checkpoint import find_verified
    from megatron_elastic.config import load_recipe

    recipe = load_recipe(arguments.recipe)
    find_verified(arguments.checkpoint, progress=options.bars())  # before Megatron is imported, which takes seconds
    from megatron_elastic.importance import rank_parent

    rank_parent(recipe, arguments.checkpoint, arguments.out, options.bars())
    print(f"{arguments.out}: importance on {recipe.calibration.samples} sequences")
    return 0
