"""What a checkpoint says about itself."""

import dataclasses
import json

import pytest
import torch

from megatron_elastic.budget import Budget, Selection
from megatron_elastic.errors import CheckpointError
from megatron_elastic.metadata import CAPACITY, SCHEMA, Metadata
from tests.unit.small_family import FAMILY, SHAPE

DECIDED = Metadata(
    kind="family",
    shape=SHAPE,
    ffn_blocks=8,
    flags={"hidden-size": 12, "squared-relu": True, "init-method-std": 0.02, "normalization": "RMSNorm"},
    choices=dict(FAMILY.choices),
    budgets=FAMILY.budgets,
    selections=(FAMILY.full, Selection(10, 24, 8, 8), Selection(8, 16, 8, 4)),
    stage=2,
    iteration=70,
)


def test_round_trip() -> None:
    tensor = DECIDED.to_tensor()
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (CAPACITY,)
    assert Metadata.from_tensor(tensor) == DECIDED
    assert Metadata.from_json(DECIDED.to_json()) == DECIDED


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


def test_the_schema_before_is_read() -> None:
    old = json.loads(DECIDED.to_json())
    del old["budget_mode"]
    assert Metadata.from_json(json.dumps({**old, "schema": 1})) == DECIDED
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
    assert DECIDED.selection_of("p75") == Selection(10, 24, 8, 8)
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
