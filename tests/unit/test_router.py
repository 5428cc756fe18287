"""The router: noise, schedules, penalty, its own optimizer, and what it decides."""

import dataclasses
import math
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_elastic.axes import AXES
from megatron_elastic.budget import Selection
from megatron_elastic.cost_model import parameters, selections
from megatron_elastic.masks import one_hot
from megatron_elastic.router import Router, RouterConfig, RouterTrainer, gumbel_noise
from tests.unit.small_family import FAMILY, SHAPE

CONFIG = RouterConfig(iterations=50, width=16, std=0.5, warmup=10)
WEIGHTS = (0.5, 0.3, 0.2)
PARENT = parameters(SHAPE, SHAPE.full)


def make(**changes: Any) -> Router:
    config = dataclasses.replace(CONFIG, **changes)
    return Router(config, shape=SHAPE, choices=FAMILY.choices, budgets=FAMILY.budgets)


def table_router(*wanted: Selection, sharpness: float = 8.0, **changes: Any) -> Router:
    """A router whose nets say exactly: budget `i` wants `wanted[i]`."""
    router = make(width=len(wanted), scale=(1.0, 1.0), **changes)
    with torch.no_grad():
        for axis in AXES:
            first, _, last = router.nets[axis]
            first.weight.copy_(torch.eye(len(wanted)))
            last.weight.copy_(torch.stack([one_hot(s, FAMILY.choices)[axis] for s in wanted], dim=1) * sharpness)
    return router


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


@pytest.mark.parametrize("step", [0, 25, 49, 80])
def test_probabilities_sum_to_one(step: int) -> None:
    router = make()
    for budget in range(3):
        for axis in AXES:
            made = router.probabilities(budget, axis, step)
            assert made.shape == (len(FAMILY.choices[axis]),)
            # fp32 softmax of at most five numbers.
            assert made.sum().item() == pytest.approx(1.0, abs=1e-6)


def test_the_full_budget_is_pinned() -> None:
    router = make()
    for axis in AXES:
        made = router.probabilities(0, axis, 3)
        assert made.tolist() == [1.0] + [0.0] * (len(FAMILY.choices[axis]) - 1)
        assert not made.requires_grad
        assert router.probabilities(1, axis, 3).requires_grad
    assert [router.pinned(budget) for budget in range(3)] == [True, False, False]


def test_noise_can_be_left_out() -> None:
    router = make()
    quiet = router.probabilities(1, "ffn", 3, noise=False)
    assert torch.equal(quiet, torch.softmax(router.logits(1, "ffn", 3) / CONFIG.temperature_at(3), dim=-1))
    assert not torch.allclose(quiet, router.probabilities(1, "ffn", 3))


def test_budgets_and_axes_have_nets_of_their_own() -> None:
    router = make()
    assert not torch.allclose(router.logits(1, "ffn", 0), router.logits(2, "ffn", 0))
    (gradient,) = torch.autograd.grad(
        router.logits(1, "ffn", 0).sum(), router.nets["hidden"][0].weight, allow_unused=True
    )
    assert gradient is None


# Cost and penalty.


def certain(selection: Selection) -> dict[str, Tensor]:
    return one_hot(selection, FAMILY.choices)


def test_the_expected_cost_at_one_hot_is_the_cost() -> None:
    router = make()
    for selection in (FAMILY.full, Selection(8, 16, 8, 4), Selection(6, 8, 4, 4)):
        for budget, target in enumerate(FAMILY.budgets):
            share = parameters(SHAPE, selection.as_dict()) / (target.fraction * PARENT)
            # Sizes are exact; one division in fp64.
            assert router.expected_cost(budget, certain(selection)).item() == pytest.approx(share, rel=1e-14)


