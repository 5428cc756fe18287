"""From what a router prefers to one exact shape: the most probable selection that meets a target.

The choices that all layers share are enumerated, best first, as one batch of costs. Those of a layer of its own
(heterogeneous axes) add up over layers, so for each shared choice they are a knapsack: the most probable combination at
every cost, found by dynamic programming over cost in steps well below the tolerance.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_elastic.axes import AXES_OF_KIND
from megatron_elastic.budget import Budget, Selection
from megatron_elastic.family import Family

BATCH = 1 << 17
"""Shared choices whose cost is computed at once: a few MB a layer."""
STEPS_PER_LAYER = 4
"""Steps of cost in the knapsack, a layer and tolerance: rounding then spends at most an eighth of the tolerance."""

FINEST = 1e-6
"""Deviation from a target that is told from none, and the smallest step of cost: some MB of table."""

Scores = Mapping[str, Sequence[Sequence[float]]]
"""Log-probability of every choice: axis -> use -> choice."""


def decide(family: Family, budget: Budget, scores: Scores, tolerance: float, outer: Selection) -> Selection:
    """The most probable selection within a tolerance of a budget's target.

    Args:
        family: axes, choices and cost.
        budget: target and unit; a homogeneous one takes one choice for all layers.
        scores: of the router, without noise.
        tolerance: relative deviation that is as good as none.
        outer: the next larger budget's selection: nested selections come before others.

    Returns:
        The best one that is nested, else the best one, else the best of those about as near to the target as any
        (less than twice as far as the nearest).
    """
    target = budget.fraction * family.full_cost(budget.unit)
    for allowed in (_inside(family, outer), _inside(family, family.full)):
        found = _best(_Search(family, budget, scores, allowed), target, tolerance)
        if found is not None:
            return found
    # Nothing meets the target: the nearest there are.
    reach = max(tolerance, FINEST)
    while True:
        reach *= 2.0
        found = _best(_Search(family, budget, scores, _inside(family, family.full)), target, reach)
        if found is not None:
            return found


Allowed = Mapping[str, Sequence[Sequence[int]]]
"""Numbers of the choices that may be taken: axis -> use -> choices."""


def _inside(family: Family, outer: Selection) -> Allowed:
    """The choices that are not larger than another selection's."""
    limits = {**outer.sizes, "depth": len(family.shape.pattern) - len(outer.skipped)}
    found = {}
    for axis in family.axes:
        size, choices = limits[axis], family.choices[axis]
        sizes = size if isinstance(size, tuple) else (size,) * family.uses(axis)
        found[axis] = [[n for n, choice in enumerate(choices) if choice <= limit] for limit in sizes]
    return found


@dataclass(frozen=True)
class _Option:
    """One way to size one layer: its score, and the number of the choice on each of the layer's own axes."""

    score: float
    choices: tuple[int, ...]


