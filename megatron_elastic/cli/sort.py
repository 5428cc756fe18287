"""`megatron-elastic sort`: the parent, permuted into block order."""

import argparse
from pathlib import Path

from megatron_elastic.cli import options

HELP = "permute a parent so that every choice keeps a prefix of every block"
DESCRIPTION = """\
Write the parent again with channels, neurons, heads and experts sorted by importance into block
order; the order in which layers may be left out goes into its description. The sorted parent
computes the same function: it is what `train` starts from and what every submodel is cut from.
Tensor by tensor, without a GPU."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments on its own parser."""
    options.describe(parser, DESCRIPTION)
    options.recipe(parser)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="the parent (torch_dist)")
    parser.add_argument("--scores", type=Path, required=True, metavar="FILE", help="what `rank` wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; new or empty")


def sort(recipe_path: Path, checkpoint: Path, scores: Path, out: Path) -> None:
    """Sorts a parent.

    Raises:
        ElasticError: the recipe, the scores or the checkpoint cannot be used, or `out` is taken.
    """
    from megatron_elastic.config import load_recipe
    from megatron_elastic.sorting import sort_parent

    sort_parent(load_recipe(recipe_path), checkpoint, scores, out, progress=options.bars())


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask for and return the exit status."""
    sort(arguments.recipe, arguments.checkpoint, arguments.scores, arguments.out)
    print(f"{arguments.out}: the parent, sorted")
    return 0
