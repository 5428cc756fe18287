"""Costs: one formula for counting and for learning, against the layout of every parameter and against sums by hand."""

import dataclasses
import itertools
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_elastic.axes import AXES_OF_KIND, PER_LAYER_AXES
from megatron_elastic.budget import UNITS, Selection
from megatron_elastic.cost_model import (
    PROFILES,
    Deployment,
    cost,
    forward_flops_per_token,
    parameters,
    training_flops_per_token,
)
from megatron_elastic.errors import ElasticError
from megatron_elastic.latency import LatencyTable
from megatron_elastic.layout import Layout, ModelShape

SHAPE = ModelShape(
    pattern="M-*EM-E", vocab=32, hidden=12, ffn=32, attention_heads=8, query_groups=4, head_dim=3,
    mamba_heads=12, mamba_head_dim=4, mamba_groups=4, mamba_state=3, experts=8, expert_ffn=16,
    shared_expert_ffn=24, top_k=2, expert_bias=True,
)  # fmt: skip
CHOICES = {
    "hidden": (12, 10, 8, 7), "ffn": (32, 24, 8), "mamba_heads": (12, 8, 4), "mamba_head_dim": (4, 3, 2),
    "attention_heads": (8, 4), "experts": (8, 6, 4), "expert_ffn": (16, 8), "shared_expert_ffn": (24, 16, 8),
}  # fmt: skip
PLACE = Deployment(batch=3, context=20, prefill_chunk=16, profile="bf16")
EXTREMES = {axis: (sizes[-1], sizes[0]) for axis, sizes in CHOICES.items()}


def grid(*axes: str, scale: float) -> list[dict[str, float]]:
    """Points at the ends of every axis: latencies that no linear formula of the sizes gives."""
    return [
        {**dict(zip(axes, corner, strict=True)), "latency": scale * (1 + prod(corner) ** 0.5)}
        for corner in itertools.product(*(EXTREMES[axis] for axis in axes))
    ]


TABLE = LatencyTable.from_dict(
    {
        "outside": grid("hidden", scale=3),
        "layers": {
            kind: grid("hidden", *axes, scale=0.25 * number)
            for number, (kind, axes) in enumerate(AXES_OF_KIND.items(), 1)
        },
    }
)


def shapes() -> st.SearchStrategy[ModelShape]:
    """Parents of any pattern and sizes, gated or not, with a shared expert or without."""
    return st.builds(
        lambda pattern, hidden, heads, states, channels, experts, ffn, shared, gated, kernel: ModelShape(
            pattern=pattern, vocab=8, hidden=hidden, ffn=8 * ffn, attention_heads=2 * heads, query_groups=2,
            head_dim=channels, mamba_heads=2 * heads, mamba_head_dim=channels, mamba_groups=2, mamba_state=states,
            conv_kernel=kernel, experts=2 * experts, expert_ffn=8 * ffn, shared_expert_ffn=shared, top_k=2,
            expert_bias=True, gated=gated,
        ),
        st.text("M*-E", min_size=1, max_size=7), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5),
        st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.sampled_from((0, 8, 24)), st.booleans(),
        st.integers(2, 5),
    )  # fmt: skip


def selections(choices: dict[str, Any] = CHOICES) -> st.SearchStrategy[Selection]:
    """Any selection of `SHAPE`: sizes that vary by layer where they may, and any layers skipped."""
    made: dict[str, Any] = {axis: st.sampled_from(sizes) for axis, sizes in choices.items()}
    for axis in PER_LAYER_AXES:
        layers = len(SHAPE.layers_with(axis))
        made[axis] = made[axis] | st.tuples(*[made[axis]] * layers)
    return st.builds(Selection, **made, skipped=st.sets(st.integers(0, len(SHAPE.pattern) - 1)).map(tuple))


