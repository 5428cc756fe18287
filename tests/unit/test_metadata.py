"""What a checkpoint says about itself."""

import dataclasses
import json

import pytest
import torch

from megatron_elastic.budget import Budget
from megatron_elastic.errors import CheckpointError
from megatron_elastic.metadata import CAPACITY, SCHEMA, Metadata
from tests.unit.small_family import FAMILY, SHAPE, VARIED, narrow

MEDIUM = narrow(hidden=10, ffn=24, mamba_heads=8)
SMALL = narrow(hidden=8, ffn=16, mamba_heads=8, mamba_head_dim=1, attention_heads=4, depth=4)
DECIDED = Metadata(
    kind="family",
    shape=SHAPE,
    ffn_blocks=8,
    flags={"hidden-size": 12, "squared-relu": True, "init-method-std": 0.02, "normalization": "RMSNorm"},
    choices=dict(FAMILY.choices),
    budgets=FAMILY.budgets,
    depth_ranking=FAMILY.depth_ranking,
    selections=(FAMILY.full, MEDIUM, SMALL),
    stage=2,
    iteration=70,
)


def test_round_trip() -> None:
    tensor = DECIDED.to_tensor()
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (CAPACITY,)
    assert Metadata.from_tensor(tensor) == DECIDED
    assert Metadata.from_json(DECIDED.to_json()) == DECIDED


def test_a_family_says_all_that_makes_it() -> None:
    for family in (FAMILY, VARIED):
        described = Metadata.of_family(family, {"hidden-size": 12}, stage=1)
        assert Metadata.from_tensor(described.to_tensor()).family == described.family == family
    assert Metadata.of_family(VARIED, {}).family != FAMILY


def test_selections_whose_layers_differ_survive() -> None:
    varied = narrow(ffn=(8, 16), mamba_heads=(4, 12), skipped=(2,))
    described = Metadata.of_family(VARIED, {}, selections=(VARIED.full, varied, varied))
    assert Metadata.from_tensor(described.to_tensor()).selection_of("p50") == varied
    cut = Metadata(kind="extracted", shape=varied.submodel(SHAPE), ffn_blocks=8, flags={})
    assert Metadata.from_tensor(cut.to_tensor()) == cut


def test_the_tensors_size_does_not_depend_on_what_it_says() -> None:
    plain = Metadata(kind="sorted", shape=SHAPE, ffn_blocks=8, flags={})
    assert plain.to_tensor().shape == DECIDED.to_tensor().shape
    assert not torch.equal(plain.to_tensor(), DECIDED.to_tensor())
    assert Metadata.from_tensor(plain.to_tensor()) == plain != DECIDED


def test_names_need_not_be_ascii() -> None:
    named = dataclasses.replace(DECIDED, budgets=(Budget("größte", 1.0), *FAMILY.budgets[1:]))
    assert Metadata.from_tensor(named.to_tensor()).budgets[0].name == "größte"


def with_schema(version: object) -> str:
    return json.dumps({**json.loads(DECIDED.to_json()), "schema": version})


def test_a_newer_schema_is_refused() -> None:
    assert Metadata.from_json(with_schema(SCHEMA)) == DECIDED
    with pytest.raises(CheckpointError, match=f"schema {SCHEMA + 1}.*update megatron_elastic"):
        Metadata.from_json(with_schema(SCHEMA + 1))


OF_FOUR_AXES = """
{"kind": "family", "schema": 2, "ffn_blocks": 8, "flags": {}, "budget_mode": "joint", "stage": 1, "iteration": 7,
 "budget": "", "shape": {"pattern": "M-*M-", "vocab": 32, "hidden": 12, "ffn": 32, "attention_heads": 8,
 "query_groups": 4, "head_dim": 3, "mamba_heads": 12, "mamba_head_dim": 2, "mamba_groups": 4, "mamba_state": 3,
 "conv_kernel": 4},
 "choices": {"hidden": [12, 10], "ffn": [32, 8], "mamba_heads": [12, 4], "attention_heads": [8, 4]},
 "budgets": [{"name": "p100", "fraction": 1.0}, {"name": "p50", "fraction": 0.5}],
 "selections": [{"hidden": 12, "ffn": 32, "mamba_heads": 12, "attention_heads": 8},
 {"hidden": 10, "ffn": 8, "mamba_heads": 4, "attention_heads": 4}]}
"""


