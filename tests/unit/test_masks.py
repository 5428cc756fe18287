"""Masks: at one-hot what the block order keeps, in between the mix of the choices."""

import pytest
import torch
from hypothesis import given, settings

from megatron_elastic.axes import AXES
from megatron_elastic.budget import Selection
from megatron_elastic.masks import Masks, MaskTables, one_hot
from tests.unit.small_family import FAMILY, selections


@pytest.fixture(scope="module")
def tables() -> MaskTables:
    return MaskTables(FAMILY.orders, FAMILY.choices, 1)


@settings(max_examples=30)
@given(selection=selections())
def test_one_hot_is_the_hard_mask(selection: Selection) -> None:
    found = Masks(*MaskTables(FAMILY.orders, FAMILY.choices, 1)(one_hot(selection, FAMILY.choices)))
    for axis, size in selection.as_dict().items():
        mask = getattr(found, axis)
        assert torch.equal(mask, FAMILY.orders[axis].mask_table([size])[0])
        assert mask.sum() == size


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_hold_parts_of_the_same_mask(tables: MaskTables, world: int) -> None:
    certain = one_hot(Selection(8, 16, 8, 4), FAMILY.choices)
    whole, local = tables(certain), MaskTables(FAMILY.orders, FAMILY.choices, world)(certain)
    assert torch.equal(local[0], whole[0])  # the residual stream is on every rank
    for mine, all_of_it in zip(local[1:], whole[1:], strict=True):
        assert torch.equal(torch.cat([mine] * world), all_of_it)


def test_a_soft_mask_mixes_its_choices(tables: MaskTables) -> None:
    probabilities = one_hot(FAMILY.full, FAMILY.choices)
    probabilities["ffn"] = torch.tensor([0.5, 0.25, 0.0, 0.25])  # 32, 24, 16, 8: three, two, one of four in a block
    mask = Masks(*tables(probabilities)).ffn.view(8, 4)
    # Sums of powers of two are exact.
    assert torch.equal(mask, torch.tensor([1.0, 0.75, 0.75, 0.5]).expand(8, 4))
    assert mask.sum() == 0.5 * 32 + 0.25 * 24 + 0.25 * 8


def test_gradients_reach_every_probability(tables: MaskTables) -> None:
    probabilities = {axis: p.requires_grad_() for axis, p in one_hot(FAMILY.full, FAMILY.choices).items()}
    sum(mask.sum() for mask in tables(probabilities)).backward()
    for axis in AXES:
        # One probability more of a choice adds as many entries as the choice keeps.
        assert probabilities[axis].grad is not None
        assert probabilities[axis].grad.tolist() == list(FAMILY.choices[axis])


def test_tables_are_not_saved(tables: MaskTables) -> None:
    assert tables.state_dict() == {}
    assert [name for name, _ in tables.named_buffers()] == list(AXES)


def test_one_hot_of_other_selections_differs() -> None:
    a, b = (one_hot(s, FAMILY.choices, torch.float64) for s in (FAMILY.full, Selection(12, 32, 12, 4)))
    assert a["ffn"].dtype == torch.float64
    assert [axis for axis in AXES if not torch.equal(a[axis], b[axis])] == ["attention_heads"]
