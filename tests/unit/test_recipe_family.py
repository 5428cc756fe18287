"""What a recipe says of the family: every fault is told by name, and what is right comes out."""

import copy
from dataclasses import replace
from typing import Any

import pytest

from megatron_elastic.budget import Budget, Selection
from megatron_elastic.errors import CheckpointError
from megatron_elastic.family import Family
from megatron_elastic.layout import ModelShape
from megatron_elastic.parallel import ranks_of
from megatron_elastic.recipe_family import parse_family, parse_selections, selection_faults, with_depth_ranking
from tests.unit.small_family import FAMILY, SHAPE, VARIED, narrow

MOE = replace(SHAPE, pattern="ME*", ffn=0, experts=8, expert_ffn=16, shared_expert_ffn=32, top_k=2)
GOOD: dict[str, Any] = {
    "axes": {axis: list(choices) for axis, choices in FAMILY.choices.items()},
    "heterogeneous": ["mamba_heads", "ffn", "attention_heads"],
    "depth_ranking": [3, 1, 2],
    "budgets": [
        {"name": "p100", "fraction": 1.0}, {"name": "p75", "fraction": 0.75}, {"name": "p50", "fraction": 0.5}
    ],
}  # fmt: skip
GOOD_MOE = {"axes": {"experts": [8, 4], "expert_ffn": [16, 8]}, "expert_blocks": 4, "budgets": GOOD["budgets"][:1]}


def parsed(
    changes: dict[str, Any] | None = None,
    shape: ModelShape = SHAPE,
    base: dict[str, Any] = GOOD,
    flags: dict[str, Any] | None = None,
) -> tuple[Family | None, list[str]]:
    """The family, and what is wrong; changes name keys with dots, and None removes one."""
    raw, faults = copy.deepcopy(base), list[str]()
    for path, value in (changes or {}).items():
        *way, last = path.split(".")
        target = raw
        for step in way:
            target = target[int(step) if step.isdigit() else step]
        if value is None:
            del target[last]
        else:
            target[last] = value
    return parse_family(raw, shape, ranks_of(flags or {}, faults), faults), faults


def test_a_family_is_read_whole() -> None:
    assert parsed() == (VARIED, [])
    assert parsed({"heterogeneous": None}) == (FAMILY, [])
    made, faults = parsed({"axes.ffn": None, "axes.depth": None, "depth_ranking": None})
    assert not faults
    assert made is not None
    assert (made.choices["ffn"], made.choices["depth"], made.depth_ranking) == ((32,), (5,), ())


