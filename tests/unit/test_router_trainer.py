"""The router's own optimizer, and what it decides."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_elastic.budget import Selection
from megatron_elastic.errors import ElasticError
from megatron_elastic.family import Family
from megatron_elastic.router import RouterTrainer
from tests.unit.small_family import AXES, FAMILY, VARIED, every_selection, narrow
from tests.unit.small_router import PARENT, WEIGHTS, cost, make, table_router

ROWS = len(WEIGHTS) * len(AXES)


def kd_gradients(budgets: int = 3) -> Tensor:
    return torch.randn(budgets * len(AXES), 5, generator=torch.Generator().manual_seed(1))


def backward(trainer: RouterTrainer, step: int, seed: int = 1) -> None:
    """What the microbatches' backwards leave on the leaves."""
    for budget in range(3):
        for number, axis in enumerate(AXES):
            leaf = trainer.leaves(step, budget)[axis]
            row = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(seed))
            (leaf * row[budget * len(AXES) + number, : leaf.size(1)]).sum().backward()  # type: ignore[no-untyped-call]


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
    for gradient in torch.autograd.grad(trainer.loss(3, torch.zeros(ROWS, 5)), list(net.parameters())):
        assert gradient.abs().sum() == 0


@pytest.mark.parametrize("family", [FAMILY, VARIED], ids=["homogeneous", "heterogeneous"])
def test_the_loss_is_the_kd_loss_to_first_order(family: Family) -> None:
    """Its gradient is that of a KD loss which is a function of the probabilities, penalty and weights included."""
    router = make(family, penalty=0.7)
    trainer = RouterTrainer(router, WEIGHTS)

    def kd() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for budget in range(3):
            for number, axis in enumerate(AXES):
                made = trainer.leaves(3, budget)[axis] if leaves else router.probabilities(budget, axis, 3)
                factor = number + 1.5 * budget + torch.arange(len(made))[:, None]
                total = total + (made.double() * factor).sin().sum()
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
        # The leaves' gradients are fp32, and softmax subtracts their mean: some tens of roundings of the largest.
        torch.testing.assert_close(a, b, rtol=0.0, atol=5e-6 * b.abs().max().item())
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
    assert pending.shape == (ROWS, max(map(len, FAMILY.choices.values())))


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
    trainer, gradients = RouterTrainer(router, WEIGHTS), torch.zeros(ROWS, 5)
    for budget in (1, 2):
        gradients[budget * len(AXES) + AXES.index("ffn"), 0] = 1.0
    for step in range(50):
        trainer.leaves(step, 1)
        trainer._pending = gradients
        trainer.commit()
    assert router.probabilities(1, "ffn", 49, noise=False)[0, 0] < 0.05
    assert abs(router.expected_cost(1, {a: router.probabilities(1, a, 49, noise=False) for a in AXES}) - 1) < 0.05


# Decisions.


def within(budget: int, tolerance: float = 0.02) -> list[Selection]:
    target = FAMILY.budgets[budget].fraction * PARENT
    return [s for s in every_selection() if abs(cost(s) / target - 1) <= tolerance]


def test_the_most_probable_is_decided_where_it_meets_the_target() -> None:
    for medium in within(1)[:4]:
        nested = [small for small in within(2) if small.within(medium)]
        for small in nested[:2]:
            assert table_router(FAMILY.full, medium, small).decide(49) == (FAMILY.full, medium, small)


def test_a_most_probable_one_off_the_target_is_not() -> None:
    medium = narrow(hidden=6, ffn=8, mamba_heads=4, attention_heads=4)
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
        same = (getattr(selection, axis) == getattr(wrong, axis) for axis in (*AXES[:-1], "skipped"))
        return sum(same)

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
        distance = {s: abs(cost(s) / PARENT - target) for s in every_selection()}
        assert distance[decided[budget]] == min(distance.values())


# Hard masks.


