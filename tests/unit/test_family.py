"""Families and the slices that a rank runs."""

import pytest
from hypothesis import given, settings

from megatron_elastic.axes import AXES
from megatron_elastic.budget import Selection
from megatron_elastic.family import SlicePlans
from tests.unit.small_family import FAMILY, SHAPE, selections

SMALL = Selection(8, 16, 8, 4)


@pytest.mark.parametrize("world", [1, 2, 4])
@settings(max_examples=15)
@given(selection=selections())
def test_sizes_of_a_slice(world: int, selection: Selection) -> None:
    plan = SlicePlans(FAMILY, world).of(selection)
    for axis, size in selection.as_dict().items():
        assert getattr(plan, axis) == (size if axis == "hidden" else size // world)
    for name, dimensions in FAMILY.layout.parameters().items():
        short = name.split(".", 3)[3] if name.startswith("decoder.layers.") else name
        assert len(plan.segments[short]) == len(dimensions)
        for dimension, kept in zip(dimensions, plan.segments[short], strict=True):
            share = world if dimension.sharded else 1
            local = dimension.size // share
            rows = local if kept is None else sum(stop - start for start, stop in kept)
            assert rows == dimension.kept_size(selection.as_dict(), SHAPE.full) // share
            # None says "all of it", and is never written out.
            assert kept != ((0, local),)


def test_the_full_selection_slices_nothing() -> None:
    plan = SlicePlans(FAMILY, 2).of(FAMILY.full)
    assert all(kept is None for dimensions in plan.segments.values() for kept in dimensions)


def test_a_slice_touches_every_parameter_of_a_narrowed_axis() -> None:
    plan = SlicePlans(FAMILY, 1).of(Selection(8, 32, 12, 8))
    narrowed = {name for name, dimensions in plan.segments.items() if any(kept is not None for kept in dimensions)}
    layout = FAMILY.layout
    expected = {
        name.split(".", 3)[3] if name.startswith("decoder.layers.") else name
        for name, dimensions in layout.parameters().items()
        if layout.hidden in dimensions
    }
    assert narrowed == expected


def test_plans_are_made_once() -> None:
    plans = SlicePlans(FAMILY, 2)
    assert plans.of(SMALL) is plans.of(Selection.from_dict(SMALL.as_dict()))
    assert plans.of(SMALL) is not plans.of(FAMILY.full)


def test_a_family_speaks_for_its_shape() -> None:
    assert FAMILY.full.as_dict() == SHAPE.full
    assert FAMILY.orders is FAMILY.layout.orders
    assert FAMILY.layout is FAMILY.layout
    assert set(FAMILY.orders) == set(AXES)
