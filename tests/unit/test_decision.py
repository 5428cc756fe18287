"""Decisions against brute force: the most probable selection within a tolerance, of layers that differ too."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_elastic.budget import Budget, Selection
from megatron_elastic.cost_model import Deployment
from megatron_elastic.decision import STEPS_PER_LAYER, decide
from megatron_elastic.family import Family
from tests.unit import small_family
from tests.unit.small_family import AXES, every_selection

UNITS = ("parameters", "active_parameters", "memory", "flops")
# Fewer choices on the axes that all layers share: brute force runs over 2000 combinations.
SHORT = Deployment(context=32, prefill_chunk=32)  # a long one is nearly all of what so small a model costs
FAMILY, VARIED = (dataclasses.replace(f, deployment=SHORT) for f in (small_family.FAMILY, small_family.VARIED))
FEW = {**FAMILY.choices, "hidden": (12, 8, 6), "mamba_head_dim": (2,), "attention_heads": (8,), "depth": (5, 3)}
SMALL = dataclasses.replace(VARIED, choices=FEW)
Scores = dict[str, list[list[float]]]


def random_scores(family: Family, seed: int) -> Scores:
    """Log-probabilities of every use of every axis."""
    generator = torch.Generator().manual_seed(seed)
    return {
        axis: torch.randn(family.uses(axis), len(family.choices[axis]), generator=generator, dtype=torch.float64)
        .mul(3.0)
        .log_softmax(1)
        .tolist()
        for axis in family.axes
    }


def combinations(family: Family) -> Iterator[dict[str, tuple[int, ...]]]:
    """Axis -> number of the choice of every use."""
    uses = {axis: product(range(len(family.choices[axis])), repeat=family.uses(axis)) for axis in family.axes}
    for picks in product(*uses.values()):
        yield dict(zip(uses, picks, strict=True))


def selection_of(family: Family, picks: dict[str, tuple[int, ...]]) -> Selection:
    sizes = {axis: tuple(family.choices[axis][number] for number in numbers) for axis, numbers in picks.items()}
    return family.select({axis: kept if len(kept) > 1 else kept[0] for axis, kept in sizes.items()})


def score_of(picks: dict[str, tuple[int, ...]], scores: Scores) -> float:
    return sum(scores[axis][use][number] for axis, numbers in picks.items() for use, number in enumerate(numbers))


@functools.cache
def everything(differ: bool, unit: str) -> list[tuple[dict[str, tuple[int, ...]], float, Selection]]:
    """Every combination of FAMILY (or of SMALL, whose layers differ), its cost and its selection."""
    family = SMALL if differ else FAMILY
    made = [(picks, selection_of(family, picks)) for picks in combinations(family)]
    return [(picks, family.selection_cost(selection, unit), selection) for picks, selection in made]


def by_force(family: Family, unit: str, scores: Scores) -> list[tuple[float, float, Selection]]:
    """Score, cost and selection of everything that there is."""
    return [(score_of(picks, scores), cost, kept) for picks, cost, kept in everything(family is SMALL, unit)]


def reachable(family: Family, unit: str, rank: float) -> Budget:
    """A budget whose target is the cost at some place in the order of all costs."""
    costs = sorted(cost for _, cost, _ in everything(family is SMALL, unit))
    return Budget("small", costs[int(rank * len(costs))] / family.full_cost(unit), unit)


def deviation(family: Family, budget: Budget) -> Callable[[float], float]:
    target = budget.fraction * family.full_cost(budget.unit)
    return lambda cost: abs(cost / target - 1.0)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("rank", [0.8, 0.5])
def test_a_homogeneous_decision_is_the_best_there_is(unit: str, rank: float) -> None:
    for seed in range(3):
        scores, budget = random_scores(FAMILY, seed), reachable(FAMILY, unit, rank)
        off = deviation(FAMILY, budget)
        met = [each for each in by_force(FAMILY, unit, scores) if off(each[1]) <= 0.03]
        assert len(met) > 3
        best = max(met, key=lambda each: each[0])
        assert decide(FAMILY, budget, scores, 0.03, FAMILY.full) == best[2]
        assert best[0] > min(each[0] for each in met)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), unit=st.sampled_from(UNITS), rank=st.sampled_from([0.8, 0.5, 0.2]))
def test_a_decision_on_layers_that_differ_is_as_good_as_its_steps(seed: int, unit: str, rank: float) -> None:
    budget, scores, tolerance = reachable(SMALL, unit, rank), random_scores(SMALL, seed), 0.04
    off = deviation(SMALL, budget)
    every = by_force(SMALL, unit, scores)
    met = [each for each in every if off(each[1]) <= tolerance]
    # A combination's place in the table is off by half a step a layer, and so is the one that is found there.
    sure = [each[0] for each in met if off(each[1]) <= tolerance * (1.0 - 1.0 / STEPS_PER_LAYER)]
    decided = decide(SMALL, budget, scores, tolerance, SMALL.full)
    assert off(SMALL.selection_cost(decided, unit)) <= tolerance
    # Layers that are left out have sizes too, which cost nothing and count in the score: one number may be several.
    reached = max(each[0] for each in every if each[2] == decided)
    assert reached <= max(each[0] for each in met)
    assert reached >= max(sure)
    assert decide(SMALL, budget, scores, tolerance, SMALL.full) == decided


def test_layers_are_decided_each_by_its_own_scores() -> None:
    scores = random_scores(SMALL, 1)
    for axis in SMALL.axes:
        scores[axis] = [[0.0] * len(SMALL.choices[axis])] * SMALL.uses(axis)
    scores["ffn"] = [[0.0, -9.0, -9.0, -9.0], [-9.0, -9.0, -9.0, 0.0]]
    scores["hidden"] = [[0.0, -99.0, -99.0]]
    budget = Budget("small", 0.85)
    assert decide(SMALL, budget, scores, 0.1, SMALL.full).ffn == (32, 8)
    scores["ffn"].reverse()
    assert decide(SMALL, budget, scores, 0.1, SMALL.full).ffn == (8, 32)


@pytest.mark.parametrize("seed", range(4))
def test_nested_ones_come_first(seed: int) -> None:
    scores, budget = random_scores(FAMILY, seed), Budget("small", 0.5)
    outer = decide(FAMILY, Budget("medium", 0.75), random_scores(FAMILY, seed + 50), 0.03, FAMILY.full)
    off = deviation(FAMILY, budget)
    met = [each for each in by_force(FAMILY, "parameters", scores) if off(each[1]) <= 0.03]
    nested = [each for each in met if each[2].within(outer)]
    decided = decide(FAMILY, budget, scores, 0.03, outer)
    assert decided == max(nested or met, key=lambda each: each[0])[2]
    # Without a larger budget the best one of all is taken.
    assert decide(FAMILY, budget, scores, 0.03, FAMILY.full) == max(met, key=lambda each: each[0])[2]


def test_nesting_decides_somewhere() -> None:
    """Otherwise the test before would hold without it."""
    scores, budget = random_scores(FAMILY, 3), Budget("small", 0.5)
    outer = FAMILY.select({**FAMILY.full.sizes, "hidden": 8})
    assert decide(FAMILY, budget, scores, 0.03, outer).within(outer)
    scores["hidden"] = [[0.0, -9.0, -9.0, -9.0, -9.0]]
    assert not decide(FAMILY, budget, scores, 0.03, FAMILY.full).within(outer)
    assert decide(FAMILY, budget, scores, 0.03, outer).within(outer)


@pytest.mark.parametrize("seed", range(3))
def test_layers_that_differ_nest_layer_by_layer(seed: int) -> None:
    medium = decide(SMALL, Budget("medium", 0.75), random_scores(SMALL, seed), 0.03, SMALL.full)
    small = decide(SMALL, Budget("small", 0.5), random_scores(SMALL, seed + 9), 0.03, medium)
    assert small.within(medium)
    assert not medium.within(small)


@pytest.mark.parametrize("seed", range(3))
def test_a_homogeneous_budget_of_a_heterogeneous_family_decides_for_all_layers(seed: int) -> None:
    scores, budget = random_scores(VARIED, seed), Budget("small", 0.6, heterogeneous=False)
    together = {axis: torch.tensor(rows).mean(0, keepdim=True).tolist() for axis, rows in scores.items()}
    found = decide(VARIED, budget, scores, 0.03, VARIED.full)
    assert found == decide(FAMILY, budget, together, 0.03, FAMILY.full)
    assert not any(isinstance(size, tuple) for size in found.sizes.values())


def test_it_is_nested_in_layers_that_differ_only_below_the_smallest() -> None:
    outer = dataclasses.replace(VARIED.full, ffn=(16, 24))
    budget = Budget("small", 0.5, heterogeneous=False)
    found = decide(VARIED, budget, random_scores(VARIED, 5), 0.05, outer)
    assert found.within(outer)
    assert isinstance(found.ffn, int)
    assert found.ffn <= 16


@pytest.mark.parametrize("family", [FAMILY, SMALL], ids=["homogeneous", "heterogeneous"])
@pytest.mark.parametrize("tolerance", [0.0, 1e-5])
def test_without_one_that_meets_the_target_one_about_as_near_as_any_is_taken(family: Family, tolerance: float) -> None:
    budget = Budget("small", 0.6123)
    off = deviation(family, budget)
    nearest = min(off(family.selection_cost(selection_of(family, picks))) for picks in combinations(family))
    assert nearest > tolerance
    decided = decide(family, budget, random_scores(family, 2), tolerance, family.full)
    assert nearest <= off(family.selection_cost(decided)) <= 2.0 * nearest + 1e-9


def test_brute_force_knows_every_selection() -> None:
    assert {selection_of(FAMILY, picks) for picks in combinations(FAMILY)} == set(every_selection())
    assert tuple(FAMILY.axes) == AXES
