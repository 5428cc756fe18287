"""`megatron-elastic report`: tables and plots of a finished run."""

import argparse
from pathlib import Path

from megatron_elastic.cli import options

HELP = "write report.json, report.md and plots for a finished quickstart folder"
DESCRIPTION = """\
Read the evaluations and logs in DIR, a folder that `quickstart` made, and write DIR/report.json,
DIR/report.md and its plots (DIR/report/*.png). Nothing is trained or evaluated."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments on its own parser."""
    options.describe(parser, DESCRIPTION)
    parser.add_argument("--dir", type=Path, required=True, metavar="DIR", help="folder of the run")


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask for and return the exit status."""
    from megatron_elastic.report import write_report

    write_report(arguments.dir)
    print(f"{arguments.dir / 'report.md'} and {arguments.dir / 'report.json'} are written")
    return 0