class _Search:
    """The choices of one decision, split into those that layers share and those that each layer makes."""

    def __init__(self, family: Family, budget: Budget, scores: Scores, allowed: Allowed) -> None:
        self.family, self.formula = family, family.formula(budget.unit)
        self._made: dict[Any, tuple[tuple[int, ...], Tensor, Tensor]] = {}
        self.own = tuple(a for a in family.axes if family.uses(a) > 1) if budget.heterogeneous else ()
        self.shared = tuple(axis for axis in family.axes if axis not in self.own)
        self.allowed, self.scores = allowed, scores
        # A homogeneous budget on a heterogeneous axis: what every layer may take, and the sum of what they prefer.
        self.common = {a: sorted(set.intersection(*(set(use) for use in allowed[a]))) for a in self.shared}
        self.layers = sorted({number for axis in self.own for number in family.layers_with(axis)})

    def shared_choices(self) -> Iterator[Tensor]:
        """Batches of combinations of shared choices, `[n, shared axes]` int64."""
        every = itertools.product(*(self.common[axis] for axis in self.shared))
        while batch := list(itertools.islice(every, BATCH)):
            yield torch.tensor(batch, dtype=torch.int64).view(len(batch), len(self.shared))

    def shared_scores(self, picks: Tensor) -> Tensor:
        """Log-probability of each combination, `[n]`."""
        total = torch.zeros(len(picks), dtype=torch.float64)
        for column, axis in enumerate(self.shared):
            table = torch.tensor(self.scores[axis], dtype=torch.float64).mean(0)
            total += table[picks[:, column]]
        return total

    def _kept_layers(self, numbers: Sequence[int]) -> Tensor:
        """How many of some layers are kept, for every choice of depth, `[choices]`."""
        family = self.family
        skipped = [set(family.skipped(depth)) for depth in family.choices["depth"]]
        return torch.tensor([sum(n not in left for n in numbers) for left in skipped], dtype=torch.float64)

    def _tables(self, kind: str, own: Mapping[str, int]) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """What a layer costs, and its buffers, for every combination of the shared choices that concern it.

        Args:
            kind: of the layer.
            own: size on its own axes.

        Returns:
            Columns of the picks, and two tables with a dimension for each.
        """
        key = kind, tuple(own.items())
        if key not in self._made:
            family = self.family
            axes = [axis for axis in self.shared if axis == "hidden" or axis in AXES_OF_KIND[kind]]
            every = [family.choices[axis] for axis in axes]
            sizes = [{**dict(zip(axes, kept, strict=True)), **own} for kept in itertools.product(*every)]
            shape = [len(each) for each in every]
            made = [
                torch.tensor([float(of(kind, each)) for each in sizes], dtype=torch.float64).view(shape)
                for of in (self.formula.layer, self.formula.buffer)
            ]
            self._made[key] = tuple(self.shared.index(axis) for axis in axes), made[0], made[1]
        return self._made[key]

    def cost(self, picks: Tensor, own: Mapping[str, Sequence[int]]) -> Tensor:
        """Cost of each combination with the layers' own choices, `[n]`.

        Args:
            picks: numbers of the shared choices, `[n, shared axes]`.
            own: own axis -> number of the choice of each layer that has it.
        """
        family = self.family
        outside = [float(self.formula.outside(hidden)) for hidden in family.choices["hidden"]]
        total = torch.tensor(outside, dtype=torch.float64)[picks[:, self.shared.index("hidden")]]
        buffers, depth = torch.zeros_like(total), picks[:, self.shared.index("depth")]
        groups: dict[tuple[str, tuple[tuple[str, int], ...]], list[int]] = {}
        for number, kind in enumerate(family.shape.pattern):
            sizes = tuple(
                (axis, family.choices[axis][own[axis][family.layers_with(axis).index(number)]])
                for axis in self.own_axes(number)
            )
            groups.setdefault((kind, sizes), []).append(number)
        for (kind, sizes), numbers in groups.items():
            columns, layer, buffer = self._tables(kind, dict(sizes))
            place = tuple(picks[:, column] for column in columns)
            kept = self._kept_layers(numbers)[depth]
            total = total + kept * layer[place]
            buffers = torch.maximum(buffers, (kept > 0) * buffer[place])
        return total + buffers

    def extreme(self, largest: bool) -> dict[str, list[int]]:
        """The largest (or smallest) own choice of every layer."""
        return {axis: [use[0 if largest else -1] for use in self.allowed[axis]] for axis in self.own}

    def options(self, layer: int) -> list[_Option]:
        """Every way to size one layer on its own axes."""
        axes = self.own_axes(layer)
        uses = {axis: self.family.layers_with(axis).index(layer) for axis in axes}
        return [
            _Option(sum(self.scores[a][uses[a]][n] for a, n in zip(axes, numbers, strict=True)), numbers)
            for numbers in itertools.product(*(self.allowed[axis][uses[axis]] for axis in axes))
        ]

    def own_axes(self, layer: int) -> tuple[str, ...]:
        """The axes on which a layer chooses for itself."""
        return tuple(axis for axis in self.own if layer in self.family.layers_with(axis))

    def with_option(self, own: Mapping[str, Sequence[int]], layer: int, option: _Option) -> dict[str, list[int]]:
        """The own choices with one layer's replaced."""
        changed = {axis: list(numbers) for axis, numbers in own.items()}
        for axis, number in zip(self.own_axes(layer), option.choices, strict=True):
            changed[axis][self.family.layers_with(axis).index(layer)] = number
        return changed

    def selection(self, pick: Tensor, own: Mapping[str, Sequence[int]]) -> Selection:
        """The selection of one combination."""
        choices = self.family.choices
        sizes: dict[str, int | tuple[int, ...]] = {
            axis: choices[axis][number] for axis, number in zip(self.shared, pick.tolist(), strict=True)
        }
        sizes.update((axis, tuple(choices[axis][number] for number in numbers)) for axis, numbers in own.items())
        return self.family.select(sizes)


