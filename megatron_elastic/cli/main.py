"""`megatron-elastic`: finds the subcommand, runs it, and turns what goes wrong into one message and an exit status."""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword

from megatron_elastic import __version__
from megatron_elastic.errors import ElasticError, RecipeError

COMMANDS = (
    *("plan", "corpus", "pretrain", "import", "rank", "sort", "train", "extract", "evaluate", "export"),
    *("report", "quickstart", "doctor"),
)
"""Subcommands, in the order in which they are used."""

WORKERS = ("_pretrain", "_scratch", "_stage", "_rank", "_evaluate_all", "_node")
"""What the subcommands start in processes of their own; not shown."""

DESCRIPTION = """\
One hybrid parent model (Mamba-2, attention, MLP, MoE) becomes a family of nested submodels that share
its weights: trained together in one run with Megatron-Core, and cut out without any further
training."""

EPILOG = """\
`megatron-elastic COMMAND --help` tells what a command reads and writes.
Exit status: 0 done; 1 it could not be done, one message says why; 2 bad usage or a bad recipe, with
every fault listed; 130 stopped by Ctrl-C or SIGTERM, the same command goes on."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; every subcommand's arguments carry `run`, the function to call."""
    parser = argparse.ArgumentParser(
        prog="megatron-elastic",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f"megatron_elastic.cli.{name}{'_' if iskeyword(name) else ''}")
        command = commands.add_parser(name, help=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _worker_parser() -> argparse.ArgumentParser:
    from megatron_elastic.cli import worker

    parser = argparse.ArgumentParser(prog="megatron-elastic")
    commands = parser.add_subparsers(required=True)
    for name in WORKERS:
        command = commands.add_parser(name)
        worker.add_arguments(name, command)
        command.set_defaults(run=worker.RUN[name])
    return parser


def _quiet() -> None:
    """Keeps to itself what the engine says about packages that are optional here; errors are still told."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: without the program's name; None takes the process's own.

    Returns:
        Exit status: 0 done, 1 an error that the user can mend, 2 a bad recipe, 130 interrupted. Bad usage exits with 2.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _worker_parser() if words and words[0] in WORKERS else build_parser()
    arguments = parser.parse_args(words)
    _quiet()
    try:
        status: int = arguments.run(arguments)
    except ElasticError as error:
        # In one write: another rank's message comes before or after it, not into it.
        sys.stderr.write(f"megatron-elastic: error: {error}\n")
        return 2 if isinstance(error, RecipeError) else 1
    except KeyboardInterrupt as stop:
        print(f"megatron-elastic: {str(stop) or 'interrupted'}; run the same command again to go on", file=sys.stderr)
        return 130
    return status
