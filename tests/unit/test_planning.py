"""Selections that reach a target: the search against trying all of them."""

import itertools
import math
from dataclasses import replace

import pytest

from megatron_elastic.budget import UNITS, Budget, Selection
from megatron_elastic.cost_model import Deployment
from megatron_elastic.family import Family
from megatron_elastic.planning import default_family, figures, nearest, propose, restricted
from tests.unit import published
from tests.unit.test_cost_model import CHOICES, SHAPE, TABLE

FAMILY = Family(
    shape=SHAPE,
    ffn_blocks=8,
    expert_blocks=2,
    choices={**CHOICES, "depth": (7, 5, 4)},
    depth_ranking=(5, 2, 0),
    budgets=(Budget("p100", 1.0), Budget("p50", 0.5)),
    deployment=Deployment(2, 16, 8),
    latency=TABLE,
)


def every() -> list[Selection]:
    axes = tuple(FAMILY.choices)
    return [
        FAMILY.select(dict(zip(axes, sizes, strict=True)))
        for sizes in itertools.product(*(FAMILY.choices[axis] for axis in axes))
    ]


EVERY = every()


@pytest.mark.parametrize("unit", UNITS)
def test_the_nearest_of_all(unit: str) -> None:
    costs = [FAMILY.selection_cost(selection, unit) for selection in EVERY]
    for fraction in (1.0, 0.8, 0.5, 0.31, 0.01):
        target = fraction * max(costs)
        selection = nearest(FAMILY, fraction, unit)
        reached = FAMILY.selection_cost(selection, unit)
        assert selection in EVERY
        # Latencies are sums of floats, taken here in another order.
        least = min(abs(value - target) for value in costs)
        assert abs(reached - target) == pytest.approx(least, rel=1e-9, abs=1e-9 * target)
        found = propose(FAMILY, target, unit, 20)
        assert len(found) == len(set(found)) == 20
        assert found[0] == selection
        distances = sorted(abs(value - target) for value in costs)[:20]
        mine = [abs(FAMILY.selection_cost(each, unit) - target) for each in found]
        assert mine == pytest.approx(distances, rel=1e-9, abs=1e-9 * target)
    assert nearest(FAMILY, 1.0, unit).within(FAMILY.full)
    assert nearest(FAMILY, 1.0) == FAMILY.full


def prior(selection: Selection) -> float:
    full = SHAPE.full
    logs = [math.log(selection.sizes[axis] / full[axis]) for axis in CHOICES]  # type: ignore[operator]
    mean = sum(logs) / len(logs)
    depth = 7 - len(selection.skipped)
    return sum((log - mean) ** 2 for log in logs) + math.log(depth / 7) ** 2


def test_within_the_tolerance_the_balanced_come_first() -> None:
    target = 0.5 * FAMILY.full_cost("parameters")
    close = [each for each in EVERY if abs(FAMILY.selection_cost(each) / target - 1) <= 0.03]
    found = propose(FAMILY, target, count=10, tolerance=0.03)
    assert [prior(each) for each in found] == pytest.approx(sorted(map(prior, close))[:10])
    assert len(close) > 10
    assert found != propose(FAMILY, target, count=10)
    # Where fewer are close than are asked for, the nearest of the others follow.
    more = propose(FAMILY, target, count=len(close) + 3, tolerance=0.03)
    assert set(more[:-3]) == set(close)
    assert all(abs(FAMILY.selection_cost(each) / target - 1) > 0.03 for each in more[-3:])


def test_an_axis_can_be_held() -> None:
    held = restricted(FAMILY, {"hidden": 10, "depth": 5})
    found = propose(held, 0.5 * FAMILY.full_cost("parameters"), count=5)
    assert {each.hidden for each in found} == {10}
    assert {each.skipped for each in found} == {(2, 5)}


def test_choices_without_a_recipe() -> None:
    family = default_family(published.shape("nemotron_nano_v2_12b"), (1.0, 0.5))
    assert family.choices["hidden"] == tuple(range(5120, 2559, -128))
    assert family.choices["ffn"] == tuple(range(20480, 10239, -512))
    assert family.choices["mamba_heads"] == tuple(range(128, 63, -8))
    assert (family.choices["mamba_head_dim"], family.choices["attention_heads"]) == ((80,), (40,))
    assert family.choices["depth"] == (62,)
    moe = default_family(published.shape("nemotron_3_nano_30b_a3b"), (1.0,)).choices
    assert moe["experts"] == tuple(range(128, 63, -8))
    assert moe["expert_ffn"] == (1856, *range(1792, 927, -128))
    # Of any size: they start whole, descend, and are what the blocks allow.
    for shape in (SHAPE, *(published.shape(name) for name in published.NAMES)):
        family = default_family(shape, (1.0,))
        for axis, order in family.orders.items():
            assert order.faults(family.choices[axis]) == []
        assert all(size >= shape.top_k for size in family.choices.get("experts", (shape.top_k,)))
    assert len(family.choices["experts"]) > 1


def test_figures() -> None:
    place = Deployment(1, 16, 8, "nvfp4")
    found = figures(replace(FAMILY, deployment=place, latency=None), FAMILY.full)
    assert all(isinstance(value, int) for value in found.values())
    assert found["parameters"] == FAMILY.full_cost("parameters")
    assert found["memory_bytes"] < figures(FAMILY, FAMILY.full)["memory_bytes"]
    assert set(found) == {"parameters", "active_parameters", "memory_bytes", "flops_per_token"}
    assert figures(FAMILY, FAMILY.full)["latency"] == FAMILY.full_cost("latency")
