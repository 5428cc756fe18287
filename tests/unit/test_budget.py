"""Selections: plain values, and which is nested in which."""

import dataclasses
import json

import pytest

from megatron_elastic.axes import AXES
from megatron_elastic.budget import Budget, Selection

SIZED = AXES[:-1]
"""Axes of which a selection keeps a number of entries: all but `depth`, of which it skips layers."""
LARGE = Selection(
    hidden=12, ffn=32, mamba_heads=12, mamba_head_dim=4, attention_heads=8,
    experts=8, expert_ffn=16, shared_expert_ffn=16,
)  # fmt: skip


def test_fields_are_the_axes_in_order() -> None:
    assert tuple(field.name for field in dataclasses.fields(Selection)) == (*SIZED, "skipped")
    assert list(LARGE.as_dict()) == list(SIZED)
    assert list(dataclasses.replace(LARGE, skipped=(1,)).as_dict()) == [*SIZED, "skipped"]


def test_absent_axes_are_left_out() -> None:
    assert Selection(hidden=12, ffn=8).as_dict() == Selection(hidden=12, ffn=8).sizes == {"hidden": 12, "ffn": 8}
    assert Selection(hidden=12, skipped=(2, 0)).as_dict() == {"hidden": 12, "skipped": (0, 2)}
    assert Selection(hidden=12, skipped=(2,)).sizes == {"hidden": 12}


def test_equal_selections_compare_equal() -> None:
    assert Selection(hidden=12, ffn=(8, 8)) == Selection(hidden=12, ffn=[8, 8]) == Selection(hidden=12, ffn=8)  # type: ignore[arg-type]
    assert hash(Selection(hidden=12, ffn=(8, 8))) == hash(Selection(hidden=12, ffn=8))
    assert Selection(hidden=12, ffn=(8, 16)) != Selection(hidden=12, ffn=(16, 8))
    assert Selection(hidden=12, skipped=(3, 1)) == Selection(hidden=12, skipped=(1, 3)) != Selection(hidden=12)


def test_what_a_layer_keeps() -> None:
    selection = Selection(hidden=12, ffn=(8, 16), mamba_heads=4, mamba_head_dim=2, skipped=(1,))
    assert [selection.layer("M--", number) for number in range(3)] == [
        {"hidden": 12, "mamba_heads": 4, "mamba_head_dim": 2}, {"hidden": 12, "ffn": 8}, {"hidden": 12, "ffn": 16},
    ]  # fmt: skip
    assert selection.gates(3) == [1, 0, 1]


def test_round_trip() -> None:
    varied = dataclasses.replace(LARGE, ffn=(8, 16), skipped=(0, 4))
    for selection in (LARGE, varied):
        assert Selection.from_dict(selection.as_dict()) == selection
        assert Selection.from_dict(json.loads(json.dumps(selection.as_dict()))) == selection
    assert Selection.from_dict({**LARGE.as_dict(), "ffn": 24}) != LARGE


@pytest.mark.parametrize("change", [{"depth": 3}, {"hidden": None}])
def test_other_axes_are_refused(change: dict[str, int | None]) -> None:
    kept = {axis: size for axis, size in {**LARGE.as_dict(), **change}.items() if size is not None}
    with pytest.raises(TypeError):
        Selection.from_dict(kept)


def test_nesting_needs_every_axis() -> None:
    assert LARGE.within(LARGE)
    small = Selection.from_dict(dict.fromkeys(SIZED, 4))
    assert small.within(LARGE)
    assert not LARGE.within(small)
    for axis in SIZED:
        wider = Selection.from_dict({**small.as_dict(), axis: 64})
        assert not wider.within(LARGE)
        assert not LARGE.within(wider)


def test_nesting_needs_every_layer() -> None:
    outer = Selection(hidden=12, ffn=(16, 8), skipped=(3,))
    assert Selection(hidden=12, ffn=8, skipped=(3,)).within(outer)
    assert Selection(hidden=12, ffn=(16, 8), skipped=(1, 3)).within(outer)
    assert not Selection(hidden=12, ffn=(8, 16), skipped=(3,)).within(outer)
    assert not Selection(hidden=12, ffn=16, skipped=(3,)).within(outer)
    assert not Selection(hidden=12, ffn=8).within(outer)
    assert not Selection(hidden=12, ffn=8, skipped=(1,)).within(outer)


def test_both_are_keys() -> None:
    assert len({LARGE, Selection.from_dict(LARGE.as_dict()), Budget("p50", 0.5), Budget("p50", 0.5)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        LARGE.hidden = 3  # type: ignore[misc]
