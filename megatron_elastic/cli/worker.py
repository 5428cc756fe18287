"""What the subcommands start in processes of their own: ranks of a training run, and evaluations."""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_elastic.cli import contact, node, rank


def add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """Declare a worker's arguments on its own parser."""
    if name == "_node":
        node.add_arguments(parser)
        return
    if name == "_rank":
        rank.add_arguments(parser)
        return
    if name == "_evaluate_all":
        parser.add_argument("plan", type=Path)
        parser.add_argument("--part", type=int, default=0)
        parser.add_argument("--parts", type=int, default=1)
        return
    parser.add_argument("recipe", type=Path)
    if name in ("_stage", "_scratch"):
        parser.add_argument("--stage", type=int, required=True)
    if name == "_scratch":
        parser.add_argument("--budget", required=True)
        parser.add_argument("--save", required=True)


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _leave_group() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def train(path: Path, number: int) -> int:
    """One rank of one elastic stage."""
    from megatron_elastic.cli.position import prepare, tracked
    from megatron_elastic.config import load_recipe

    recipe = load_recipe(path, world_size=_world())
    prepare()
    from megatron_elastic.training import train_stage

    with contact.watched(lambda: tracked(recipe.save)):
        train_stage(recipe, number)
        _leave_group()
    return 0


def stage(arguments: argparse.Namespace) -> int:
    """`_stage RECIPE --stage K`."""
    return train(arguments.recipe, arguments.stage)


def _plain(recipe: Any, flags: Mapping[str, Any], stages: Sequence[Any], number: int, save: str) -> int:
    """One rank of a stage of ordinary training, on the recipe's data."""
    from megatron_elastic.cli.position import prepare, tracked

    prepare()
    from megatron_elastic.training import train_plain

    with contact.watched(lambda: tracked(save)):
        train_plain(
            flags,
            stages,
            number,
            train_data=recipe.train_data,
            validation_data=recipe.validation_data,
            save=save,
            save_interval=recipe.save_interval,
            evaluation=(recipe.evaluation.interval, recipe.evaluation.iterations),
        )
        _leave_group()
    return 0


def pretrain(arguments: argparse.Namespace) -> int:
    """`_pretrain RECIPE`: one rank of the parent's training."""
    from megatron_elastic.cli.pretrain import section_of
    from megatron_elastic.config import load_recipe

    recipe = load_recipe(arguments.recipe, world_size=_world())
    section = section_of(recipe)
    return _plain(recipe, {**recipe.megatron, **section.megatron}, (section.stage,), 1, section.save)


def scratch_flags(recipe: Any, budget: str) -> dict[str, Any]:
    """Megatron's flags for a model of a budget's shape, trained from scratch with the parent's settings.

    The layout stays the elastic run's: its data-parallel size decides which text a step reads.
    """
    from megatron_elastic.checkpoint import find_checkpoint, read_metadata
    from megatron_elastic.errors import CheckpointError
    from megatron_elastic.flags import shape_flags

    path = find_checkpoint(recipe.save)
    family = read_metadata(path)
    if family is None:
        raise CheckpointError(f"{path}: not a family (no description inside)")
    shape = family.selection_of(budget).submodel(family.shape)
    on_top = {} if recipe.pretrain is None else recipe.pretrain.megatron
    settings = {flag: value for flag, value in on_top.items() if "parallel" not in flag}
    return shape_flags(shape, {**recipe.megatron, **settings})


def scratch(arguments: argparse.Namespace) -> int:
    """`_scratch RECIPE --stage K --budget NAME --save DIR`: one rank of a baseline on the text that the family read."""
    from megatron_elastic.config import load_recipe

    recipe = load_recipe(arguments.recipe, world_size=_world())
    return _plain(recipe, scratch_flags(recipe, arguments.budget), recipe.stages, arguments.stage, arguments.save)


def evaluate_all(arguments: argparse.Namespace) -> int:
    """`_evaluate_all PLAN [--part I --parts N]`: every N-th evaluation of a plan that is not done; one file each.

    The plan: `{"data", "tokens", "sequence_length", "out", "jobs": {name: {"checkpoint", "budget"}}}`.
    """
    plan = json.loads(arguments.plan.read_text("utf-8"))
    out = Path(plan["out"])
    mine = list(plan["jobs"].items())[arguments.part :: arguments.parts]
    mine = [(name, job) for name, job in mine if not (out / f"{name}.json").exists()]
    if not mine:
        return 0
    from megatron_elastic.evaluation import evaluate
    from megatron_elastic.report import write_json

    for name, job in mine:
        result = evaluate(
            job["checkpoint"],
            data=plan["data"],
            budget=job["budget"],
            tokens=plan["tokens"],
            sequence_length=plan["sequence_length"],
        )
        write_json(out / f"{name}.json", result)
        print(f"elastic | {name}: {result['loss']:.4f} nats per token, {result['parameters']} parameters", flush=True)
    return 0


RUN: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "_stage": stage,
    "_pretrain": pretrain,
    "_scratch": scratch,
    "_evaluate_all": evaluate_all,
    "_node": node.run,
    "_rank": rank.worker,
}
"""Worker's name -> its function."""
