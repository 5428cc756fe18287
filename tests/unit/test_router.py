"""The router: noise, schedules, probabilities and penalty."""

import dataclasses
import math
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_elastic.budget import Selection
from megatron_elastic.family import Family
from megatron_elastic.masks import one_hot
from megatron_elastic.router import RouterConfig, gumbel_noise
from tests.unit.small_family import AXES, FAMILY, VARIED, narrow
from tests.unit.small_router import CONFIG, PARENT, cost, make

SMALL = narrow(hidden=8, ffn=16, mamba_heads=8, attention_heads=4)
SMALLEST = FAMILY.select({axis: FAMILY.choices[axis][-1] for axis in AXES})


def noise(size: int = 4, **coordinates: Any) -> Tensor:
    return gumbel_noise(size, **{"seed": 7, "step": 3, "budget": 1, "axis": "ffn", **coordinates})


# Noise.


def test_noise_is_the_same_in_another_process() -> None:
    call = "gumbel_noise(4, seed=7, step=3, budget=1, axis='ffn', draw=5, layer=2).tolist()"
    code = f"from megatron_elastic.router import gumbel_noise; print({call})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(noise(draw=5, layer=2).tolist())


def test_noise_does_not_depend_on_the_order_of_the_draws() -> None:
    coordinates = [{"step": step, "axis": axis} for step in range(5) for axis in AXES]
    forward = [noise(**c) for c in coordinates]
    backward = [noise(**c) for c in reversed(coordinates)]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))


@pytest.mark.parametrize(
    "other", [{"seed": 8}, {"step": 4}, {"budget": 2}, {"axis": "hidden"}, {"draw": 1}, {"layer": 1}]
)
def test_every_coordinate_counts(other: dict[str, Any]) -> None:
    assert torch.equal(noise(), noise())
    assert not torch.isclose(noise(), noise(**other)).any()


@pytest.mark.parametrize("other", [{"axis": "hidden"}, {"budget": 2}, {"seed": 8}, {"draw": 1}, {"shift": 1}])
def test_noise_is_independent(other: dict[str, Any]) -> None:
    shift = other.pop("shift", 0)
    a = torch.cat([noise(step=step) for step in range(2000)])
    b = torch.cat([noise(step=step + shift, **other) for step in range(2000)])
    # The correlation of 8000 independent pairs has a deviation of 0.011.
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.05


def test_noise_is_gumbel() -> None:
    drawn = torch.cat([noise(step=step) for step in range(5000)]).double()
    # Deviations with 20000 draws: 0.009 of the mean, 0.024 of the variance.
    assert drawn.mean().item() == pytest.approx(0.5772, abs=0.04)
    assert drawn.var().item() == pytest.approx(math.pi**2 / 6, abs=0.1)
    distribution = torch.exp(-torch.exp(-drawn.sort().values))
    # Kolmogorov and Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand.
    assert (distribution - (torch.arange(20000) + 0.5) / 20000).abs().max() < 1.95 / 20000**0.5


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    before = noise()
    router = make()
    router.probabilities(1, "ffn", 3)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(noise(), before)
    assert all(torch.equal(a, b) for a, b in zip(make().parameters(), router.parameters(), strict=True))
    assert not torch.equal(next(make(seed=5).parameters()), next(router.parameters()))


# Schedules.


def test_temperature_falls_exponentially() -> None:
    temperatures = [CONFIG.temperature_at(step) for step in range(50)]
    assert temperatures[0] == 1.0
    assert temperatures[-1] == pytest.approx(0.05)
    ratios = [b / a for a, b in pairwise(temperatures)]
    assert ratios == pytest.approx([0.05 ** (1 / 49)] * 49)
    assert CONFIG.temperature_at(1000) == temperatures[-1]


def test_scale_rises_linearly() -> None:
    assert CONFIG.scale_at(0) == 1.0
    assert CONFIG.scale_at(49) == CONFIG.scale_at(99) == 10.0
    assert CONFIG.scale_at(7) - CONFIG.scale_at(6) == pytest.approx(9 / 49)


def test_learning_rate_warms_up_once() -> None:
    assert [CONFIG.learning_rate_at(step) for step in (0, 4, 9, 10, 49)] == pytest.approx(
        [1e-3, 5e-3, 1e-2, 1e-2, 1e-2]
    )
    assert dataclasses.replace(CONFIG, warmup=0).learning_rate_at(0) == 1e-2


def test_the_papers_values_are_the_defaults() -> None:
    default = RouterConfig(iterations=1)
    assert (default.temperature, default.scale) == ((1.0, 0.05), (1.0, 10.0))
    assert (default.learning_rate, default.warmup, default.width, default.penalty) == (1e-2, 60, 256, 1.0)


# Probabilities.


@pytest.mark.parametrize("family", [FAMILY, VARIED], ids=["homogeneous", "heterogeneous"])
@pytest.mark.parametrize("step", [0, 25, 49, 80])
def test_probabilities_sum_to_one(step: int, family: Family) -> None:
    router = make(family)
    for budget in range(3):
        for axis in AXES:
            made = router.probabilities(budget, axis, step)
            assert made.shape == (family.uses(axis), len(FAMILY.choices[axis]))
            # fp32 softmax of at most five numbers.
            assert made.sum(1).tolist() == pytest.approx([1.0] * family.uses(axis), abs=1e-6)


