"""What a recipe's `elastic` section says of the family: axes, budgets, given selections."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from megatron_elastic.axes import AXES, PER_LAYER_AXES
from megatron_elastic.budget import UNITS, Budget, Selection
from megatron_elastic.cost_model import Deployment
from megatron_elastic.curriculum import section
from megatron_elastic.errors import CheckpointError, ElasticError
from megatron_elastic.family import Family
from megatron_elastic.latency import LatencyTable
from megatron_elastic.layout import Layout, ModelShape
from megatron_elastic.parallel import Ranks


def _positive(elastic: Mapping[str, Any], key: str, default: int, faults: list[str]) -> int | None:
    value = elastic.get(key, default)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    faults.append(f"elastic.{key}: {value!r} must be a positive whole number")
    return None


def _numbers(raw: Any, name: str, faults: list[str]) -> tuple[int, ...] | None:
    if isinstance(raw, Sequence) and not isinstance(raw, str) and all(type(each) is int for each in raw):
        return tuple(raw)
    faults.append(f"{name}: {raw!r} must be a list of whole numbers")
    return None


def _depth_faults(choices: Sequence[int], layers: int) -> list[str]:
    found = []
    if not choices or choices[0] != layers:
        found.append(f"choices {list(choices)} must begin with the number of layers {layers}")
    if any(a <= b for a, b in pairwise(choices)):
        found.append(f"choices {list(choices)} must be strictly descending")
    found.extend(f"choice {choice} must lie in 1..{layers}" for choice in choices if not 0 < choice <= layers)
    return found


def _axis_faults(axis: str, choices: Sequence[int], shape: ModelShape, layout: Layout, ranks: Ranks) -> list[str]:
    if axis == "depth":
        return _depth_faults(choices, len(shape.pattern))
    order = layout.orders[axis]
    found = order.faults(choices)
    flag, size = {
        "": ("", 1),
        "tp": ("tensor-model-parallel-size", ranks.tp),
        "etp": ("expert-tensor-parallel-size", ranks.etp),
        "ep": ("expert-model-parallel-size", ranks.ep),
    }[Layout.sharded[axis]]
    if order.blocks % size:
        found.append(f"its {order.blocks} blocks do not divide by {flag} {size}")
    elif axis == "mamba_heads" and not found:
        found.extend(shape.context_parallel_faults(choices, ranks.tp, ranks.cp))
    if axis == "experts":
        found.extend(
            f"choice {choice} keeps fewer experts than a token goes to (moe-router-topk {shape.top_k})"
            for choice in choices
            if 0 < choice < shape.top_k
        )
    return found


def _choices(
    raw: Mapping[str, Any], shape: ModelShape, layout: Layout, ranks: Ranks, faults: list[str]
) -> dict[str, tuple[int, ...]]:
    found = {}
    for axis, full in shape.choices.items():
        choices = _numbers(raw.get(axis, full), f"elastic.axes.{axis}", faults)
        if choices is not None:
            wrong = _axis_faults(axis, choices, shape, layout, ranks)
            faults.extend(f"elastic.axes.{axis}: {fault}" for fault in wrong)
            found[axis] = choices
    return found


def _heterogeneous(raw: Any, shape: ModelShape, faults: list[str]) -> tuple[str, ...]:
    if not isinstance(raw, list) or not all(isinstance(axis, str) for axis in raw):
        faults.append(f"elastic.heterogeneous: {raw!r} must be a list of axes")
        return ()
    allowed = [axis for axis in PER_LAYER_AXES if axis in shape.axes]
    faults.extend(
        f"elastic.heterogeneous: {axis!r} cannot differ between the layers of this parent; {allowed} can"
        for axis in raw
        if axis not in allowed
    )
    return tuple(axis for axis in AXES if axis in raw)


def _ranking(raw: Any, shape: ModelShape, choices: Sequence[int], faults: list[str]) -> tuple[int, ...]:
    numbers = _numbers(raw, "elastic.depth_ranking", faults)
    if numbers is None:
        return ()
    faults.extend(f"elastic.depth_ranking: {fault}" for fault in ranking_faults(numbers, shape, choices))
    return numbers


def ranking_faults(ranking: Sequence[int], shape: ModelShape, choices: Sequence[int]) -> list[str]:
    """What is wrong with a ranking of layers, least important first, for the choices of depth."""
    layers = len(shape.pattern)
    outside = [number for number in ranking if not 0 <= number < layers]
    found = [f"{number} is no layer of the parent, which has 0..{layers - 1}" for number in outside]
    if len(set(ranking)) < len(ranking):
        found.append(f"{list(ranking)} names a layer twice")
    elif choices and not found and len(ranking) < layers - min(choices):
        found.append(f"{len(ranking)} layers are ranked, the smallest choice of depth skips {layers - min(choices)}")
    return found


def _name_faults(names: Sequence[Any]) -> list[str]:
    found = []
    if len(set(map(str, names))) < len(names):
        found.append(f"elastic.budgets: names {list(names)} must differ")
    for name in names:
        plain = isinstance(name, str) and name and not name.startswith(".")
        if not plain or any(c in "/\\" or c.isspace() for c in name):
            found.append(f"elastic.budgets: name {name!r} must be usable as a folder's name")
    return found


BUDGET_KEYS = ("name", "fraction", "target", "unit", "heterogeneous")


def _budget(raw: Any, name: str, family: Family | None, faults: list[str]) -> Budget | None:
    """One budget; a target in absolute terms becomes a fraction of the parent's cost."""
    if not isinstance(raw, Mapping):
        faults.append(f"{name}: {raw!r} must be a mapping")
        return None
    before = len(faults)
    faults.extend(f"{name}.{key}: unknown key; known are {list(BUDGET_KEYS)}" for key in raw if key not in BUDGET_KEYS)
    if "name" not in raw:
        faults.append(f"{name}.name: required")
    if ("fraction" in raw) == ("target" in raw):
        faults.append(f"{name}.fraction: give one of `fraction` (of the parent) and `target` (absolute)")
    unit = raw.get("unit", "parameters")
    if unit not in UNITS:
        faults.append(f"{name}.unit: {unit!r} must be one of {list(UNITS)}")
    if not isinstance(raw.get("heterogeneous", True), bool):
        faults.append(f"{name}.heterogeneous: {raw['heterogeneous']!r} must be true or false")
    for key in ("fraction", "target"):
        value = raw.get(key, 1.0)
        if not isinstance(value, int | float) or isinstance(value, bool):
            faults.append(f"{name}.{key}: {value!r} must be a number (write 6.0e+9, YAML reads 6e9 as text)")
    if unit == "latency" and family is not None and family.latency is None:
        faults.append(f"{name}.unit: latency needs a table of what was measured: elastic.latency_table: FILE")
    if len(faults) > before or (family is None and "fraction" not in raw):
        return None
    fraction = raw["fraction"] if family is None or "fraction" in raw else raw["target"] / family.full_cost(unit)
    return Budget(str(raw["name"]), float(fraction), unit, raw.get("heterogeneous", True))