def test_the_penalty_is_the_deviation_outside_its_dead_zone() -> None:
    small, strict = Selection(8, 16, 8, 4), make(dead_zone=0.0)
    deviation = abs(strict.expected_cost(1, certain(small)).item() - 1)
    assert deviation > 0.1
    assert strict.penalty(1, certain(small)).item() == pytest.approx(deviation)
    assert make(dead_zone=0.05).penalty(1, certain(small)).item() == pytest.approx(deviation - 0.05)
    assert make(dead_zone=deviation + 0.01).penalty(1, certain(small)).item() == 0.0
    assert strict.penalty(0, certain(FAMILY.full)).item() == 0.0


@pytest.mark.parametrize(("selection", "sign"), [(FAMILY.full, 1), (Selection(6, 8, 4, 4), -1)])
def test_the_penalty_pushes_towards_the_target(selection: Selection, sign: int) -> None:
    made = {axis: p.requires_grad_() for axis, p in certain(selection).items()}
    make().penalty(1, made).backward()  # type: ignore[no-untyped-call]
    for axis in AXES:
        assert made[axis].grad is not None
        # The larger the choice, the more its probability costs: wanted above the target, unwanted below.
        order = (made[axis].grad * sign).argsort(descending=True)
        assert order.tolist() == list(range(len(FAMILY.choices[axis])))


# The trainer.


def kd_gradients(budgets: int = 3) -> Tensor:
    return torch.randn(budgets * len(AXES), 5, generator=torch.Generator().manual_seed(1))


def backward(trainer: RouterTrainer, step: int, seed: int = 1) -> None:
    """What the microbatches' backwards leave on the leaves."""
    for budget in range(3):
        for number, axis in enumerate(AXES):
            leaf = trainer.leaves(step, budget)[axis]
            row = torch.randn(3 * len(AXES), 5, generator=torch.Generator().manual_seed(seed))
            (leaf * row[budget * len(AXES) + number, : len(leaf)]).sum().backward()  # type: ignore[no-untyped-call]


def test_leaves_are_made_once_a_step() -> None:
    trainer = RouterTrainer(make(), WEIGHTS)
    leaves = trainer.leaves(3, 1)
    for axis in AXES:
        assert leaves[axis].is_leaf
        assert leaves[axis].requires_grad
        assert torch.equal(leaves[axis], trainer.router.probabilities(1, axis, 3))
    assert trainer.leaves(3, 1) is leaves
    assert trainer.leaves(4, 1) is not leaves


@pytest.mark.parametrize("axis", AXES)
def test_the_loss_reaches_every_axis_net(axis: str) -> None:
    trainer = RouterTrainer(make(penalty=0.0), WEIGHTS)
    net = trainer.router.nets[axis]
    for gradient in torch.autograd.grad(trainer.loss(3, kd_gradients()), list(net.parameters())):
        assert gradient.abs().sum() > 0
    # Without gradients of the KD loss and without penalty there is nothing to learn from.
    for gradient in torch.autograd.grad(trainer.loss(3, torch.zeros(12, 5)), list(net.parameters())):
        assert gradient.abs().sum() == 0


def test_the_loss_is_the_kd_loss_to_first_order() -> None:
    """Its gradient is that of a KD loss which is a function of the probabilities, penalty and weights included."""
    router = make(penalty=0.7)
    trainer = RouterTrainer(router, WEIGHTS)

    def kd() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for budget in range(3):
            for number, axis in enumerate(AXES):
                made = trainer.leaves(3, budget)[axis] if leaves else router.probabilities(budget, axis, 3)
                total = total + (made.double() * (number + 1.5 * budget)).sin().sum()
        return total

    leaves = True
    kd().backward()  # type: ignore[no-untyped-call]
    trainer.reduce(torch.tensor(1))
    assert trainer._pending is not None
    got = torch.autograd.grad(trainer.loss(3, trainer._pending), list(router.parameters()))
    leaves, penalties = False, torch.zeros((), dtype=torch.float64)
    for budget, weight in enumerate(WEIGHTS):
        made = {axis: router.probabilities(budget, axis, 3) for axis in AXES}
        penalties = penalties + weight * 0.7 * router.penalty(budget, made)
    want = torch.autograd.grad(kd() + penalties, list(router.parameters()))
    for a, b in zip(got, want, strict=True):
        # fp32 sums of five products.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(got[0], torch.autograd.grad(kd(), next(router.parameters()))[0], rtol=1e-3)


