"""Costs: one formula for counting and for learning."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings

from megatron_elastic.axes import AXES
from megatron_elastic.budget import Selection
from megatron_elastic.cost_model import forward_flops_per_token, nearest, parameters, selections
from megatron_elastic.masks import one_hot
from tests.unit import small_family
from tests.unit.small_family import FAMILY, SHAPE


def expected_sizes(selection: Selection) -> dict[str, torch.Tensor]:
    """Expected size of every axis under the certain choice, as the router makes it."""
    certain = one_hot(selection, FAMILY.choices, torch.float64)
    return {axis: certain[axis] @ torch.tensor(FAMILY.choices[axis], dtype=torch.float64) for axis in AXES}


@settings(max_examples=40)
@given(selection=small_family.selections())
def test_one_hot_is_the_count(selection: Selection) -> None:
    # Whole numbers far below 2^53: fp64 is exact.
    assert parameters(SHAPE, expected_sizes(selection)).item() == parameters(SHAPE, selection.as_dict())


def test_a_mix_is_neither_end() -> None:
    large, small = FAMILY.full, Selection(6, 8, 4, 4)
    mixed = {
        axis: (a + b) / 2
        for (axis, a), b in zip(expected_sizes(large).items(), expected_sizes(small).values(), strict=True)
    }
    cost = parameters(SHAPE, mixed).item()
    assert parameters(SHAPE, small.as_dict()) < cost < parameters(SHAPE, large.as_dict())


@pytest.mark.parametrize("axis", AXES)
def test_more_of_any_axis_costs_more(axis: str) -> None:
    sizes = {name: torch.tensor(float(size), dtype=torch.float64) for name, size in SHAPE.full.items()}
    sizes[axis].requires_grad_()
    (gradient,) = torch.autograd.grad(parameters(SHAPE, sizes), sizes[axis])
    assert gradient > 0
    # The cost is linear in every single axis: the gradient is what one entry less saves.
    fewer = {**SHAPE.full, axis: SHAPE.full[axis] - 1}
    assert gradient.item() == parameters(SHAPE, SHAPE.full) - parameters(SHAPE, fewer)


def test_an_axis_without_layers_costs_nothing() -> None:
    shape = dataclasses.replace(SHAPE, pattern="M*")
    assert parameters(shape, shape.full) == parameters(shape, {**shape.full, "ffn": 8})
    assert parameters(shape, shape.full) != parameters(shape, {**shape.full, "mamba_heads": 8})


def test_every_selection_once_largest_first() -> None:
    every = list(selections(FAMILY.choices))
    assert len(every) == len(set(every)) == 5 * 4 * 3 * 2
    assert every[0] == FAMILY.full
    assert every[-1] == Selection(6, 8, 4, 4)


@pytest.mark.parametrize("fraction", [1.0, 0.8, 0.5, 0.33])
def test_nearest_is_the_nearest(fraction: float) -> None:
    whole = parameters(SHAPE, SHAPE.full)
    found, reached = nearest(SHAPE, FAMILY.choices, fraction)
    assert reached == parameters(SHAPE, found.as_dict()) / whole
    shares = [parameters(SHAPE, each.as_dict()) / whole for each in selections(FAMILY.choices)]
    assert abs(reached - fraction) == min(abs(share - fraction) for share in shares)
    assert fraction != 1.0 or found == FAMILY.full


def test_flops_by_hand() -> None:
    """Multiply-adds of one token, counted from the shapes of the products."""
    hidden, ffn, mamba_heads, heads, length = 6, 16, 4, 4, 10
    mamba = [
        hidden * (8 + 8 + 12 + 12 + 4),  # in_proj: z and x of 4 heads x 2, B and C of 4 groups x 3, dt
        (8 + 12 + 12) * 4,  # convolution of x, B, C with 4 taps
        8 * 3 * 3,  # state: decay and add, and read, for 8 channels x 3 states
        8 * hidden,  # out_proj
    ]
    attention = [
        hidden * (12 + 2 * 4 * 3),  # queries of 4 heads x 3, keys and values of 4 groups x 3
        12 * length,  # scores and values, over half of the tokens each
        12 * hidden,
    ]
    mlp = [hidden * ffn, ffn * hidden]
    expected = 2 * (2 * sum(mamba) + sum(attention) + 2 * sum(mlp) + 32 * hidden)
    kept = {"hidden": hidden, "ffn": ffn, "mamba_heads": mamba_heads, "attention_heads": heads}
    assert forward_flops_per_token(SHAPE, kept, length) == expected
    assert forward_flops_per_token(SHAPE, kept, 2 * length) == expected + 2 * 12 * length


def test_flops_follow_every_axis() -> None:
    sizes = [SHAPE.full] + [{**SHAPE.full, axis: FAMILY.choices[axis][-1]} for axis in AXES]
    flops = [forward_flops_per_token(SHAPE, kept, 10) for kept in sizes]
    assert all(less < flops[0] for less in flops[1:])
    assert all(a != b for a, b in itertools.combinations(flops, 2))
