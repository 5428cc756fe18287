"""The layout of every parameter against the cost model, which knows formulas only."""

import dataclasses
import json
from math import prod

import pytest
from hypothesis import given, settings

from megatron_elastic.budget import Selection
from megatron_elastic.cost_model import parameters
from megatron_elastic.layout import Layout, ModelShape, layer_number
from tests.unit.small_family import FAMILY, LAYERS, SHAPE, narrow, selections, varied_selections


def test_sizes_multiply_to_the_parents_parameters() -> None:
    total = sum(prod(dimension.size for dimension in dimensions) for dimensions in FAMILY.layout.parameters().values())
    assert total == parameters(SHAPE, SHAPE.full)


@settings(max_examples=40)
@given(selection=selections())
def test_kept_sizes_multiply_to_the_selections_parameters(selection: Selection) -> None:
    selection = dataclasses.replace(selection, skipped=())
    kept = selection.sizes
    sizes = {
        name: [dimension.kept_size(kept, SHAPE.full) for dimension in dimensions]
        for name, dimensions in FAMILY.layout.parameters().items()
    }
    assert sum(map(prod, sizes.values())) == parameters(SHAPE, kept)
    # The cut has the very shape that a parent of that size has.
    cut = selection.submodel(SHAPE)
    own = {name: [d.size for d in dimensions] for name, dimensions in Layout(cut, 8).parameters().items()}
    assert sizes == own
    assert sum(map(prod, own.values())) == parameters(cut, cut.full)


@settings(max_examples=40)
@given(selection=varied_selections())
def test_kept_sizes_of_layers_that_differ_multiply_to_the_selections_parameters(selection: Selection) -> None:
    total = 0
    for name, dimensions in FAMILY.layout.parameters().items():
        number = layer_number(name)
        if number in selection.skipped:
            continue
        kept = {"hidden": selection.hidden} if number is None else selection.layer(SHAPE.pattern, number)
        total += prod(dimension.kept_size(kept, SHAPE.full) for dimension in dimensions)
    assert total == parameters(SHAPE, selection.sizes, selection.gates(LAYERS))
    # The shape of the cut knows its layers' sizes, and costs the same.
    cut = selection.submodel(SHAPE)
    assert total == parameters(cut, cut.full)
    left = [number for number in range(LAYERS) if number not in selection.skipped]
    assert [cut.layer(new) for new in range(len(left))] == [selection.layer(SHAPE.pattern, old) for old in left]


@pytest.mark.parametrize("pattern", ["M", "*", "-", "MM**--", "M-*"])
def test_every_pattern_counts(pattern: str) -> None:
    shape = dataclasses.replace(SHAPE, pattern=pattern)
    sizes = [prod(d.size for d in dimensions) for dimensions in Layout(shape, 8).parameters().values()]
    assert sum(sizes) == parameters(shape, shape.full)
    assert sum(sizes) != parameters(shape, {**shape.full, "hidden": shape.hidden - 1})


def test_names_carry_global_layer_numbers() -> None:
    names = list(FAMILY.layout.parameters())
    assert names[0] == "embedding.word_embeddings.weight"
    assert names[-2:] == ["decoder.final_norm.weight", "output_layer.weight"]
    assert "decoder.layers.2.self_attention.linear_qkv.weight" in names
    assert "decoder.layers.3.mixer.in_proj.weight" in names
    assert "decoder.layers.4.mlp.linear_fc2.weight" in names
    assert not any(name.startswith("decoder.layers.5.") for name in names)


def test_a_shape_survives_its_own_dictionary() -> None:
    assert ModelShape.from_dict(SHAPE.as_dict()) == SHAPE
    assert ModelShape.from_dict({**SHAPE.as_dict(), "hidden": 13}) != SHAPE


def test_resizing_keeps_what_is_not_elastic() -> None:
    small = SHAPE.resized({"hidden": 8, "mamba_heads": 4})
    assert small.full == {**SHAPE.full, "hidden": 8, "mamba_heads": 4}
    assert small.resized(SHAPE.full) == SHAPE
    assert small.uniform


def test_resizing_numbers_the_layers_that_are_left() -> None:
    varied = narrow(ffn=(8, 16), mamba_heads=(4, 12), skipped=(0,)).submodel(SHAPE)
    assert (varied.pattern, varied.ffn, varied.mamba_heads) == ("-*M-", (8, 16), 12)
    assert not varied.uniform
    assert varied.layer(0) == {"hidden": 12, "ffn": 8}
    assert ModelShape.from_dict(json.loads(json.dumps(varied.as_dict()))) == varied
    without = narrow(skipped=(0, 3)).submodel(SHAPE)
    assert (without.pattern, without.mamba_heads, without.mamba_head_dim) == ("-*-", 0, 0)
    assert without.axes == ("hidden", "ffn", "attention_heads", "depth")
    assert without != narrow(skipped=(0, 1)).submodel(SHAPE)


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ({}, []),
        ({"pattern": "M-|*-"}, []),
        ({"pattern": "M-G*"}, ["layer kinds ['G']"]),
        ({"pattern": "ME-*"}, ["top_k 0 must lie in 1..0, the experts there are"]),
        ({"pattern": "ME-*", "experts": 4, "top_k": 5}, ["top_k 5 must lie in 1..4"]),
        ({"pattern": "ME-*", "experts": 4, "top_k": 4}, []),
        ({"mamba_heads": 10}, ["mamba_heads 10 must be a multiple of mamba_groups 4"]),
        ({"attention_heads": 6}, ["attention_heads 6 must be a multiple of query_groups 4"]),
        ({"pattern": "GM", "mamba_heads": 10}, ["layer kinds ['G']", "mamba_heads 10"]),
        ({"pattern": "-", "mamba_heads": 10}, []),
    ],
)
def test_faults_of_a_shape(change: dict[str, object], texts: list[str]) -> None:
    found = ModelShape.from_dict({**SHAPE.as_dict(), **change}).faults()
    assert len(found) == len(texts), found
    for fault, text in zip(found, texts, strict=True):
        assert text in fault


def test_groups_are_the_blocks_of_the_heads() -> None:
    orders = SHAPE.orders(16)
    assert {axis: order.blocks for axis, order in orders.items()} == {
        "hidden": 1, "ffn": 16, "mamba_heads": 4, "mamba_head_dim": 1, "attention_heads": 4,
    }  # fmt: skip
    assert {axis for axis, order in orders.items() if order.pinned} == {"mamba_heads", "attention_heads"}