def test_the_schemas_before_are_read() -> None:
    old = json.loads(OF_FOUR_AXES)
    found = Metadata.from_json(OF_FOUR_AXES)
    assert found.shape == SHAPE
    assert found.selections[0] == found.family.full
    assert found.selection_of("p50").as_dict() == {**old["selections"][1], "mamba_head_dim": 2}
    given = {axis: tuple(choices) for axis, choices in old["choices"].items()}
    assert found.choices == found.family.choices == {**given, "mamba_head_dim": (2,), "depth": (5,)}
    assert found.family.budgets == (Budget("p100", 1.0), Budget("p50", 0.5))
    # A family resumes from a checkpoint of the schema before.
    assert Metadata.of_family(found.family, {}).same_family(found) == []
    del old["budget_mode"]
    assert Metadata.from_json(json.dumps({**old, "schema": 1})) == found
    drawn = dataclasses.replace(DECIDED, budget_mode="sampled")
    assert [fault.split(":")[0] for fault in drawn.same_family(DECIDED)] == ["budget_mode"]


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", "no json", '"schema"', '{"schema": 1}', '{"schema": 1, "shape": {"size": 3}}']
)
def test_foreign_text_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"elastic\.metadata"):
        Metadata.from_json(text)


def test_foreign_bytes_are_refused() -> None:
    for tensor in (torch.zeros(CAPACITY, dtype=torch.uint8), torch.full((9,), 255, dtype=torch.uint8)):
        with pytest.raises(CheckpointError, match="not a description"):
            Metadata.from_tensor(tensor)


def test_too_much_is_refused() -> None:
    with pytest.raises(CheckpointError, match=rf"{CAPACITY} are reserved"):
        dataclasses.replace(DECIDED, flags={"note": "x" * CAPACITY}).to_tensor()


def test_the_selection_of_a_budget() -> None:
    assert DECIDED.selection_of("p75") == MEDIUM
    assert DECIDED.selection_of("p50") != DECIDED.selection_of("p75")
    with pytest.raises(CheckpointError, match=r"'p25'.*\['p100', 'p75', 'p50'\]"):
        DECIDED.selection_of("p25")
    with pytest.raises(CheckpointError, match="not decided yet"):
        dataclasses.replace(DECIDED, selections=()).selection_of("p75")


def test_progress_does_not_make_another_family() -> None:
    later = dataclasses.replace(DECIDED, stage=1, iteration=3, selections=(), flags={"lr": 1})
    assert DECIDED.same_family(later) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "sorted"),
        ("shape", SHAPE.resized({"ffn": 24})),
        ("ffn_blocks", 4),
        ("choices", {**FAMILY.choices, "ffn": (32, 8)}),
        ("budgets", FAMILY.budgets[:2]),
        ("heterogeneous", ("ffn",)),
        ("depth_ranking", (1, 3, 2)),
        ("expert_blocks", 2),
    ],
)
def test_what_makes_another_family_is_named(name: str, value: object) -> None:
    found = DECIDED.same_family(dataclasses.replace(DECIDED, **{name: value}))  # type: ignore[arg-type]
    assert len(found) == 1
    assert found[0].startswith(f"{name}: the recipe has ")
    assert str(value) in found[0]


def test_everything_that_differs_is_listed() -> None:
    other = dataclasses.replace(DECIDED, kind="sorted", ffn_blocks=4, budgets=())
    assert [text.split(":")[0] for text in DECIDED.same_family(other)] == ["kind", "ffn_blocks", "budgets"]