def steps_of(trainer: RouterTrainer) -> set[float]:
    return {float(state["step"]) for state in trainer.optimizer.state.values()}


def test_a_commit_steps_exactly_once() -> None:
    trainer = RouterTrainer(make(), WEIGHTS)
    before = [p.detach().clone() for p in trainer.router.parameters()]
    assert not trainer.commit()
    backward(trainer, 0)
    trainer.reduce(torch.tensor(10))
    assert trainer.commit()
    after = [p.detach().clone() for p in trainer.router.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True) if a.dim() == 2)
    assert steps_of(trainer) == {1.0}
    assert not trainer.commit()
    assert all(torch.equal(a, b) for a, b in zip(after, trainer.router.parameters(), strict=True))
    assert steps_of(trainer) == {1.0}


def test_a_new_step_forgets_what_was_not_committed() -> None:
    trainer = RouterTrainer(make(), WEIGHTS)
    backward(trainer, 0)
    trainer.reduce(torch.tensor(10))
    trainer.leaves(1, 1)
    assert not trainer.commit()


def test_a_rerun_of_reduce_overwrites() -> None:
    def after(*seeds: int) -> list[Tensor]:
        trainer = RouterTrainer(make(), WEIGHTS)
        for seed in seeds:
            backward(trainer, 0, seed)
            trainer.reduce(torch.tensor(10))
        trainer.commit()
        return [p.detach() for p in trainer.router.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(after(1, 2), after(2), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after(1, 2), after(1), strict=True))


def test_reduce_divides_by_the_tokens() -> None:
    trainer = RouterTrainer(make(), WEIGHTS)
    backward(trainer, 0)
    trainer.reduce(torch.tensor(4))
    pending = trainer._pending
    backward(trainer, 0)
    trainer.reduce(torch.tensor(8))
    assert pending is not None
    assert trainer._pending is not None
    assert torch.equal(pending, 2 * trainer._pending)
    assert pending.shape == (3 * len(AXES), max(map(len, FAMILY.choices.values())))


def test_commit_works_where_gradients_are_off() -> None:
    trainer = RouterTrainer(make(), WEIGHTS)
    backward(trainer, 0)
    trainer.reduce(torch.tensor(10))
    with torch.no_grad():  # as inside the backbone's optimizer step
        assert trainer.commit()


def test_the_gradient_is_clipped_and_the_rate_warms_up() -> None:
    trainer = RouterTrainer(make(clip=1e-3), WEIGHTS)
    for step in range(3):
        backward(trainer, step)
        trainer.reduce(torch.tensor(1))
        trainer.commit()
        assert trainer.optimizer.param_groups[0]["lr"] == trainer.router.config.learning_rate_at(step)
    norm = torch.stack([p.grad.norm() for p in trainer.router.parameters() if p.grad is not None]).norm()
    # Clipped to 1e-3 in fp32, with clip_grad_norm_'s 1e-6 in the denominator.
    assert norm.item() == pytest.approx(1e-3, rel=1e-2)


def test_state_restores_the_run() -> None:
    def run(trainer: RouterTrainer, steps: range) -> RouterTrainer:
        for step in steps:
            backward(trainer, step, seed=step)
            trainer.reduce(torch.tensor(1))
            trainer.commit()
        return trainer

    straight = run(RouterTrainer(make(), WEIGHTS), range(6))
    half, resumed = run(RouterTrainer(make(), WEIGHTS), range(3)), RouterTrainer(make(seed=99), WEIGHTS)
    assert set(half.tensors()) == set(resumed.tensors())
    with torch.no_grad():
        for name, tensor in resumed.tensors().items():
            tensor.copy_(half.tensors()[name])
    resumed.router.config = half.router.config
    run(resumed, range(3, 6))
    assert all(torch.equal(tensor, straight.tensors()[name]) for name, tensor in resumed.tensors().items())
    assert not torch.equal(half.tensors()["nets.ffn.0.weight"], straight.tensors()["nets.ffn.0.weight"])


