"""`megatron-elastic train`: the elastic run, stage after stage."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_elastic.cli import contact, launch, options
from megatron_elastic.cli.output import stdout_to_stderr
from megatron_elastic.errors import ElasticError

if TYPE_CHECKING:
    from megatron_elastic.config import Recipe

HELP = "train the family: every budget at once, by distillation from the frozen parent"
DESCRIPTION = """\
Train the family that the recipe describes, from the sorted parent (elastic.parent) into
elastic.save, with Megatron's pretrain(): one run of its own for every stage. Stages that are done
are left out, and an interrupted stage goes on from its newest checkpoint. Without torchrun it
starts the ranks, on this machine. Under torchrun it is one of the ranks and makes one stage, the
current one; launch/torchrun.sh starts torchrun once a stage, on one node or several. Ctrl-C or
SIGTERM end it after the step it is in, with a checkpoint, and exit status 130: the same command
goes on from there. --dry-run trains nothing: it builds the model of every pipeline stage on the
meta device and prints what a rank holds. Output: logs/train-stage-N.log beside the family's folder; TensorBoard:
SAVE/tensorboard."""
DONE = "every stage is done: nothing to do"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments on its own parser."""
    options.describe(parser, DESCRIPTION)
    options.recipe(parser)
    options.ranks(parser, "all GPUs; without a GPU, one copy of the model")
    parser.add_argument("--dry-run", action="store_true", help="print what every rank of --ranks ranks would hold")
    options.as_json(parser)


def train(path: Path, ranks: int | None = None) -> bool:
    """Trains the stages that are not done.

    Returns:
        Whether there was anything to do.

    Raises:
        RecipeError: the recipe has faults.
        ElasticError: the parent, the data or a foreign family in the way; or the training failed.
        KeyboardInterrupt: stopped before its end, saying where.
    """
    from megatron_elastic.checkpoint import carry
    from megatron_elastic.cli import position
    from megatron_elastic.config import load_recipe

    recipe = load_recipe(path)
    ranks = ranks or position.default_ranks(recipe.megatron)
    recipe = load_recipe(path, world_size=ranks)
    position.check_data(recipe)
    position.check_parent(recipe)
    with position.only_run(recipe.save):
        carry(recipe.parent, recipe.save)
        return _stages(recipe, path, ranks, recipe.stage_of(position.family_position(recipe)))


def _stages(recipe: "Recipe", path: Path, ranks: int, first: int) -> bool:
    """Runs the stages from `first` on; returns whether there were any."""
    from megatron_elastic.cli import position

    for number in range(1, first):
        print(f"stage {number} of {len(recipe.stages)} is done already", flush=True)
    for number in range(first, len(recipe.stages) + 1):
        print(f"stage {number} of {len(recipe.stages)}: {recipe.stages[number - 1].iterations} iterations", flush=True)
        log = position.logs(recipe.save) / f"train-stage-{number}.log"
        words = ["_stage", path, "--stage", number]
        begin, end = position.tracked(recipe.save), recipe.iterations_before(number + 1)
        with position.stops(recipe.save, begin, end, recipe.iterations_before(len(recipe.stages) + 1)):
            launch.run_ranks(words, ranks=ranks, what=f"stage {number} of the elastic run", log=log)
        if position.tracked(recipe.save) < end:
            raise ElasticError(f"stage {number} ended before iteration {end} was saved: see {log}, and run this again")
    return first <= len(recipe.stages)


def _one_rank(arguments: argparse.Namespace) -> int:
    from megatron_elastic.checkpoint import carry
    from megatron_elastic.cli import position, worker
    from megatron_elastic.config import load_recipe

    recipe = load_recipe(arguments.recipe, world_size=launch.world_of(arguments.ranks))

    def stage() -> int:
        position.check_data(recipe)
        position.check_parent(recipe)
        return recipe.stage_of(position.family_position(recipe))

    number = position.agreed(stage)
    if number is None:
        return 1  # rank 0 says why
    # After rank 0 has looked: it may have mended the tracker that all compare.
    contact.same_folder(Path(recipe.save), lambda: position.tracked(recipe.save))
    if os.environ["RANK"] == "0":
        carry(recipe.parent, recipe.save)
    if number <= len(recipe.stages):
        return worker.train(arguments.recipe, number)
    if os.environ["RANK"] == "0":
        print(DONE)
    return 0


def _show_ranks(path: Path, ranks: int | None, as_json: bool) -> None:
    """Prints what the ranks of every pipeline stage would hold; neither parent nor data need be there."""
    from megatron_elastic.cli import position
    from megatron_elastic.config import load_recipe

    ranks = ranks or position.default_ranks(load_recipe(path).megatron)
    recipe = load_recipe(path, world_size=ranks)
    with stdout_to_stderr():
        position.prepare()
        from megatron_elastic.dry_run import as_rows, dry_run

        rows = as_rows(dry_run(recipe, ranks))
    if as_json:
        print(json.dumps({"ranks": ranks, "stages": rows}))
        return
    for row in rows:
        sizes = {name.removesuffix("_bytes"): value for name, value in row.items() if name.endswith("_bytes")}
        print(
            f"pipeline stage {row['pipeline_stage']}, {row['ranks']} ranks, layers "
            f"{', '.join(map(str, row['layers']))}: {row['parameters']:,} parameters a rank; GiB: "
            + ", ".join(f"{name} {value / 2**30:.2f}" for name, value in sizes.items())
        )


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask for and return the exit status."""
    if arguments.dry_run:
        _show_ranks(arguments.recipe, arguments.ranks, arguments.json)
        return 0
    if launch.under_torchrun():
        return _one_rank(arguments)
    if not train(arguments.recipe, arguments.ranks):
        print(DONE)
    return 0