def _budgets(raw: Any, family: Family | None, faults: list[str]) -> tuple[Budget, ...]:
    if not isinstance(raw, list) or not raw:
        faults.append(f"elastic.budgets: {raw!r} must be a list of {{name, fraction}}, largest first")
        return ()
    faults.extend(_name_faults([entry["name"] for entry in raw if isinstance(entry, Mapping) and "name" in entry]))
    made = [_budget(entry, f"elastic.budgets[{number}]", family, faults) for number, entry in enumerate(raw)]
    budgets = tuple(budget for budget in made if budget is not None)
    if len(budgets) < len(raw):
        return ()
    sizes = [budget.fraction for budget in budgets]
    for size in sizes:
        if not 0.0 < size <= 1.0:
            faults.append(f"elastic.budgets: fraction {size} must lie above 0 and not above 1")
    if sizes[0] != 1.0:
        faults.append(f"elastic.budgets: the first fraction {sizes[0]} must be 1.0, the parent's own size")
    if any(a <= b for a, b in pairwise(sizes)):
        faults.append(f"elastic.budgets: fractions {sizes} must be strictly descending")
    return budgets


def _places(elastic: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """Where memory and FLOPs are counted, and the table of measured latencies."""
    found: dict[str, Any] = {}
    deployment = section(Deployment, elastic.get("deployment", {}), "elastic.deployment", faults)
    if deployment is not None:
        found["deployment"] = deployment
    if "latency_table" in elastic:
        try:
            found["latency"] = LatencyTable.load(str(elastic["latency_table"]))
        except ElasticError as error:
            faults.append(f"elastic.latency_table: {error}")
    return found


def parse_family(elastic: Mapping[str, Any], shape: ModelShape, ranks: Ranks, faults: list[str]) -> Family | None:
    """The family of a recipe; what is wrong is added to `faults`, and None returned."""
    before = len(faults)
    raw = elastic.get("axes")
    if not isinstance(raw, Mapping):
        faults.append(f"elastic.axes: {raw!r} must map an axis to its choices, largest first")
        raw = {}
    for axis in sorted(set(raw) - set(shape.axes), key=str):
        known = f"a parent {shape.pattern!r} has" if axis in AXES else "unknown axis; known are"
        faults.append(f"elastic.axes.{axis}: {known} {list(shape.axes)}")
    ffn_blocks = _positive(elastic, "ffn_blocks", 8, faults)
    expert_blocks = _positive(elastic, "expert_blocks", 8 if "E" in shape.pattern else 1, faults)
    if ffn_blocks is None or expert_blocks is None:
        return None
    choices = _choices(raw, shape, Layout(shape, ffn_blocks, expert_blocks), ranks, faults)
    different = _heterogeneous(elastic.get("heterogeneous", []), shape, faults)
    ranking: tuple[int, ...] = ()
    if "depth_ranking" in elastic:
        ranking = _ranking(elastic["depth_ranking"], shape, choices.get("depth", ()), faults)
    places = _places(elastic, faults)
    bare = None
    if len(faults) == before:
        bare = Family(
            shape=shape,
            ffn_blocks=ffn_blocks,
            expert_blocks=expert_blocks,
            choices=choices,
            heterogeneous=different,
            depth_ranking=ranking,
            budgets=(),
            **places,
        )
    budgets = _budgets(elastic.get("budgets"), bare, faults)
    return None if bare is None or len(faults) > before else replace(bare, budgets=budgets)


def with_depth_ranking(family: Family, ranking: Sequence[int], source: str) -> Family:
    """The family with the layers ranked as a sorted parent says, where the recipe does not say itself.

    Raises:
        CheckpointError: depth is elastic, and there is no ranking, or one that does not fit.
    """
    if len(family.choices["depth"]) == 1 or family.depth_ranking:
        return family
    faults = ranking_faults(ranking, family.shape, family.choices["depth"])
    if faults:
        raise CheckpointError(
            f"{source}: elastic.axes.depth needs the layers ranked: {'; '.join(faults)}: rank the parent with its "
            "layers (megatron-elastic rank, then sort), or give elastic.depth_ranking"
        )
    return replace(family, depth_ranking=tuple(ranking))


def selection_faults(family: Family, selection: Selection) -> list[str]:
    """Every reason why a selection is none of a family's."""
    found = []
    for axis in family.axes:
        if axis == "depth":
            continue
        size = getattr(selection, axis)
        if isinstance(size, tuple) and axis not in family.heterogeneous:
            found.append(f"{axis}: {list(size)} differs between layers; elastic.heterogeneous does not name the axis")
        elif isinstance(size, tuple) and len(size) != len(family.layers_with(axis)):
            found.append(f"{axis}: {len(size)} numbers, {len(family.layers_with(axis))} layers have it")
        sizes = size if isinstance(size, tuple) else (size,)
        wrong = sorted({each for each in sizes if each not in family.choices[axis]})
        found.extend(f"{axis}: {each} is none of {list(family.choices[axis])}" for each in wrong)
    layers = len(family.shape.pattern)
    if any(not 0 <= number < layers for number in selection.skipped):
        found.append(f"skipped: {list(selection.skipped)} must be layers of the parent, 0..{layers - 1}")
    elif len(selection.skipped) >= layers:
        found.append("skipped: a model keeps at least one layer")
    return found


def parse_selections(raw: Any, family: Family, faults: list[str]) -> tuple[Selection, ...]:
    """The selections that a recipe gives, one for each budget; what is wrong is added to `faults`."""
    names = [budget.name for budget in family.budgets]
    if not isinstance(raw, Mapping) or sorted(raw, key=str) != sorted(names):
        faults.append(f"elastic.selections: must give one selection for each of {names}")
        return ()
    found = []
    for name in names:
        given = raw[name]
        known = {*family.axes, "skipped"}
        if not isinstance(given, Mapping) or not set(given) <= known:
            faults.append(f"elastic.selections.{name}: {given!r} must map axes of {sorted(known)} to choices")
            continue
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        depth = values.pop("depth", None)
        if depth is not None and "skipped" not in values:
            if depth not in family.choices["depth"] or (not family.depth_ranking and depth < len(family.shape.pattern)):
                faults.append(
                    f"elastic.selections.{name}.depth: {depth!r} must be one of {list(family.choices['depth'])}, with "
                    "the layers ranked (elastic.depth_ranking), or name the layers left out (skipped)"
                )
                continue
            values["skipped"] = family.skipped(depth)
        numbers = [v for value in values.values() for v in (value if isinstance(value, tuple) else (value,))]
        if not all(type(number) is int for number in numbers) or not isinstance(values.get("skipped", ()), tuple):
            faults.append(f"elastic.selections.{name}: {given!r} must map axes to whole numbers or lists of them")
            continue
        selection = Selection.from_dict({**family.full.as_dict(), **values})
        faults.extend(f"elastic.selections.{name}.{fault}" for fault in selection_faults(family, selection))
        found.append(selection)
    if found and found[0] != family.full:
        faults.append(f"elastic.selections.{names[0]}: the largest budget must keep everything")
    return tuple(found)
