"""Which selections reach a target: a search over all homogeneous ones that a family allows, without trying each.

At a given `hidden` and depth the cost is a sum with one term for every kind of layer (`CostFormula`). So the terms are
computed once for each kind's own choices; those of the kind with the most choices are sorted, and for every combination
of the others the ones that come near the target are found by bisection: some thousand look-ups where the product of all
choices has millions.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from megatron_elastic.axes import AXES_OF_KIND
from megatron_elastic.budget import Budget, Selection
from megatron_elastic.cost_model import CostFormula
from megatron_elastic.family import Family
from megatron_elastic.layout import ModelShape


class _Term(NamedTuple):
    """One combination of the choices of one kind of layer.

    Attributes:
        cost: of all layers of the kind.
        logs, squares: sums over its axes of log(size / full) and of its square.
    """

    cost: float
    sizes: tuple[tuple[str, int], ...]
    logs: float
    squares: float


class _Found(NamedTuple):
    distance: float
    prior: float
    sizes: tuple[tuple[str, int], ...]


class _Search:
    def __init__(self, family: Family, formula: CostFormula, count: int) -> None:
        self.family, self.formula, self.count = family, formula, count
        self.full, self.layers = family.shape.full, len(family.shape.pattern)
        self.choices = {axis: tuple(family.choices[axis]) for axis in family.axes}
        # Without a ranking of the layers nobody knows which ones a smaller depth leaves out.
        ranked = self.layers - len(family.depth_ranking)
        self.depths = [depth for depth in self.choices.pop("depth") if depth >= ranked]
        # How many axes the prior compares: those that are narrowed. Depth is judged apart.
        self.widths = sum(each != (self.full[axis],) for axis, each in self.choices.items())
        self._layers: dict[tuple[str, int], list[tuple[float, float, _Term]]] = {}

    def _of_kind(self, kind: str, hidden: int) -> list[tuple[float, float, _Term]]:
        """Cost of one layer, buffer of the kind, and the rest of the term, for every combination of its choices."""
        if (kind, hidden) not in self._layers:
            axes = [axis for axis in AXES_OF_KIND[kind] if axis in self.choices]
            found = self._layers[kind, hidden] = []
            for sizes in product(*(self.choices[axis] for axis in axes)):
                kept = dict(zip(axes, sizes, strict=True))
                each = {"hidden": hidden, **kept}
                logs = [math.log(size / self.full[axis]) for axis, size in kept.items()]
                term = _Term(0.0, tuple(kept.items()), sum(logs), sum(log * log for log in logs))
                found.append((self.formula.layer(kind, each), self.formula.buffer(kind, each), term))
        return self._layers[kind, hidden]

    def _terms(self, kind: str, hidden: int, layers: int) -> list[_Term]:
        return sorted(
            term._replace(cost=layers * layer + buffer if layers else 0)
            for layer, buffer, term in self._of_kind(kind, hidden)
        )

    def _near(self, terms: list[_Term], rest: float, slack: float) -> list[_Term]:
        """The terms within `slack` of `rest`, and no fewer than the `count` nearest on either side of it."""
        low = bisect_left(terms, rest - slack, key=lambda term: term.cost)
        high = bisect_right(terms, rest + slack, key=lambda term: term.cost)
        if high - low < self.count:
            low, high = max(0, low - self.count), min(len(terms), high + self.count)
            # Terms of the same cost as the last of these are as near.
            while low and terms[low - 1].cost == terms[low].cost:
                low -= 1
            while high < len(terms) and terms[high].cost == terms[high - 1].cost:
                high += 1
        return terms[low:high]

    def _prior(self, logs: float, squares: float, depth: int) -> float:
        spread = squares - logs * logs / self.widths if self.widths else 0.0
        return spread + math.log(depth / self.layers) ** 2

    def found(self, target: float, slack: float) -> Iterator[_Found]:
        """Candidates: all within `slack` of the target, and the nearest ones."""
        pattern = self.family.shape.pattern
        for depth, hidden in product(self.depths, self.choices["hidden"]):
            skipped = self.family.skipped(depth)
            left = "".join(kind for number, kind in enumerate(pattern) if number not in skipped)
            terms = sorted((self._terms(kind, hidden, left.count(kind)) for kind in sorted(set(pattern))), key=len)
            *others, most = terms
            ratio = math.log(hidden / self.full["hidden"])
            outside = self.formula.outside(hidden)
            for chosen in product(*others):
                rest = target - outside - sum(term.cost for term in chosen)
                for last in self._near(most, rest, slack):
                    parts = (*chosen, last)
                    logs = ratio + sum(term.logs for term in parts)
                    squares = ratio * ratio + sum(term.squares for term in parts)
                    sizes = (("depth", depth), ("hidden", hidden), *(size for term in parts for size in term.sizes))
                    yield _Found(abs(rest - last.cost), self._prior(logs, squares, depth), sizes)


def propose(
    family: Family,
    target: float,
    unit: str = "parameters",
    count: int = 1,
    *,
    tolerance: float = 0.0,
) -> list[Selection]:
    """Homogeneous selections of a family that come nearest to a target.

    Sorted by how close they come; those within `tolerance` of the target count as equally close. Among equally close
    ones the balanced come first: those whose width axes are narrowed by similar ratios (smallest spread of the
    logarithms) and that keep more layers, since depth costs more quality than width at the same size.

    Args:
        family: its choices and depth ranking; depths that its ranking does not reach are left out.
        target: in the unit: parameters, bytes, FLOPs a token, or the table's time.
        unit: one of `UNITS`.
        count: how many at most.
        tolerance: relative deviation from the target that does not matter.

    Returns:
        At most `count`, all different; the first is the nearest (within `tolerance`, the most balanced).
    """
    search = _Search(family, family.formula(unit), count)
    slack = tolerance * target

    def rank(found: _Found) -> tuple[float, float, tuple[tuple[str, int], ...]]:
        return max(0.0, found.distance - slack), found.prior, found.sizes

    best = heapq.nsmallest(count, search.found(target, slack), key=rank)
    return [family.select(dict(found.sizes)) for found in best]


def nearest(family: Family, fraction: float, unit: str = "parameters") -> Selection:
    """The homogeneous selection whose cost comes nearest to a share of the parent's."""
    return propose(family, fraction * family.full_cost(unit), unit)[0]


