"""One node's part of a run that `launch/torchrun.sh` starts on every node: torchrun, once a stage."""

import argparse
import time
from typing import NamedTuple

from megatron_elastic.cli import contact, launch, options
from megatron_elastic.errors import ElasticError
from megatron_elastic.signals import terminated_as_interrupt


class Part(NamedTuple):
    """What one start of torchrun makes.

    Attributes:
        what: name for messages.
        log: name of its log, without the node and the suffix.
        end: iteration that is saved when it is made.
    """

    what: str
    log: str
    end: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the worker's arguments on its own parser."""
    parser.add_argument("--nodes", type=options.at_least_one, required=True)
    parser.add_argument("--node-rank", type=int, required=True)
    parser.add_argument("--ranks", type=options.at_least_one, required=True)
    parser.add_argument("--master-port", type=options.at_least_one, required=True)
    parser.add_argument("command", choices=("train", "pretrain"))
    options.recipe(parser)
    parser.add_argument("launcher", nargs="+")


def _parts(arguments: argparse.Namespace) -> tuple[str, list[Part]]:
    from megatron_elastic.cli import position
    from megatron_elastic.cli.pretrain import section_of
    from megatron_elastic.config import load_recipe

    recipe = load_recipe(arguments.recipe, world_size=arguments.ranks)
    position.check_data(recipe)
    if arguments.command == "pretrain":
        section = section_of(recipe)
        return section.save, [Part("training the parent", "pretrain", section.iterations)]
    numbers = range(1, len(recipe.stages) + 1)
    return recipe.save, [
        Part(f"stage {n} of {len(numbers)} of the elastic run", f"train-stage-{n}", recipe.iterations_before(n + 1))
        for n in numbers
    ]


def _await(save: str, end: int, seconds: float) -> bool:
    """Whether the checkpoint of iteration `end` is there, or becomes visible in time."""
    from megatron_elastic.cli import position

    deadline = time.monotonic() + seconds
    while position.tracked(save) < end:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def run(arguments: argparse.Namespace) -> int:
    """`_node ... COMMAND RECIPE -- LAUNCHER`: runs `LAUNCHER --master-port P -m megatron_elastic COMMAND RECIPE`.

    A stage that is saved is not made again; one that fails ends this node's part, and so, through the ranks' loss of
    contact, every other node's. Each stage takes a port of its own: the agent of the last one may still hold its port
    on node 0 when another node is ahead.

    Raises:
        RecipeError: the recipe has faults.
        ElasticError: a stage failed, ended before its end was saved, or was stopped before anything new was saved.
        KeyboardInterrupt: stopped, with a newer checkpoint than at the start: what gives the command again by itself
            (a scheduler) gets further each time.
    """
    with terminated_as_interrupt():
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from megatron_elastic.cli import position

    first = arguments.node_rank == 0
    save, parts = _parts(arguments)
    patience = 0.0 if first else contact.SEEN_WITHIN
    start = position.tracked(save)
    made = 0
    for number, part in enumerate(parts):
        if position.tracked(save) >= part.end:
            continue
        if first:
            print(part.what, flush=True)
        suffix = "" if arguments.nodes == 1 else f"-node-{arguments.node_rank}"
        log = position.logs(save) / f"{part.log}{suffix}.log"
        port = ["--master-port", str(arguments.master_port + number)]
        rank = ["-m", "megatron_elastic", arguments.command, str(arguments.recipe)]
        try:
            with position.stops(save, position.tracked(save), part.end, parts[-1].end):
                launch.run_children([[*arguments.launcher, *port, *rank]], what=part.what, log=log)
                # Rank 0 runs on the first node: what it saved may become visible later on the others, and the next
                # stage's number and port follow from it.
                made += _await(save, part.end, patience)
        except KeyboardInterrupt as stop:
            if not _await(save, start + 1, patience):
                raise ElasticError(
                    f"{part.what} was stopped before anything newer than iteration {start} was saved: see {log}. "
                    f"{launch.SHUTDOWN} (30) is how many seconds the ranks get for it"
                ) from stop
            raise
        if position.tracked(save) < part.end:
            raise ElasticError(
                f"{part.what} ended before iteration {part.end} was saved: see {log}, and run this again"
            )
    if first and not made:
        print("all of it is made already: nothing to do")
    return 0