def test_targets_and_units_of_budgets() -> None:
    parent = FAMILY.full_cost("flops")
    budgets = [
        GOOD["budgets"][0],
        {"name": "b", "target": 0.6 * parent, "unit": "flops"},
        {"name": "c", "fraction": 0.5, "unit": "active_parameters", "heterogeneous": False},
    ]
    made, faults = parsed({"budgets": budgets})
    assert not faults
    assert made is not None
    assert made.budgets[2] == Budget("c", 0.5, "active_parameters", heterogeneous=False)
    assert (made.budgets[1].unit, made.budgets[1].heterogeneous) == ("flops", True)
    assert made.budgets[1].fraction == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"axes": [1]}, "elastic.axes: [1] must map an axis to its choices"),
        ({"axes.colour": [1]}, "elastic.axes.colour: unknown axis; known are ['hidden'"),
        ({"axes.experts": [8]}, "elastic.axes.experts: a parent 'M-*M-' has ['hidden'"),
        ({"axes.ffn": 8}, "elastic.axes.ffn: 8 must be a list of whole numbers"),
        ({"axes.ffn": [32, 8.0]}, "elastic.axes.ffn: [32, 8.0] must be a list of whole numbers"),
        ({"axes.mamba_head_dim": [1, 2]}, "elastic.axes.mamba_head_dim: choices [1, 2] must begin with the full size"),
        ({"axes.depth": [4, 3]}, "elastic.axes.depth: choices [4, 3] must begin with the number of layers 5"),
        ({"axes.depth": [5, 3, 4]}, "elastic.axes.depth: choices [5, 3, 4] must be strictly descending"),
        ({"axes.depth": [5, 0]}, "elastic.axes.depth: choice 0 must lie in 1..5"),
        ({"ffn_blocks": 0}, "elastic.ffn_blocks: 0 must be a positive whole number"),
        ({"ffn_blocks": True}, "elastic.ffn_blocks: True must be a positive whole number"),
        ({"expert_blocks": "two"}, "elastic.expert_blocks: 'two' must be a positive whole number"),
        ({"heterogeneous": "ffn"}, "elastic.heterogeneous: 'ffn' must be a list of axes"),
        ({"heterogeneous": ["hidden"]}, "elastic.heterogeneous: 'hidden' cannot differ between the layers"),
        ({"heterogeneous": ["experts"]}, "elastic.heterogeneous: 'experts' cannot differ between the layers"),
        ({"depth_ranking": 3}, "elastic.depth_ranking: 3 must be a list of whole numbers"),
        ({"depth_ranking": [1, 5]}, "elastic.depth_ranking: 5 is no layer of the parent, which has 0..4"),
        ({"depth_ranking": [1, 1]}, "elastic.depth_ranking: [1, 1] names a layer twice"),
        ({"depth_ranking": [1]}, "elastic.depth_ranking: 1 layers are ranked, the smallest choice of depth skips 2"),
        ({"budgets": []}, "elastic.budgets: [] must be a list"),
        ({"budgets": [3]}, "elastic.budgets[0]: 3 must be a mapping"),
        ({"budgets": [{"name": "a"}]}, "elastic.budgets[0].fraction: give one of"),
        ({"budgets": [{"name": "a", "fraction": 1.0, "target": 3}]}, "elastic.budgets[0].fraction: give one of"),
        ({"budgets": [{"fraction": 1.0}]}, "elastic.budgets[0].name: required"),
        ({"budgets": [{"name": "a", "fraction": 1.0, "unit": "money"}]}, "elastic.budgets[0].unit: 'money' must be"),
        ({"budgets": [{"name": "a", "fraction": 1.0, "unit": "latency"}]}, "latency needs a table"),
        ({"budgets": [{"name": "a", "fraction": 1.0, "heterogeneous": 1}]}, "heterogeneous: 1 must be true or false"),
        ({"budgets": [{"name": "a", "fraction": 1.0}, {"name": "b", "target": "6e9"}]}, "'6e9' must be a number"),
        ({"budgets": [{"name": "a", "fraction": 0.9}]}, "the first fraction 0.9 must be 1.0"),
        ({"budgets": [{"name": "a", "fraction": 1.0}, {"name": "b", "fraction": 1.0}]}, "must be strictly descending"),
        ({"budgets": [{"name": "a", "fraction": 1.0}, {"name": "b", "fraction": -1}]}, "fraction -1.0 must lie above"),
        ({"budgets": [{"name": "a", "fraction": 1.0}, {"name": "a", "fraction": 0.5}]}, "names ['a', 'a'] must differ"),
        ({"budgets": [{"name": "a/b", "fraction": 1.0}]}, "name 'a/b' must be usable as a folder's name"),
        ({"deployment": {"context": 0}}, "deployment.context: 0"),
    ],
)  # fmt: skip
def test_every_fault_is_told(changes: dict[str, Any], text: str) -> None:
    made, faults = parsed(changes)
    assert made is None
    assert any(text in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("changes", "flags", "text"),
    [
        ({"axes.experts": [8, 2]}, {}, "elastic.axes.experts: choice 2 does not divide by its 4 blocks"),
        ({"axes.experts": [8, 1], "expert_blocks": 1}, {}, "choice 1 keeps fewer experts than a token goes to"),
        ({}, {"expert-model-parallel-size": 8}, "elastic.axes.experts: its 4 blocks do not divide by expert-model"),
        ({"axes.ffn": [8]}, {}, "elastic.axes.ffn: a parent 'ME*' has"),
        ({"axes.expert_ffn": [16, 6]}, {}, "elastic.axes.expert_ffn: choice 6 does not divide by its 8 blocks"),
    ],
)  # fmt: skip
def test_faults_of_experts_are_told(changes: dict[str, Any], flags: dict[str, int], text: str) -> None:
    made, faults = parsed(shape=MOE, base=GOOD_MOE)
    assert made is not None, faults
    made, faults = parsed(changes, MOE, GOOD_MOE, flags)
    assert made is None
    assert any(text in fault for fault in faults), faults