def test_training_lowers_the_loss() -> None:
    """With a KD gradient that favours a small `ffn` and a penalty that forbids being small everywhere."""
    router = make(std=0.1, warmup=1, penalty=5.0)
    trainer, gradients = RouterTrainer(router, WEIGHTS), torch.zeros(12, 5)
    for budget in (1, 2):
        gradients[budget * 4 + AXES.index("ffn"), 0] = 1.0
    for step in range(50):
        trainer.leaves(step, 1)
        trainer._pending = gradients
        trainer.commit()
    assert router.probabilities(1, "ffn", 49, noise=False)[0] < 0.05
    assert abs(router.expected_cost(1, {a: router.probabilities(1, a, 49, noise=False) for a in AXES}) - 1) < 0.05


# Decisions.


def within(budget: int, tolerance: float = 0.02) -> list[Selection]:
    target = FAMILY.budgets[budget].fraction * PARENT
    every = selections(FAMILY.choices)
    return [s for s in every if abs(parameters(SHAPE, s.as_dict()) / target - 1) <= tolerance]


def test_the_most_probable_is_decided_where_it_meets_the_target() -> None:
    for medium in within(1)[:4]:
        nested = [small for small in within(2) if small.within(medium)]
        for small in nested[:2]:
            assert table_router(FAMILY.full, medium, small).decide(49) == (FAMILY.full, medium, small)


def test_a_most_probable_one_off_the_target_is_not() -> None:
    medium = Selection(6, 8, 4, 4)
    assert medium not in within(1)
    decided = table_router(FAMILY.full, medium, medium).decide(49)
    assert decided[1] in within(1)


def test_the_next_probable_within_the_target_is_taken() -> None:
    """One axis is wrong in the most probable selection: the decision differs from it as little as the target allows."""
    wanted = within(1)[0]
    wrong = dataclasses.replace(wanted, ffn=next(c for c in FAMILY.choices["ffn"] if c != wanted.ffn))
    assert wrong not in within(1)
    router = table_router(FAMILY.full, wrong, wrong)
    found = router.decide(49)[1]

    def agreement(selection: Selection) -> int:
        return sum(selection.as_dict()[axis] == wrong.as_dict()[axis] for axis in AXES)

    assert agreement(found) == max(map(agreement, within(1)))


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31))
def test_decisions_meet_the_targets_and_nest(seed: int) -> None:
    router = make(seed=seed, std=2.0)
    decided = router.decide(49)
    assert decided[0] == FAMILY.full
    for budget in (1, 2):
        possible = within(budget)
        assert decided[budget] in possible
        if any(each.within(decided[budget - 1]) for each in possible):
            assert decided[budget].within(decided[budget - 1])
    assert make(seed=seed, std=2.0).decide(49) == decided


def test_decisions_have_no_noise_and_follow_the_router() -> None:
    router = make(std=2.0)
    assert len({make(std=2.0, seed=seed).decide(49) for seed in range(20)}) > 5
    before = router.decide(49)
    torch.manual_seed(1)
    assert router.decide(49) == before
    assert all(p.grad is None for p in router.parameters())


def test_without_a_selection_within_the_tolerance_the_nearest_is_taken() -> None:
    decided = make(tolerance=0.0).decide(49)
    for budget in (1, 2):
        target = FAMILY.budgets[budget].fraction
        distance = {s: abs(parameters(SHAPE, s.as_dict()) / PARENT - target) for s in selections(FAMILY.choices)}
        assert distance[decided[budget]] == min(distance.values())
