"""`megatron-elastic plan`: what a parent and its submodels cost, and which selections reach a target."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megatron_elastic.budget import UNITS
from megatron_elastic.cli import options
from megatron_elastic.cost_model import PROFILES

HELP = "tell sizes, memory and FLOPs of budgets, and find selections for a target, before anything runs"
DESCRIPTION = """\
Count what the parent and each budget cost: parameters, active parameters, memory at a batch and
context, forward FLOPs per token. Of a recipe (which is checked whole: layout, FP8 tiles, memory of
a GPU, steps and tokens), or of a model in Hugging Face's format. No GPU is used and no model is
made. Selections that are not given are proposals: homogeneous, within 0.5 % of the target where
there are any, and the most balanced of those; a router finds its own in training."""

TOLERANCE = 0.005
"""Proposals this near to their target are equally good, and sorted by how balanced they are."""
SHARES = (1.0, 0.75, 0.5)
"""Budgets of a model that comes without a recipe and without targets."""


def _number(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return value


def _held(text: str) -> tuple[str, int]:
    axis, _, size = text.partition("=")
    if not size.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} must be AXIS=SIZE, for example depth=42")
    return axis, int(size)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments on its own parser."""
    options.describe(parser, DESCRIPTION)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("recipe", nargs="?", type=Path, metavar="RECIPE", help="YAML file")
    source.add_argument(
        "--hf-config", type=Path, metavar="FILE", help="config.json of a nemotron_h model, or its folder"
    )
    parser.add_argument(
        "--target",
        type=_number,
        nargs="+",
        action="extend",
        metavar="N",
        help="propose selections that cost N (6e9), instead of the budgets",
    )
    parser.add_argument("--unit", choices=UNITS, default="parameters", help="of the targets (default: parameters)")
    parser.add_argument(
        "--count", type=options.at_least_one, default=5, metavar="N", help="proposals for each target (default: 5)"
    )
    parser.add_argument(
        "--keep",
        type=_held,
        nargs="+",
        action="extend",
        default=[],
        metavar="AXIS=SIZE",
        help="propose only selections of this size on an axis (depth=42)",
    )
    parser.add_argument("--batch", type=options.at_least_one, metavar="N", help="sequences in memory (default: 1)")
    parser.add_argument(
        "--context", type=options.at_least_one, metavar="N", help="tokens of each, for memory and FLOPs (default: 8192)"
    )
    parser.add_argument(
        "--prefill-chunk", type=options.at_least_one, metavar="N", help="tokens prefilled at once (default: 8192)"
    )
    parser.add_argument(
        "--profile", choices=PROFILES, metavar="NAME", help=f"bytes per element: {', '.join(PROFILES)} (default: bf16)"
    )
    parser.add_argument("--latency-table", type=Path, metavar="FILE", help="measured latencies (YAML or JSON)")
    parser.add_argument(
        "--gpus", type=options.at_least_one, metavar="N", help="of a recipe's run (default: one copy of the model)"
    )
    options.as_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask for and return the exit status."""
    from megatron_elastic.errors import ElasticError
    from megatron_elastic.family import Family

    recipe = None
    if arguments.recipe is not None:
        from megatron_elastic.config import load_recipe

        recipe = load_recipe(arguments.recipe, world_size=arguments.gpus)
        family: Family = recipe.family
    else:
        from megatron_elastic.hf.config import read_config
        from megatron_elastic.planning import default_family

        if arguments.gpus is not None:
            raise ElasticError("--gpus: a run has GPUs, and a recipe describes it: give a recipe")
        family = default_family(read_config(arguments.hf_config).shape, SHARES)
    family = _placed(family, arguments)
    given = recipe.selections if recipe is not None else ()
    if arguments.target:
        rows = [row for target in arguments.target for row in _proposals(family, target, arguments)]
        chosen = [rows[number] for number in range(len(rows)) if rows[number]["name"].endswith("-1")]
    else:
        rows = chosen = _budgets(family, given, arguments)
    result = _result(family, rows, chosen)
    if recipe is not None:
        from megatron_elastic.recipe_checks import run_facts

        result.update(run_facts(recipe, arguments.gpus))
    if arguments.json:
        print(json.dumps(result))
    else:
        _print(result)
    return 0


def _placed(family: Any, arguments: argparse.Namespace) -> Any:
    """The family where, and of the sizes that, the options say."""
    from megatron_elastic.cost_model import Deployment
    from megatron_elastic.errors import ElasticError
    from megatron_elastic.latency import LatencyTable
    from megatron_elastic.planning import restricted

    given = {field.name: getattr(arguments, field.name) for field in fields(Deployment)}
    deployment = replace(family.deployment, **{name: value for name, value in given.items() if value is not None})
    family = replace(family, deployment=deployment)
    if arguments.latency_table is not None:
        family = replace(family, latency=LatencyTable.load(arguments.latency_table))
    for axis, size in arguments.keep:
        choices = family.choices.get(axis, ())
        if size not in choices:
            raise ElasticError(f"--keep {axis}={size}: the choices of {axis} are {list(choices)}: take one of them")
        if axis == "depth" and len(family.shape.pattern) - size > len(family.depth_ranking):
            raise ElasticError(
                f"--keep depth={size}: which layers are left out is not known: rank them, or give elastic.depth_ranking"
            )
    return restricted(family, dict(arguments.keep))


def _costs(family: Any, selection: Any) -> dict[str, Any]:
    from megatron_elastic.planning import figures

    return {**figures(family, selection), "selection": selection.as_dict()}


def _row(family: Any, selection: Any, name: str, unit: str, target: float, origin: str) -> dict[str, Any]:
    reached = family.selection_cost(selection, unit)
    goal = {"name": name, "unit": unit, "target": target, "reached": reached, "origin": origin}
    return {**goal, **_costs(family, selection)}


def _proposals(family: Any, target: float, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from megatron_elastic.planning import propose

    found = propose(family, target, arguments.unit, arguments.count, tolerance=TOLERANCE)
    return [
        _row(family, selection, f"{_short(target)}-{number}", arguments.unit, target, "proposed")
        for number, selection in enumerate(found, start=1)
    ]


def _budgets(family: Any, given: Sequence[Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from megatron_elastic.planning import propose

    rows = []
    for number, budget in enumerate(family.budgets):
        target = budget.fraction * family.full_cost(budget.unit)
        if given:
            selection, origin = given[number], "given"
        elif budget.fraction >= 1.0:
            selection, origin = family.full, "given"
        else:
            (selection,) = propose(family, target, budget.unit, 1, tolerance=TOLERANCE)
            origin = "proposed"
        rows.append(_row(family, selection, budget.name, budget.unit, target, origin))
    return rows


def _result(family: Any, rows: list[dict[str, Any]], chosen: list[dict[str, Any]]) -> dict[str, Any]:
    place = family.deployment
    parent = {"name": "parent", **_costs(family, family.full)}
    sizes = {json.dumps(row["selection"]): row["parameters"] for row in (parent, *chosen)}
    weights = place.bytes.weights
    return {
        "parent": parent,
        "budgets": rows,
        "deployment": {field.name: getattr(place, field.name) for field in fields(place)},
        # One checkpoint holds them all; apart, each has its own weights. A model that is listed twice counts once.
        "family_bytes": round(weights * parent["parameters"]),
        "separate_bytes": round(weights * sum(sizes.values())),
    }


def _short(value: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _both(count: float) -> str:
    """Bytes in GB and in GiB, which papers mix up."""
    if count < 1e8:
        return f"{count / 1e6:.1f} MB ({count / 2**20:.1f} MiB)"
    return f"{count / 1e9:.1f} GB ({count / 2**30:.1f} GiB)"


def _print(result: Mapping[str, Any]) -> None:
    place, whole = result["deployment"], result["parent"]["parameters"]
    print(
        f"memory: weights and caches of {place['batch']} sequence(s) of {place['context']} tokens, {place['profile']}; "
        f"FLOPs: of a forward pass, per token at {place['context']} tokens"
    )
    active = result["parent"]["active_parameters"] != whole
    timed = "latency" in result["parent"]
    head = ["", "parameters", "share", *(["active"] if active else []), "memory", "GFLOP/token"]
    head += [*(["latency"] if timed else []), "selection"]
    table = [head]
    for row in (result["parent"], *result["budgets"]):
        table.append(
            [
                row["name"],
                f"{row['parameters']:,}",
                f"{row['parameters'] / whole:.1%}",
                *([f"{row['active_parameters']:,}"] if active else []),
                _both(row["memory_bytes"]),
                f"{row['flops_per_token'] / 1e9:.2f}",
                *([f"{row['latency']:.4g}"] if timed else []),
                ", ".join(f"{axis} {_sizes(size)}" for axis, size in row["selection"].items()),
            ]
        )
    widths = [max(len(line[column]) for line in table) for column in range(len(head) - 1)]
    for line in table:
        name, *cells = line[:-1]
        aligned = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]
        print("  ".join([*aligned, line[-1]]).rstrip())
    print(
        f"weights of the family in one checkpoint: {_both(result['family_bytes'])}; of its members apart: "
        f"{_both(result['separate_bytes'])}"
    )
    if "run" in result:
        _print_run(result["run"], result["stages"], result["memory_per_gpu"])
    for warning in result.get("warnings", ()):
        print(f"warning: {warning}")


def _print_run(run: Mapping[str, Any], stages: Sequence[Mapping[str, Any]], memory: Mapping[str, int]) -> None:
    layout = ", ".join(f"{name.replace('_', ' ')} {run[name]}" for name in ("TP", "PP", "CP", "DP", "EP", "expert_TP"))
    print(f"run: {run['gpus']} GPU(s): {layout}; {run['steps']:,} steps, {_short(run['tokens'])} tokens")
    for number, stage in enumerate(stages, start=1):
        cache = stage["teacher_cache_bytes"]
        print(
            f"stage {number}: {stage['steps']:,} steps of {stage['global_batch_size']:,} x "
            f"{stage['sequence_length']:,} tokens, {stage['microbatches']} microbatches a step and rank (the teacher's "
            "counted); "
            f"{_short(stage['tokens'])} tokens, {stage['flops_at_full_width']:.2e} FLOP at full width"
            f"{f', a teacher cache of {_both(cache)}' if cache else ''}"
        )
    parts = ", ".join(f"{name} {_both(count)}" for name, count in memory.items() if name != "total")
    print(f"memory of the fullest GPU, an estimate: {_both(memory['total'])}: {parts}")


def _sizes(size: Any) -> str:
    return str(size) if isinstance(size, int) else "[" + " ".join(map(str, size)) + "]"