def test_blocks_must_divide_over_the_ranks() -> None:
    made, faults = parsed(flags={"tensor-model-parallel-size": 8})
    assert made is None
    for axis in ("mamba_heads", "attention_heads"):
        assert f"elastic.axes.{axis}: its 4 blocks do not divide by tensor-model-parallel-size 8" in faults
    assert not any("elastic.axes.ffn" in fault for fault in faults)  # it has eight
    assert parsed(flags={"tensor-model-parallel-size": 4})[1] == []


def test_faults_of_axes_do_not_hide_those_of_budgets() -> None:
    budgets = [{"name": "a", "fraction": 0.9}, {"name": "b", "target": 5.0}]
    faults = parsed({"axes.ffn": [32, 9], "heterogeneous": ["depth"], "depth_ranking": [9], "budgets": budgets[:1]})[1]
    for text in ("choice 9", "'depth' cannot differ", "9 is no layer", "the first fraction 0.9"):
        assert any(text in fault for fault in faults), (text, faults)


# Rankings of a parent.


def test_a_ranking_comes_from_the_parent_where_the_recipe_has_none() -> None:
    bare = replace(FAMILY, depth_ranking=())
    assert with_depth_ranking(bare, (2, 0, 1), "sorted").depth_ranking == (2, 0, 1)
    assert with_depth_ranking(FAMILY, (2, 0, 1), "sorted") is FAMILY
    fixed = replace(bare, choices={**FAMILY.choices, "depth": (5,)})
    assert with_depth_ranking(fixed, (), "sorted") is fixed
    with pytest.raises(CheckpointError, match=r"sorted: elastic\.axes\.depth needs the layers ranked: 0 layers are"):
        with_depth_ranking(bare, (), "sorted")
    with pytest.raises(CheckpointError, match=r"7 is no layer of the parent"):
        with_depth_ranking(bare, (7, 1), "sorted")


# Given selections.

FULL: dict[str, Any] = {"p100": {}, "p75": {}, "p50": {}}


def given(**small: Any) -> tuple[tuple[Selection, ...], list[str]]:
    """The selections with one for the smallest budget, and what is wrong."""
    faults = list[str]()
    return parse_selections({**FULL, "p50": small}, VARIED, faults), faults


def test_selections_are_read_whole() -> None:
    found, faults = given(ffn=[8, 16], mamba_heads=4, mamba_head_dim=1, depth=3)
    assert not faults
    assert found == (FAMILY.full, FAMILY.full, narrow(ffn=(8, 16), mamba_heads=4, mamba_head_dim=1, depth=3))
    assert given(skipped=[0, 4])[0][2] == narrow(skipped=(0, 4))
    assert given(ffn=[8, 8]) == given(ffn=8)


@pytest.mark.parametrize(
    ("small", "text"),
    [
        ({"experts": 4}, "must map axes of"),
        ({"ffn": 9}, "elastic.selections.p50.ffn: 9 is none of [32, 24, 16, 8]"),
        ({"ffn": [8, 9]}, "elastic.selections.p50.ffn: 9 is none of"),
        ({"ffn": [8, 16, 8]}, "elastic.selections.p50.ffn: 3 numbers, 2 layers have it"),
        ({"hidden": [12, 8]}, "elastic.selections.p50.hidden: [12, 8] differs between layers"),
        ({"ffn": "8"}, "must map axes to whole numbers or lists of them"),
        ({"depth": 2}, "elastic.selections.p50.depth: 2 must be one of [5, 4, 3]"),
        ({"skipped": 3}, "must map axes to whole numbers or lists of them"),
        ({"skipped": [5]}, "skipped: [5] must be layers of the parent, 0..4"),
        ({"skipped": [0, 1, 2, 3, 4]}, "skipped: a model keeps at least one layer"),
    ],
)
def test_faults_of_selections_are_told(small: dict[str, Any], text: str) -> None:
    faults = given(**small)[1]
    assert len(faults) == 1, faults
    assert text in faults[0]


def test_a_selection_is_one_of_the_familys() -> None:
    assert selection_faults(VARIED, narrow(ffn=(8, 16), skipped=(2,))) == []
    assert selection_faults(FAMILY, narrow(ffn=(8, 16))) == [
        "ffn: [8, 16] differs between layers; elastic.heterogeneous does not name the axis"
    ]