def counted(shape: ModelShape, layout: Layout, selection: Selection, *, active: bool = False) -> int:
    """Parameters by multiplying the kept rows of every dimension of every parameter; the expert bias is a buffer."""
    total = sum(
        prod(dimension.kept_size({"hidden": selection.hidden}, shape.full) for dimension in dimensions)
        for dimensions in layout.outside_layers().values()
    )
    for number, kind in enumerate(shape.pattern):
        if number in selection.skipped:
            continue
        kept = selection.layer(shape.pattern, number)
        for name, dimensions in layout.of_kind(kind).items():
            rows = [dimension.kept_size(kept, shape.full) for dimension in dimensions]
            if active and ".experts." in name:
                rows[0] = shape.top_k
            if not name.endswith("expert_bias"):
                total += prod(rows)
    return total


def of(selection: Selection, unit: str = "parameters", shape: ModelShape = SHAPE, place: Deployment = PLACE) -> Any:
    gates = selection.gates(len(shape.pattern))
    return cost(shape, selection.sizes, gates, unit, deployment=place, table=TABLE)


def certain(size: int, choices: tuple[int, ...]) -> torch.Tensor:
    """The expected size under a certain choice, as a router makes it."""
    one_hot = torch.tensor([float(size == choice) for choice in choices], dtype=torch.float64)
    return one_hot @ torch.tensor(choices, dtype=torch.float64)


