"""Selections: plain values, and which is nested in which."""

import dataclasses

import pytest

from megatron_elastic.axes import AXES
from megatron_elastic.budget import Budget, Selection

LARGE = Selection(12, 32, 12, 8)


def test_fields_are_the_axes_in_order() -> None:
    assert tuple(field.name for field in dataclasses.fields(Selection)) == AXES
    assert list(LARGE.as_dict()) == list(AXES)


def test_round_trip() -> None:
    assert Selection.from_dict(LARGE.as_dict()) == LARGE
    assert Selection.from_dict({**LARGE.as_dict(), "ffn": 24}) != LARGE


@pytest.mark.parametrize("change", [{"depth": 3}, {"hidden": None}])
def test_other_axes_are_refused(change: dict[str, int | None]) -> None:
    kept = {axis: size for axis, size in {**LARGE.as_dict(), **change}.items() if size is not None}
    with pytest.raises(TypeError):
        Selection.from_dict(kept)


def test_nesting_needs_every_axis() -> None:
    assert LARGE.within(LARGE)
    assert Selection(10, 24, 8, 4).within(LARGE)
    assert not LARGE.within(Selection(10, 24, 8, 4))
    for axis in AXES:
        wider = Selection.from_dict({**dict.fromkeys(AXES, 4), axis: 64})
        assert not wider.within(LARGE)
        assert not LARGE.within(wider)


def test_both_are_keys() -> None:
    assert len({LARGE, Selection(12, 32, 12, 8), Budget("p50", 0.5), Budget("p50", 0.5)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        LARGE.hidden = 3  # type: ignore[misc]