def restricted(family: Family, kept: Mapping[str, int]) -> Family:
    """The family with a single choice on some axes."""
    return replace(family, choices={**family.choices, **{axis: (size,) for axis, size in kept.items()}})


def figures(family: Family, selection: Selection) -> dict[str, float]:
    """What a selection costs at the family's deployment: parameters, active ones, bytes, forward FLOPs a token.

    All whole numbers; with a table of measured latencies also `latency`, in its unit of time.
    """
    keys = {"memory": "memory_bytes", "flops": "flops_per_token"}
    units = ("parameters", "active_parameters", "memory", "flops")
    found: dict[str, float] = {
        keys.get(unit, unit): math.ceil(family.selection_cost(selection, unit)) for unit in units
    }
    if family.latency is not None:
        found["latency"] = family.selection_cost(selection, "latency")
    return found


FFN_BLOCKS = 8
"""Of a family made without a recipe, and of a recipe that says nothing."""
_TILE = 128
"""Widths of GEMMs that FP8 kernels and tensor parallelism handle well are multiples of this."""


def _grid(full: int, step: int, least: int = 1) -> tuple[int, ...]:
    """The full size and the multiples of `step` below it, down to half of it."""
    return (full, *(size for size in range(full - 1, 0, -1) if size % step == 0 and 2 * size >= full and size >= least))


def default_choices(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Choices for a parent without a recipe, from full sizes down to half of them.

    Widths are multiples of 128 (MLP ones of 512), or sixteenths of a small model's; Mamba heads are whole per group,
    experts multiples of 8. What published models keep whole is kept: attention heads, Mamba channels (narrowing heads
    costs less quality and saves more time), and depth, of which nobody knows the layers before the parent is ranked.
    """
    found = {}
    for axis, full in shape.full.items():
        if axis in ("attention_heads", "mamba_head_dim"):
            step = full
        elif axis == "mamba_heads":
            step = shape.mamba_groups
        elif axis == "experts":
            step = 8
        else:
            tile = 4 * _TILE if axis == "ffn" else _TILE
            step = tile if full >= 8 * tile else FFN_BLOCKS * max(1, full // (16 * FFN_BLOCKS))
        found[axis] = _grid(full, step, shape.top_k if axis == "experts" else 1)
    return found


def default_family(shape: ModelShape, shares: Sequence[float]) -> Family:
    """A family of a parent without a recipe: default choices, one budget for each share of its parameters."""
    budgets = tuple(Budget(f"p{100 * share:g}", share) for share in shares)
    return Family(shape=shape, ffn_blocks=FFN_BLOCKS, choices=default_choices(shape), budgets=budgets)
