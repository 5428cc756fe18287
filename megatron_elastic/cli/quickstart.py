"""`megatron-elastic quickstart`: the whole job, from text to report."""

import argparse
from pathlib import Path

from megatron_elastic.cli import options

HELP = "do everything: corpus, parent, family, standalone models, report"
DESCRIPTION = """\
Make a corpus from the text that comes with this Python, train a small parent on it, rank and sort
it, train a family of three budgets, cut the standalone models and the baselines out, evaluate them
all, and write OUT/report.md and OUT/report.json. Started again, it goes on where it was interrupted
and leaves alone what is done."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments on its own parser."""
    options.describe(parser, DESCRIPTION)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    options.ranks(parser, "2, or 1 where there is one GPU")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="another recipe (default: recipes/quickstart.yaml)")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="other text (default: what comes with this Python)")


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask for and return the exit status."""
    from megatron_elastic.quickstart import quickstart

    quickstart(arguments.out, ranks=arguments.ranks, recipe=arguments.recipe, text=arguments.text)
    return 0
