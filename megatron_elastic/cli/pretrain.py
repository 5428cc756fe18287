"""`megatron-elastic pretrain`: the parent, as the recipe's section `pretrain` says."""

import argparse
from pathlib import Path

from megatron_elastic.cli import launch, options
from megatron_elastic.errors import RecipeError

HELP = "train a parent from scratch with cross entropy"
DESCRIPTION = """\
Train the parent that the section `megatron` describes, as the section `pretrain` says (save,
iterations, sequence_length, global_batch_size, micro_batch_size, and flags on top under
`megatron`), on elastic.train_data, with Megatron's pretrain(). It goes on from the newest
checkpoint; when all iterations are made it does nothing. A parent that exists already needs no
`pretrain` section. Under torchrun it is one of the ranks; otherwise it starts them. Output:
logs/pretrain.log beside the checkpoint folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments on its own parser."""
    options.describe(parser, DESCRIPTION)
    options.recipe(parser)
    options.ranks(parser, "all GPUs; without a GPU, one copy of the model")


def pretrain(path: Path, ranks: int | None = None) -> bool:
    """Trains the parent to its last iteration.

    Returns:
        Whether there was anything to do.

    Raises:
        RecipeError: the recipe has faults, or no `pretrain` section.
        ElasticError: the training failed.
    """
    from megatron_elastic.cli import position
    from megatron_elastic.config import load_recipe

    recipe = load_recipe(path)
    if recipe.pretrain is None:
        raise RecipeError(["pretrain: this section says how the parent is trained; it is missing"], str(path))
    flags = {**recipe.megatron, **recipe.pretrain.megatron}
    ranks = ranks or position.default_ranks(flags)
    load_recipe(path, world_size=ranks)
    if position.tracked(recipe.pretrain.save) >= recipe.pretrain.iterations:
        return False
    position.check_data(recipe)
    with position.only_run(recipe.pretrain.save):
        if position.settled(recipe.pretrain.save, flags) >= recipe.pretrain.iterations:
            return False
        log = position.logs(recipe.pretrain.save) / "pretrain.log"
        launch.run_ranks(["_pretrain", path], ranks=ranks, what="training the parent", log=log)
    return True


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask for and return the exit status."""
    if launch.under_torchrun():
        from megatron_elastic.cli import worker

        return worker.pretrain(arguments)
    if not pretrain(arguments.recipe, arguments.ranks):
        print("the parent has made all its iterations: nothing to do")
    return 0