def _best(search: _Search, target: float, tolerance: float) -> Selection | None:
    """The most probable selection within the tolerance, or None."""
    low, high = target * (1.0 - tolerance), target * (1.0 + tolerance)
    found: list[tuple[Tensor, Tensor]] = []
    smallest, largest = search.extreme(False), search.extreme(True)
    for picks in search.shared_choices():
        reachable = (search.cost(picks, smallest) <= high) & (search.cost(picks, largest) >= low)
        found.append((picks[reachable], search.shared_scores(picks[reachable])))
    if not found:
        return None
    picks, scores = torch.cat([p for p, _ in found]), torch.cat([s for _, s in found])
    order = scores.argsort(descending=True, stable=True)
    if not search.own:
        return search.selection(picks[order[0]], {}) if len(order) else None
    options = {layer: search.options(layer) for layer in search.layers}
    most = sum(max(option.score for option in each) for each in options.values())
    best: tuple[float, Selection] | None = None
    for index in order.tolist():
        if best is not None and float(scores[index]) + most <= best[0]:
            break  # the shared choices that follow are less probable whatever their layers choose
        own = _knapsack(search, picks[index : index + 1], options, low, high)
        if own is not None and (best is None or float(scores[index]) + own[0] > best[0]):
            best = float(scores[index]) + own[0], search.selection(picks[index], own[1])
    return None if best is None else best[1]


def _knapsack(
    search: _Search, pick: Tensor, options: Mapping[int, Sequence[_Option]], low: float, high: float
) -> tuple[float, dict[str, list[int]]] | None:
    """The most probable own choices at a cost in `[low, high]`, score and numbers; None where there are none."""
    start = search.extreme(False)
    base = float(search.cost(pick, start))
    step = max((high - low) / 2.0 / (STEPS_PER_LAYER * len(search.layers)), FINEST * high)
    bins = max(1, int((high - base) / step) + 1)
    best = torch.full((bins,), -torch.inf, dtype=torch.float64)
    best[0] = 0.0
    shifts = {
        layer: [
            round((float(search.cost(pick, search.with_option(start, layer, option))) - base) / step)
            for option in options[layer]
        ]
        for layer in search.layers
    }
    taken: list[Tensor] = []
    for layer in search.layers:
        following = torch.full_like(best, -torch.inf)
        choice = torch.zeros(bins, dtype=torch.int64)
        for number, (option, shift) in enumerate(zip(options[layer], shifts[layer], strict=True)):
            if shift >= bins:
                continue
            reached = best[: bins - shift] + option.score
            better = reached > following[shift:]
            following[shift:][better] = reached[better]
            choice[shift:][better] = number
        best = following
        taken.append(choice)
    for end in best.argsort(descending=True, stable=True).tolist():
        if best[end] == -torch.inf:
            return None
        if not low - step * len(search.layers) <= base + end * step:
            continue
        own, place = start, end
        for layer, choice in zip(reversed(search.layers), reversed(taken), strict=True):
            number = int(choice[place])
            own = search.with_option(own, layer, options[layer][number])
            place -= shifts[layer][number]
        if low <= float(search.cost(pick, own)) <= high:
            return float(best[end]), own
    return None