def test_the_full_budget_is_pinned() -> None:
    router = make()
    for axis in AXES:
        made = router.probabilities(0, axis, 3)
        assert made.tolist() == [[1.0] + [0.0] * (len(FAMILY.choices[axis]) - 1)]
        assert not made.requires_grad
        assert router.probabilities(1, axis, 3).requires_grad
    assert [router.pinned(budget) for budget in range(3)] == [True, False, False]


def test_noise_can_be_left_out() -> None:
    router = make()
    quiet = router.probabilities(1, "ffn", 3, noise=False)
    assert torch.equal(quiet, torch.softmax(router.logits({1: 1.0}, "ffn", 3) / CONFIG.temperature_at(3), dim=-1))
    assert not torch.allclose(quiet, router.probabilities(1, "ffn", 3))


def test_budgets_and_axes_have_nets_of_their_own() -> None:
    router = make()
    assert not torch.allclose(router.logits({1: 1.0}, "ffn", 0), router.logits({2: 1.0}, "ffn", 0))
    (gradient,) = torch.autograd.grad(
        router.logits({1: 1.0}, "ffn", 0).sum(), router.nets["hidden"][0].weight, allow_unused=True
    )
    assert gradient is None


def test_layers_that_choose_for_themselves_do() -> None:
    router = make(VARIED)
    made = router.probabilities(1, "ffn", 3)
    assert not torch.allclose(made[0], made[1])
    quiet = router.probabilities(1, "ffn", 3, noise=False)
    assert not torch.allclose(quiet[0], quiet[1])


def test_a_homogeneous_budget_makes_one_choice_for_all_layers() -> None:
    budgets = (*FAMILY.budgets[:2], dataclasses.replace(FAMILY.budgets[2], heterogeneous=False))
    router = make(dataclasses.replace(VARIED, budgets=budgets))
    for noise in (True, False):
        made = router.probabilities(2, "ffn", 3, noise=noise)
        assert torch.equal(made[0], made[1])
        other = router.probabilities(1, "ffn", 3, noise=noise)
        assert not torch.allclose(other[0], other[1])
    # What every layer says counts.
    weight = router.nets["ffn"][2].weight
    (gradient,) = torch.autograd.grad(router.probabilities(2, "ffn", 3)[0, 0], weight)
    assert (gradient.view(2, 4, -1).abs().sum((1, 2)) > 0).all()


# Cost and penalty.


def certain(selection: Selection) -> dict[str, Tensor]:
    return one_hot(selection, FAMILY)


def test_the_expected_cost_at_one_hot_is_the_cost() -> None:
    router = make()
    for selection in (FAMILY.full, SMALL, SMALLEST):
        for budget, target in enumerate(FAMILY.budgets):
            share = cost(selection) / (target.fraction * PARENT)
            # Sizes are exact; one division in fp64.
            assert router.expected_cost(budget, certain(selection)).item() == pytest.approx(share, rel=1e-14)


def test_the_expected_cost_knows_layers_that_differ() -> None:
    selection = dataclasses.replace(narrow(ffn=(8, 24), mamba_heads=(12, 4), hidden=10), skipped=FAMILY.skipped(4))
    assert make(VARIED).expected_cost(0, one_hot(selection, VARIED)).item() == pytest.approx(
        cost(selection) / PARENT, rel=1e-14
    )
    other = dataclasses.replace(selection, ffn=(24, 8), mamba_heads=(4, 12))  # one of its Mamba layers is skipped
    assert cost(other) != cost(selection)


def test_the_penalty_is_the_deviation_outside_its_dead_zone() -> None:
    small, strict = SMALL, make(dead_zone=0.0)
    deviation = abs(strict.expected_cost(1, certain(small)).item() - 1)
    assert deviation > 0.1
    assert strict.penalty(1, certain(small)).item() == pytest.approx(deviation)
    assert make(dead_zone=0.05).penalty(1, certain(small)).item() == pytest.approx(deviation - 0.05)
    assert make(dead_zone=deviation + 0.01).penalty(1, certain(small)).item() == 0.0
    assert strict.penalty(0, certain(FAMILY.full)).item() == 0.0


@pytest.mark.parametrize(("selection", "sign"), [(FAMILY.full, 1), (SMALLEST, -1)])
def test_the_penalty_pushes_towards_the_target(selection: Selection, sign: int) -> None:
    made = {axis: p.requires_grad_() for axis, p in certain(selection).items()}
    make().penalty(1, made).backward()  # type: ignore[no-untyped-call]
    for axis in AXES:
        assert made[axis].grad is not None
        # The larger the choice, the more its probability costs: wanted above the target, unwanted below.
        order = (made[axis].grad[0] * sign).argsort(descending=True)
        assert order.tolist() == list(range(len(FAMILY.choices[axis])))