def test_a_share_of_the_steps_runs_hard_masks_with_the_gradient_of_the_soft_ones() -> None:
    """Straight-through: the leaves are certain, and their gradient is taken for that of the probabilities."""
    always, never, half = (RouterTrainer(make(VARIED, hard_share=share), WEIGHTS) for share in (1.0, 0.0, 0.5))
    for budget in (1, 2):
        hard, soft = always.leaves(3, budget), never.leaves(3, budget)
        for axis in AXES:
            most = soft[axis].argmax(1, keepdim=True)
            assert torch.equal(hard[axis], torch.zeros_like(soft[axis]).scatter(1, most, 1.0))
            assert not torch.equal(hard[axis], soft[axis])
            assert hard[axis].is_leaf
            assert hard[axis].requires_grad
    gradients = []
    for trainer in (always, never):
        backward(trainer, 3)
        trainer.reduce(torch.tensor(1))
        assert trainer._pending is not None
        gradients.append(torch.autograd.grad(trainer.loss(3, trainer._pending), list(trainer.router.parameters())))
    for hard_gradient, soft_gradient in zip(*gradients, strict=True):
        assert torch.equal(hard_gradient, soft_gradient)  # `backward` is linear in the leaves
    drawn = [half.router.is_hard(1, step) for step in range(400)]
    # Four deviations of 400 fair draws.
    assert 160 < sum(drawn) < 240
    assert drawn == [make(hard_share=0.5).is_hard(1, step) for step in range(400)]
    assert drawn != [half.router.is_hard(2, step) for step in range(400)]


# Sizes between two budgets.


def test_a_size_between_two_budgets_is_decided_between_them() -> None:
    router = make(std=2.0)
    for fraction in (0.9, 0.7, 0.6, 0.55):
        found = router.decide_between(fraction, 49)
        assert abs(cost(found) / (fraction * PARENT) - 1) <= router.config.tolerance
        assert found == make(std=2.0).decide_between(fraction, 49)
    assert router.decide_between(0.6, 49) != router.decide_between(0.7, 49)


def test_at_a_trained_budget_it_is_that_budget() -> None:
    router = make(std=2.0)
    decided = router.decide(49)
    # Without the preference for nested ones, which the first budget below the full one does not need.
    assert router.decide_between(0.75, 49) == decided[1]
    nearly = router.decide_between(0.7501, 49)
    assert abs(cost(nearly) / (0.7501 * PARENT) - 1) <= router.config.tolerance


def test_the_routers_input_lies_between_its_neighbours() -> None:
    medium, small = within(1)[0], within(2)[-1]
    router = table_router(FAMILY.full, medium, small, tolerance=0.5)
    # Near a budget what that budget wants is the most probable, and a wide tolerance lets it be.
    assert router.decide_between(0.74, 49) == medium
    assert router.decide_between(0.51, 49) == small


@pytest.mark.parametrize("fraction", [0.4, 1.1])
def test_a_size_beyond_the_budgets_is_refused(fraction: float) -> None:
    with pytest.raises(ElasticError, match=rf"fraction {fraction}: the budgets .* reach from 0.5 to 1.0"):
        make().decide_between(fraction, 49)


def test_neighbours_in_different_units_are_refused() -> None:
    budgets = (*FAMILY.budgets[:2], dataclasses.replace(FAMILY.budgets[2], unit="active_parameters"))
    router = make(dataclasses.replace(FAMILY, budgets=budgets))
    with pytest.raises(ElasticError, match=r"p75 \(parameters\) and p50 \(active_parameters\)"):
        router.decide_between(0.6, 49)
    router.decide_between(0.9, 49)  # the parent is whole in every unit


def test_layers_that_differ_are_decided_between_budgets_too() -> None:
    router = make(VARIED, std=2.0)
    found = router.decide_between(0.6, 49)
    assert abs(cost(found) / (0.6 * PARENT) - 1) <= router.config.tolerance
    assert any(isinstance(size, tuple) for size in found.sizes.values())


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_decisions_of_layers_that_differ_meet_the_targets(seed: int) -> None:
    router = make(VARIED, seed=seed, std=2.0)
    decided = router.decide(49)
    assert decided[0] == VARIED.full
    for budget, selection in zip(VARIED.budgets, decided, strict=True):
        assert abs(cost(selection) / (budget.fraction * PARENT) - 1) <= router.config.tolerance
    assert make(VARIED, seed=seed, std=2.0).decide(49) == decided
