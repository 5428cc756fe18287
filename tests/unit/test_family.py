"""Families and the slices that a rank runs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_elastic.axes import Segments
from megatron_elastic.budget import Selection
from megatron_elastic.family import Family, SlicePlan, SlicePlans
from megatron_elastic.layout import LAYER, Layout, layer_number
from tests.unit.small_family import AXES, FAMILY, LAYERS, SHAPE, VARIED, narrow, selections, varied_selections

SMALL = narrow(hidden=8, ffn=16, mamba_heads=8, mamba_head_dim=1, attention_heads=4, depth=4)


@pytest.mark.parametrize("world", [1, 2, 4])
@settings(max_examples=15)
@given(selection=st.one_of(selections(), varied_selections()))
def test_sizes_of_a_slice(world: int, selection: Selection) -> None:
    plan = SlicePlans(VARIED, world).of(selection)
    assert plan.hidden == selection.hidden
    assert len(plan.layers) == LAYERS
    for number, layer in enumerate(plan.layers):
        assert layer.hidden == selection.hidden
        assert layer.skipped == (number in selection.skipped)
        own = selection.layer(SHAPE.pattern, number)
        assert layer.sizes == {
            axis: size // (world if Layout.sharded[axis] else 1) for axis, size in own.items() if axis != "hidden"
        }
    for name, dimensions in FAMILY.layout.parameters().items():
        number = layer_number(name)
        segments = plan.segments if number is None else plan.layers[number].segments
        sizes = {"hidden": selection.hidden} if number is None else selection.layer(SHAPE.pattern, number)
        kept_ranges = segments[name if number is None else name.removeprefix(f"{LAYER}{number}.")]
        assert len(kept_ranges) == len(dimensions)
        for dimension, kept in zip(dimensions, kept_ranges, strict=True):
            share = world if dimension.sharded else 1
            local = dimension.size // share
            rows = local if kept is None else sum(stop - start for start, stop in kept)
            assert rows == dimension.kept_size(sizes, SHAPE.full) // share
            # None says "all of it", and is never written out.
            assert kept != ((0, local),)


def all_segments(plan: SlicePlan) -> dict[str, tuple[Segments | None, ...]]:
    """Of every parameter, by stock name."""
    found = dict(plan.segments)
    for number, layer in enumerate(plan.layers):
        found.update({f"{LAYER}{number}.{name}": kept for name, kept in layer.segments.items()})
    return found


def test_the_full_selection_slices_nothing() -> None:
    found = all_segments(SlicePlans(FAMILY, 2).of(FAMILY.full))
    assert set(found) == set(FAMILY.layout.parameters())
    assert all(kept is None for dimensions in found.values() for kept in dimensions)


@pytest.mark.parametrize(("axis", "size"), [("hidden", 8), ("mamba_head_dim", 1), ("mamba_heads", 4), ("ffn", 8)])
def test_a_slice_touches_every_parameter_of_a_narrowed_axis(axis: str, size: int) -> None:
    found = all_segments(SlicePlans(FAMILY, 1).of(narrow(**{axis: size})))
    narrowed = {name for name, dimensions in found.items() if any(kept is not None for kept in dimensions)}
    assert narrowed == {
        name for name, dimensions in FAMILY.layout.parameters().items() if any(axis in d.axes for d in dimensions)
    }


def test_plans_are_made_once() -> None:
    plans = SlicePlans(FAMILY, 2)
    assert plans.of(SMALL) is plans.of(Selection.from_dict(SMALL.as_dict()))
    assert plans.of(SMALL) is not plans.of(FAMILY.full)


def test_layers_of_the_same_sizes_share_their_plan() -> None:
    layers = SlicePlans(VARIED, 1).of(narrow(ffn=(16, 24), skipped=(3,))).layers
    assert layers[1] is not layers[4]
    assert layers[0] is not layers[3]  # the same sizes, but one is skipped
    assert layers[3].skipped
    same = SlicePlans(VARIED, 1).of(narrow(ffn=16)).layers
    assert same[1] is same[4]
    assert same[0] is same[3]


def test_a_family_speaks_for_its_shape() -> None:
    assert FAMILY.full.as_dict() == SHAPE.full
    assert FAMILY.full.sizes == SHAPE.full
    assert FAMILY.orders is FAMILY.layout.orders
    assert FAMILY.layout is FAMILY.layout
    assert set(FAMILY.orders) == set(AXES) - {"depth"} == set(SHAPE.full)
    assert FAMILY.layers_with("ffn") == (1, 4)
    assert FAMILY.layers_with("hidden") == FAMILY.layers_with("depth") == (0, 1, 2, 3, 4)
    uses = {axis: VARIED.uses(axis) for axis in AXES}
    assert uses == {**dict.fromkeys(AXES, 1), "ffn": 2, "mamba_heads": 2}
    assert [FAMILY.uses(axis) for axis in AXES] == [1] * len(AXES)


def test_an_axis_that_is_not_narrowed_need_not_be_named() -> None:
    bare = Family(shape=SHAPE, ffn_blocks=8, choices={"ffn": (32, 8)}, budgets=())
    assert bare.choices == {**{axis: (size,) for axis, size in SHAPE.full.items()}, "depth": (5,), "ffn": (32, 8)}


def test_a_choice_of_depth_skips_the_least_important_layers() -> None:
    assert [FAMILY.skipped(depth) for depth in FAMILY.choices["depth"]] == [(), (3,), (1, 3)]
    assert FAMILY.select({**SHAPE.full, "depth": 3}).skipped == (1, 3)
    assert FAMILY.select(SHAPE.full) == FAMILY.full != FAMILY.select({**SHAPE.full, "depth": 4})