def expected(selection: Selection) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Sizes and gates as tensors; on an axis that varies one tensor a layer."""
    sizes: dict[str, Any] = {}
    for axis, size in selection.sizes.items():
        each = [certain(s, CHOICES[axis]) for s in (size if isinstance(size, tuple) else (size,))]
        sizes[axis] = each if isinstance(size, tuple) else each[0]
    return sizes, [torch.tensor(float(gate), dtype=torch.float64) for gate in selection.gates(len(SHAPE.pattern))]


@settings(max_examples=60)
@given(shape=shapes())
def test_parameters_of_any_shape(shape: ModelShape) -> None:
    whole = Selection.from_dict({axis: size for axis, size in shape.full.items() if axis != "depth"})
    layout = Layout(shape, 8, 2)
    assert parameters(shape, shape.full) == counted(shape, layout, whole)
    assert parameters(shape, shape.full, active=True) == counted(shape, layout, whole, active=True)
    assert parameters(shape, {**shape.full, "hidden": shape.hidden + 1}) != counted(shape, layout, whole)


@settings(max_examples=60)
@given(selection=selections())
def test_parameters_of_any_selection(selection: Selection) -> None:
    layout = Layout(SHAPE, 8, 2)
    gates = selection.gates(len(SHAPE.pattern))
    assert parameters(SHAPE, selection.sizes, gates) == counted(SHAPE, layout, selection)
    assert parameters(SHAPE, selection.sizes, gates, active=True) == counted(SHAPE, layout, selection, active=True)
    # The submodel on its own costs what it costs inside the family, in every unit.
    cut = selection.submodel(SHAPE)
    if cut.pattern:
        for unit in UNITS[:4]:
            assert cost(cut, cut.full, unit=unit, deployment=PLACE) == of(selection, unit)


@pytest.mark.parametrize("unit", UNITS)
@settings(max_examples=30)
@given(selection=selections())
def test_one_hot_is_the_count(unit: str, selection: Selection) -> None:
    # Counts are whole numbers far below 2^53: fp64 is exact. Latencies take the same operations in the same order.
    for profile in PROFILES if unit == "memory" else ("bf16",):
        place = dataclasses.replace(PLACE, profile=profile)
        soft = cost(SHAPE, *expected(selection), unit, deployment=place, table=TABLE)
        assert soft.item() == of(selection, unit, place=place)
    smaller = dataclasses.replace(selection, hidden=7, skipped=(*range(6),))
    if smaller != selection:
        assert soft.item() != of(smaller, unit, place=place)


@pytest.mark.parametrize("unit", UNITS)
def test_gradients_are_the_differences(unit: str) -> None:
    """Between the choices, with gates half open: central differences, whose error here is their rounding alone."""
    generator = torch.Generator().manual_seed(1)
    sizes: dict[str, Any] = {}
    leaves: list[torch.Tensor] = []
    for axis, choices in CHOICES.items():
        layers = len(SHAPE.layers_with(axis)) if axis in PER_LAYER_AXES else 1
        # Off the ticks, where the interpolation has a kink.
        drawn = choices[-1] + 0.3 + (choices[0] - choices[-1] - 0.6) * torch.rand(layers, generator=generator).double()
        each = [value.clone().requires_grad_() for value in drawn]
        leaves += each
        sizes[axis] = each if axis in PER_LAYER_AXES else each[0]
    gates = [value.clone().requires_grad_() for value in 0.2 + 0.7 * torch.rand(7, generator=generator).double()]
    leaves += gates

    def value() -> torch.Tensor:
        made: torch.Tensor = cost(SHAPE, sizes, gates, unit, deployment=PLACE, table=TABLE)
        return made

    gradients = torch.autograd.grad(value(), leaves, allow_unused=True)
    step, moved = 1e-3, 0
    for leaf, gradient in zip(leaves, gradients, strict=True):
        with torch.no_grad():
            leaf += step
            above = value()
            leaf -= 2 * step
            below = value()
            leaf += step
        difference = (above - below).item() / (2 * step)
        found = 0.0 if gradient is None else gradient.item()
        # Each cost is at most quadratic in a single size or gate: the central difference is exact up to rounding.
        assert found == pytest.approx(difference, rel=1e-8, abs=1e-8 * above.item())
        moved += found != 0.0
    assert moved == len(leaves)


def test_a_mix_is_neither_end() -> None:
    small = Selection(**{axis: sizes[-1] for axis, sizes in CHOICES.items()})
    mixed = {axis: torch.tensor((sizes[0] + sizes[-1]) / 2, dtype=torch.float64) for axis, sizes in CHOICES.items()}
    for unit in UNITS:
        middle = cost(SHAPE, mixed, unit=unit, deployment=PLACE, table=TABLE).item()
        assert of(small, unit) < middle < cost(SHAPE, SHAPE.full, unit=unit, deployment=PLACE, table=TABLE)


def test_a_skipped_layer_costs_nothing() -> None:
    whole = Selection(**{axis: sizes[0] for axis, sizes in CHOICES.items()})
    for number, kind in enumerate(SHAPE.pattern):
        left = dataclasses.replace(SHAPE, pattern=SHAPE.pattern[:number] + SHAPE.pattern[number + 1 :])
        without = dataclasses.replace(whole, skipped=(number,))
        for unit in UNITS:
            assert of(without, unit) == cost(left, SHAPE.full, unit=unit, deployment=PLACE, table=TABLE), kind
            assert of(without, unit) < of(whole, unit)


def test_active_parameters_leave_out_idle_experts() -> None:
    full, fewer = SHAPE.full, {**SHAPE.full, "experts": 4}
    expert = 2 * 12 * 16
    assert parameters(SHAPE, full) - parameters(SHAPE, full, active=True) == 2 * (8 - 2) * expert
    # An expert that no token goes to still has its row in the router.
    assert parameters(SHAPE, full, active=True) - parameters(SHAPE, fewer, active=True) == 2 * 4 * 12
    assert parameters(SHAPE, full) - parameters(SHAPE, fewer) == 2 * 4 * (12 + expert)


def test_memory_by_hand() -> None:
    batch, context, chunk = 3, 20, 16
    kv = 2 * batch * context * 4 * 3  # one attention layer: keys and values of 4 groups x 3
    ssm = 2 * batch * 12 * 4 * 3  # two Mamba layers: 12 heads x 4 channels x 3 states
    conv = 2 * batch * (48 + 2 * 12) * 4  # x, B and C with 4 taps
    buffers = (
        batch * chunk * (2 * (12 + 16 + 12) + 24)
    )  # two experts a token: its copy, neurons, result; the shared one's
    count = parameters(SHAPE, SHAPE.full)
    for name, size in PROFILES.items():
        expected_bytes = count * size.weights + kv * size.kv + ssm * size.ssm + conv * size.conv
        expected_bytes += buffers * size.activations
        place = Deployment(batch, context, chunk, name)
        assert cost(SHAPE, SHAPE.full, unit="memory", deployment=place) == expected_bytes
    # A chunk is no longer than the context, and the largest MoE layer's buffer serves all.
    short = Deployment(batch, context, 1000)
    assert cost(SHAPE, SHAPE.full, unit="memory", deployment=short) == cost(
        SHAPE, SHAPE.full, unit="memory", deployment=dataclasses.replace(short, prefill_chunk=context)
    )
    uneven, small = {**SHAPE.full, "expert_ffn": (8, 16)}, {**SHAPE.full, "expert_ffn": (8, 8)}
    saved = cost(SHAPE, SHAPE.full, unit="memory", deployment=PLACE) - cost(
        SHAPE, uneven, unit="memory", deployment=PLACE
    )
    assert saved == 2 * 8 * 2 * 12 * 8  # the weights of one layer's eight experts alone
    saved = cost(SHAPE, uneven, unit="memory", deployment=PLACE) - cost(SHAPE, small, unit="memory", deployment=PLACE)
    assert saved == 2 * 8 * 2 * 12 * 8 + 2 * batch * chunk * 2 * 8


def test_gated_layers_have_a_third_projection() -> None:
    gated = dataclasses.replace(SHAPE, gated=True)
    neurons = 2 * 12 * 32 + 2 * 12 * (8 * 16 + 24)
    assert parameters(gated, SHAPE.full) - parameters(SHAPE, SHAPE.full) == neurons
    active = 2 * 12 * 32 + 2 * 12 * (2 * 16 + 24)
    assert parameters(gated, SHAPE.full, active=True) - parameters(SHAPE, SHAPE.full, active=True) == active
    assert forward_flops_per_token(gated, SHAPE.full, 10) - forward_flops_per_token(SHAPE, SHAPE.full, 10) == 2 * active


def test_flops_by_hand() -> None:
    """Multiply-adds of one token, counted from the shapes of the products."""
    hidden, length = 6, 10
    kept = {
        "hidden": hidden, "ffn": 16, "mamba_heads": 4, "mamba_head_dim": 2, "attention_heads": 4,
        "experts": 6, "expert_ffn": 8, "shared_expert_ffn": 16,
    }  # fmt: skip
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
    mlp = [hidden * 16, 16 * hidden]
    moe = [hidden * 6, 2 * 2 * hidden * 8, 2 * hidden * 16]  # router, two experts, the shared one
    expected_flops = 2 * (2 * sum(mamba) + sum(attention) + 2 * sum(mlp) + 2 * sum(moe) + 32 * hidden)
    assert forward_flops_per_token(SHAPE, kept, length) == expected_flops
    assert forward_flops_per_token(SHAPE, kept, 2 * length) == expected_flops + 2 * 12 * length
    assert training_flops_per_token(SHAPE, kept, length) == 3 * expected_flops
    gates = [0] * 7
    assert forward_flops_per_token(SHAPE, kept, length, gates) == 2 * 32 * hidden


def test_every_axis_costs_in_every_unit() -> None:
    for unit in ("parameters", "memory", "flops"):
        costs = [cost(SHAPE, SHAPE.full, unit=unit, deployment=PLACE)]
        costs += [
            cost(SHAPE, {**SHAPE.full, axis: sizes[-1]}, unit=unit, deployment=PLACE) for axis, sizes in CHOICES.items()
        ]
        assert all(less < costs[0] for less in costs[1:])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"unit": "seconds"}, "unit 'seconds' must be one of"),
        ({"unit": "latency"}, "needs a table of measured latencies"),
    ],
)
def test_bad_units_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ElasticError, match=text):
        cost(SHAPE, SHAPE.full, **arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch": 0}, "deployment.batch: 0"),
        ({"context": 1.5}, "context: 1.5"),
        ({"profile": "fp7"}, "'fp7' must be one of"),
    ],
)
def test_bad_deployments_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ElasticError, match=text):
        Deployment(**arguments)
