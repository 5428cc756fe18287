"""What `report.json` says: losses and sizes of the parent, of every budget and of the baselines beside it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_elastic.checkpoint import find_checkpoint, read_metadata
from megatron_elastic.errors import CheckpointError, ElasticError

SCHEMA = 1
RANDOM_SEEDS = (1, 2, 3)
"""Seeds of the randomly ordered parents."""


def write_text(path: Path, text: str) -> None:
    """Writes a file at once: beside its place, then renamed into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file at once."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def _read(path: Path, missing: list[str]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except OSError:
        missing.append(str(path))
        return {}
    except ValueError as error:
        raise ElasticError(f"{path} is damaged ({error}): remove it and run the quickstart again") from error
    return found


def build_report(folder: Path) -> dict[str, Any]:
    """Collects the report of a finished run.

    Args:
        folder: of the run: `family/` and `evaluations/` are read.

    Returns:
        schema 1: parent, unigram_entropy, validation_tokens, budgets (largest first); losses in nats per token.

    Raises:
        ElasticError: the run is not finished, with what is missing.
        CheckpointError: `family` is no family.
    """
    if not folder.is_dir():
        raise ElasticError(f"{folder} does not exist: give the folder that `megatron-elastic quickstart --out` made")
    family = read_metadata(find_checkpoint(folder / "family"))
    if family is None or not family.budgets:
        raise CheckpointError(f"{folder / 'family'}: not a family (no description inside)")
    missing: list[str] = []

    def evaluation(name: str) -> dict[str, Any]:
        return _read(folder / "evaluations" / f"{name}.json", missing)

    parent = evaluation("parent")
    described = family.family
    whole = int(described.full_cost("parameters"))
    budgets = []
    for budget in family.budgets:
        selection = family.selection_of(budget.name)
        trained, cut = evaluation(f"family-{budget.name}"), evaluation(f"extracted-{budget.name}")
        if selection.as_dict() == family.shape.full:
            # A permutation of the whole parent is the parent.
            untrained, random = parent, [parent]
        else:
            untrained = evaluation(f"untrained-{budget.name}")
            random = [evaluation(f"random-{budget.name}-{seed}") for seed in RANDOM_SEEDS]
        scratch = evaluation(f"scratch-{budget.name}") if budget == family.budgets[-1] else {}
        budgets.append(
            {
                "name": budget.name,
                "fraction": budget.fraction,
                "parameters": int(described.selection_cost(selection)),
                "selection": selection.as_dict(),
                "validation_loss_family": trained.get("loss"),
                "validation_loss_extracted": cut.get("loss"),
                "validation_loss_untrained": untrained.get("loss"),
                "validation_loss_random_cut": sum(each.get("loss", 0.0) for each in random) / len(random),
                "validation_loss_from_scratch": scratch.get("loss"),
                "checkpoint": f"budgets/{budget.name}",
            }
        )
        if cut and cut["parameters"] != budgets[-1]["parameters"]:
            raise ElasticError(
                f"{folder / 'budgets' / budget.name} has {cut['parameters']} parameters, its selection "
                f"{budgets[-1]['parameters']}: it is not this family's; remove it and extract it again"
            )
    if missing:
        raise ElasticError(
            f"the run in {folder} is not finished: {', '.join(missing)} missing; run the quickstart again"
        )
    return {
        "schema": SCHEMA,
        "parent": {"parameters": whole, "validation_loss": parent["loss"]},
        "unigram_entropy": parent["unigram_entropy"],
        "validation_tokens": parent["tokens"],
        "budgets": budgets,
    }
