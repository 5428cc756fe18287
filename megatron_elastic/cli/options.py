"""Arguments that several subcommands share."""

import argparse
import os
import sys
from pathlib import Path


def at_least_one(text: str) -> int:
    """A whole number, 1 or more; argparse reports anything else as bad usage."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return number


def recipe(parser: argparse.ArgumentParser) -> None:
    """RECIPE."""
    parser.add_argument(
        "recipe", type=Path, metavar="RECIPE", help="YAML file; it is checked whole before anything runs"
    )


def ranks(parser: argparse.ArgumentParser, default: str) -> None:
    """--ranks N."""
    parser.add_argument(
        "--ranks", type=at_least_one, metavar="N", help=f"processes on this machine, one a GPU (default: {default})"
    )


def no_verify(parser: argparse.ArgumentParser) -> None:
    """--no-verify."""
    parser.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="neither compare the checkpoint with its manifest first, nor read back what was written",
    )


def as_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else there")


def describe(parser: argparse.ArgumentParser, text: str) -> None:
    """The description, with its line breaks."""
    parser.description = text
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def bars() -> bool:
    """Whether progress bars are shown: on a terminal, outside CI."""
    return sys.stderr.isatty() and not os.environ.get("CI")
