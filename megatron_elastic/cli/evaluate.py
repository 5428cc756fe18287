"""`megatron-elastic evaluate`: the loss of a budget inside a family, or of a model of its own."""

import argparse
from pathlib import Path

from megatron_elastic.cli import options
from megatron_elastic.cli.output import show, stdout_to_stderr

HELP = "measure the loss of a budget inside the family, or of an extracted model"
DESCRIPTION = """\
Print the mean cross entropy in nats per token over token data, in fp32, deterministically: loss,
tokens, parameters. A family's budget is run inside the family; any other checkpoint (an extracted
model, a sorted parent, one that stock Megatron wrote) is a model of its own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments on its own parser."""
    options.describe(parser, DESCRIPTION)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="family or model (torch_dist)")
    parser.add_argument("--budget", metavar="NAME", help="budget, or a share between two (default: the largest)")
    parser.add_argument("--data", required=True, metavar="PREFIX", help="token data: PREFIX.bin and PREFIX.idx")
    parser.add_argument(
        "--tokens", type=options.at_least_one, metavar="N", help="tokens, from the start (default: all)"
    )
    parser.add_argument(
        "--sequence-length", type=options.at_least_one, metavar="N", help="tokens a sequence (default: 256)"
    )
    options.as_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask for and return the exit status."""
    with stdout_to_stderr():
        from megatron_elastic.checkpoint import find_verified

        find_verified(arguments.checkpoint, progress=options.bars())  # before Megatron is imported, which takes seconds
        from megatron_elastic.evaluation import evaluate

        result = evaluate(
            arguments.checkpoint,
            data=arguments.data,
            budget=arguments.budget,
            tokens=arguments.tokens,
            sequence_length=arguments.sequence_length,
        )
    show(result, as_json=arguments.json)
    return 0
