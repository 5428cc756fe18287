"""`megatron-elastic pretrain`: the parent, as the recipe's section `pretrain` says."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_elastic.cli import contact, launch, options
from megatron_elastic.errors import RecipeError

if TYPE_CHECKING:
    from megatron_elastic.config import PretrainRun, Recipe

HELP = "train a parent from scratch with cross entropy"
DESCRIPTION = """\
Train the parent that the section `megatron` describes, as the section `pretrain` says (save,
iterations, sequence_length, global_batch_size, micro_batch_size, and flags on top under
`megatron`), on elastic.train_data, with Megatron's pretrain(). It goes on from the newest
checkpoint; when all iterations are made it does nothing. A parent that exists already needs no
`pretrain` section. Under torchrun (launch/torchrun.sh) it is one of the ranks; otherwise it starts
them. Output: logs/pretrain.log beside the checkpoint folder."""

DONE = "the parent has made all its iterations: nothing to do"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments on its own parser."""
    options.describe(parser, DESCRIPTION)
    options.recipe(parser)
    options.ranks(parser, "all GPUs; without a GPU, one copy of the model")


def section_of(recipe: "Recipe") -> "PretrainRun":
    """The section that says how the parent is trained.

    Raises:
        RecipeError: there is none.
    """
    if recipe.pretrain is None:
        raise RecipeError(["pretrain: this section says how the parent is trained; it is missing"], recipe.source)
    return recipe.pretrain


def pretrain(path: Path, ranks: int | None = None) -> bool:
    """Trains the parent to its last iteration.

    Returns:
        Whether there was anything to do.

    Raises:
        RecipeError: the recipe has faults, or no `pretrain` section.
        ElasticError: the training failed.
        KeyboardInterrupt: stopped before its end, saying where.
    """
    from megatron_elastic.cli import position
    from megatron_elastic.config import load_recipe

    recipe = load_recipe(path)
    section = section_of(recipe)
    flags = {**recipe.megatron, **section.megatron}
    ranks = ranks or position.default_ranks(flags)
    load_recipe(path, world_size=ranks)
    if position.tracked(section.save) >= section.iterations:
        return False
    position.check_data(recipe)
    log, save, end = position.logs(section.save) / "pretrain.log", section.save, section.iterations
    with position.only_run(save):
        begin = position.settled(save, flags)
        if begin >= end:
            return False
        with position.stops(save, begin, end, end):
            launch.run_ranks(["_pretrain", path], ranks=ranks, what="training the parent", log=log)
    return True


def _one_rank(arguments: argparse.Namespace) -> int:
    from megatron_elastic.cli import position, worker
    from megatron_elastic.config import load_recipe

    recipe = load_recipe(arguments.recipe, world_size=launch.world_of(arguments.ranks))
    section = section_of(recipe)
    position.check_data(recipe)
    if position.agreed(lambda: position.settled(section.save, {**recipe.megatron, **section.megatron})) is None:
        return 1  # rank 0 says why
    made = contact.same_folder(Path(section.save), lambda: position.tracked(section.save))
    if made < section.iterations:
        return worker.pretrain(arguments)
    if os.environ["RANK"] == "0":
        print(DONE)
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask for and return the exit status."""
    if launch.under_torchrun():
        return _one_rank(arguments)
    if not pretrain(arguments.recipe, arguments.ranks):
        print(DONE)
    return 0
