"""Masks: at one-hot what the block order keeps, in between the mix of the choices."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_elastic.budget import Selection
from megatron_elastic.layout import Layout
from megatron_elastic.masks import MaskTables, effective_width, one_hot
from tests.unit.small_family import AXES, FAMILY, LAYERS, SHAPE, VARIED, narrow, varied_selections


@pytest.fixture(scope="module")
def tables() -> MaskTables:
    return MaskTables(FAMILY, 1)


def hard(axis: str, size: int) -> Tensor:
    return FAMILY.orders[axis].mask_table([size])[0]


@settings(max_examples=30)
@given(selection=varied_selections(), depth=st.sampled_from(FAMILY.choices["depth"]))
def test_one_hot_is_the_hard_mask_of_every_layer(selection: Selection, depth: int) -> None:
    selection = dataclasses.replace(selection, skipped=FAMILY.skipped(depth))
    tables = MaskTables(VARIED, 1)
    mixed = tables(one_hot(selection, VARIED))
    for number in range(LAYERS):
        found, own = tables.of_layer(mixed, number), selection.layer(SHAPE.pattern, number)
        assert torch.equal(found.hidden, hard("hidden", selection.hidden))
        # A skipped layer adds nothing.
        assert torch.equal(found.residual, found.hidden * (number not in selection.skipped))
        assert set(found.axes) == set(own) - {"hidden"}
        for axis, mask in found.axes.items():
            assert torch.equal(mask, hard(axis, own[axis]))
            assert mask.sum() == own[axis]


def test_layers_that_are_alike_have_the_same_masks(tables: MaskTables) -> None:
    mixed = tables(one_hot(narrow(ffn=16), FAMILY))
    assert torch.equal(tables.of_layer(mixed, 1).axes["ffn"], tables.of_layer(mixed, 4).axes["ffn"])
    varied = MaskTables(VARIED, 1)
    mixed = varied(one_hot(narrow(ffn=(16, 24)), VARIED))
    assert torch.equal(varied.of_layer(mixed, 1).axes["ffn"], hard("ffn", 16))
    assert torch.equal(varied.of_layer(mixed, 4).axes["ffn"], hard("ffn", 24))


def test_a_layer_is_added_with_the_probability_that_it_is_kept(tables: MaskTables) -> None:
    probabilities = {**one_hot(narrow(hidden=8), FAMILY), "depth": torch.tensor([[0.5, 0.25, 0.25]])}
    mixed = tables(probabilities)
    kept = [tables.of_layer(mixed, number).residual[0].item() for number in range(LAYERS)]
    assert kept == [1.0, 0.75, 1.0, 0.5, 1.0]  # layer 3 is left out first, then layer 1
    assert all(tables.of_layer(mixed, number).residual[8:].sum() == 0 for number in range(LAYERS))


def test_where_depth_is_fixed_the_residual_mask_is_the_hidden_one() -> None:
    tables = MaskTables(dataclasses.replace(FAMILY, choices={**FAMILY.choices, "depth": (5,)}), 1)
    masks = tables.of_layer(tables({**one_hot(FAMILY.full, FAMILY), "depth": torch.ones(1, 1)}), 3)
    assert masks.residual is masks.hidden


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_hold_parts_of_the_same_mask(tables: MaskTables, world: int) -> None:
    certain = one_hot(narrow(hidden=8, ffn=16, mamba_heads=8, mamba_head_dim=1, attention_heads=4, depth=4), FAMILY)
    whole, local = tables(certain), MaskTables(FAMILY, world)(certain)
    for axis, mine, all_of_it in zip(AXES, local, whole, strict=True):
        # The residual stream, the channels of a head and the layers are on every rank.
        share = world if Layout.sharded[axis] else 1
        assert torch.equal(torch.cat([mine] * share, 1), all_of_it)
    assert [axis for axis in AXES if not Layout.sharded[axis]] == ["hidden", "mamba_head_dim", "depth"]


def test_a_soft_mask_mixes_its_choices(tables: MaskTables) -> None:
    probabilities = one_hot(FAMILY.full, FAMILY)
    probabilities["ffn"] = torch.tensor([[0.5, 0.25, 0.0, 0.25]])  # 32, 24, 16, 8: three, two, one of four in a block
    mask = tables.of_layer(tables(probabilities), 1).axes["ffn"].view(8, 4)
    # Sums of powers of two are exact.
    assert torch.equal(mask, torch.tensor([1.0, 0.75, 0.75, 0.5]).expand(8, 4))
    assert mask.sum() == 0.5 * 32 + 0.25 * 24 + 0.25 * 8


def test_gradients_reach_every_probability(tables: MaskTables) -> None:
    probabilities = {axis: p.requires_grad_() for axis, p in one_hot(FAMILY.full, FAMILY).items()}
    sum(mask.sum() for mask in tables(probabilities)).backward()
    for axis in AXES:
        # One probability more of a choice adds as many entries as the choice keeps.
        assert probabilities[axis].grad is not None
        assert probabilities[axis].grad.tolist() == [list(FAMILY.choices[axis])]


def test_tables_are_not_saved(tables: MaskTables) -> None:
    assert tables.state_dict() == {}
    assert [name for name, _ in tables.named_buffers()] == list(AXES)


def test_one_hot_of_other_selections_differs() -> None:
    a, b = (one_hot(s, FAMILY, torch.float64) for s in (FAMILY.full, narrow(attention_heads=4, depth=3)))
    assert a["ffn"].dtype == torch.float64
    assert [axis for axis in AXES if not torch.equal(a[axis], b[axis])] == ["attention_heads", "depth"]


def test_one_hot_has_a_row_for_every_layer_that_chooses() -> None:
    found = one_hot(narrow(ffn=(8, 32), mamba_heads=4), VARIED)
    assert found["ffn"].tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    assert found["mamba_heads"].tolist() == [[0, 0, 1]] * 2
    assert {axis: tuple(p.shape) for axis, p in found.items()} == {
        axis: (VARIED.uses(axis), len(VARIED.choices[axis])) for axis in AXES
    }


def test_effective_width_of_a_bfloat16_mask_is_whole() -> None:
    """2712 kept channels lie between two numbers of 8 bits."""
    mask = (torch.arange(4096) < 2712).bfloat16()
    assert float(effective_width(mask)) == 2712.0
    assert effective_width(mask.double()).dtype is torch.float64
    assert float(mask.sum()) != 2712.0
