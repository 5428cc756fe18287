"""Block order: what a choice keeps does not depend on the layout, nests, and is one set for masks, slices, sorting."""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_elastic.axes import BlockOrder, Dimension, Item, Part, Segments, index_in_kind, layer_kinds
from megatron_elastic.budget import Selection
from tests.unit.small_family import FAMILY, SHAPE, narrow, selections

PARAMETERS = FAMILY.layout.parameters()
DEALT = BlockOrder(24, 4)
PINNED = BlockOrder(24, 4, pinned=True)
CHOICES = (24, 20, 16, 12, 8, 4)


def indices(segments: Segments) -> list[int]:
    return [index for start, stop in segments for index in range(start, stop)]


def kept_entries(order: BlockOrder, choice: int) -> set[int]:
    return set(order.mask_table([choice])[0].nonzero().flatten().tolist())


def test_layer_kinds_leave_out_pipeline_separators() -> None:
    assert layer_kinds("M-|*-||M") == "M-*-M"
    assert [index_in_kind("M-*-M", number) for number in range(5)] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("order", [DEALT, PINNED])
def test_a_choice_is_the_prefix_of_every_block(order: BlockOrder) -> None:
    for choice in CHOICES:
        expected = {block * 6 + place for block in range(4) for place in range(choice // 4)}
        assert kept_entries(order, choice) == expected
        assert len(expected) == choice


@pytest.mark.parametrize("world", [1, 2, 4])
def test_what_is_kept_does_not_depend_on_the_ranks(world: int) -> None:
    whole = DEALT.mask_table(CHOICES)
    local = DEALT.mask_table(CHOICES, world)
    assert local.shape == (len(CHOICES), 24 // world)
    # The ranks' shards side by side are the whole axis.
    assert torch.equal(torch.cat([local] * world, dim=1), whole)
    assert local.sum(1).tolist() == [choice / world for choice in CHOICES]


def test_a_plain_prefix_would_depend_on_the_ranks() -> None:
    plain = BlockOrder(24, 1)
    assert not torch.equal(torch.cat([plain.mask_table(CHOICES, 2)] * 2, dim=1), plain.mask_table(CHOICES))


@given(blocks=st.sampled_from([1, 2, 4, 8]), width=st.integers(1, 6), data=st.data())
def test_choices_nest(blocks: int, width: int, data: st.DataObject) -> None:
    order = BlockOrder(blocks * width, blocks)
    small, large = sorted(data.draw(st.lists(st.integers(1, width), min_size=2, max_size=2)))
    assert kept_entries(order, small * blocks) <= kept_entries(order, large * blocks)
    assert order.per_block(large * blocks) == large


@settings(max_examples=30)
@given(blocks=st.sampled_from([1, 2, 4, 8]), width=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_dealt_prefixes_are_the_global_top(blocks: int, width: int, seed: int) -> None:
    order = BlockOrder(blocks * width, blocks)
    scores = torch.rand(order.size, generator=torch.Generator().manual_seed(seed))
    permutation = order.permutation(scores)
    assert sorted(permutation.tolist()) == list(range(order.size))
    best = scores.argsort(descending=True).tolist()
    for kept in range(1, width + 1):
        chosen = {permutation[place].item() for place in kept_entries(order, kept * blocks)}
        assert chosen == set(best[: kept * blocks])


@settings(max_examples=30)
@given(blocks=st.sampled_from([2, 4, 8]), width=st.integers(2, 6), seed=st.integers(0, 2**31))
def test_pinned_entries_stay_in_their_block(blocks: int, width: int, seed: int) -> None:
    order = BlockOrder(blocks * width, blocks, pinned=True)
    scores = torch.rand(order.size, generator=torch.Generator().manual_seed(seed))
    permutation = order.permutation(scores)
    for block, moved in enumerate(permutation.view(blocks, width).tolist()):
        assert sorted(moved) == list(range(block * width, (block + 1) * width))
        assert scores[moved].tolist() == sorted(scores[moved].tolist(), reverse=True)


def test_dealing_moves_entries_between_blocks_and_pinning_does_not() -> None:
    scores = torch.arange(24.0)  # the most important are all in the last block
    assert DEALT.permutation(scores).view(4, 6)[0].tolist() == [23, 19, 15, 11, 7, 3]
    assert PINNED.permutation(scores).view(4, 6)[0].tolist() == [5, 4, 3, 2, 1, 0]


def test_equal_scores_keep_their_order() -> None:
    assert PINNED.permutation(torch.zeros(24)).tolist() == list(range(24))
    assert DEALT.permutation(torch.zeros(24)).tolist() == [p * 4 + b for b in range(4) for p in range(6)]


def test_good_choices_have_no_fault() -> None:
    assert DEALT.faults(CHOICES) == []
    assert BlockOrder(7, 1).faults([7, 5, 1]) == []


@pytest.mark.parametrize(
    ("order", "choices", "texts"),
    [
        (BlockOrder(10, 4), [10], ["size 10 does not divide into 4 blocks", "choice 10 does not divide"]),
        (DEALT, [], ["choices [] must begin with the full size 24"]),
        (DEALT, [20, 8], ["must begin with the full size 24"]),
        (DEALT, [24, 8, 12], ["must be strictly descending"]),
        (DEALT, [24, 24], ["must be strictly descending"]),
        (DEALT, [24, 7], ["choice 7 does not divide by its 4 blocks: 4 would"]),
        (DEALT, [24, 3], ["choice 3 does not divide by its 4 blocks: 4 would"]),
        (DEALT, [24, 0], ["choice 0 must lie in 1..24"]),
        (DEALT, [28, 24], ["must begin with the full size 24", "choice 28 must lie in 1..24"]),
        (
            DEALT,
            [20, 21, 0],
            ["must begin", "strictly descending", "choice 21 does not divide", "choice 0 must lie"],
        ),
    ],
)
def test_every_fault_is_told(order: BlockOrder, choices: list[int], texts: list[str]) -> None:
    found = order.faults(choices)
    assert len(found) == len(texts), found
    for fault, text in zip(found, texts, strict=True):
        assert text in fault


@dataclass(frozen=True)
class Row:
    """What one row of a dimension is: the entry of its axis, and its place among the entry's rows."""

    part: int
    axis: str | None
    entry: int
    width_axis: str | None
    place: int


def row_labels(dimension: Dimension) -> list[Row]:
    """For each row: its part, axis, and number among the entries of that axis in that part (rows where not elastic)."""
    found = []
    for number, part in enumerate(dimension.parts):
        counts = {item.axis: 0 for item in part.items}
        for _ in range(part.blocks):
            for item in part.items:
                for _ in range(item.entries):
                    entry = counts[item.axis]
                    found.extend(Row(number, item.axis, entry, item.width_axis, place) for place in range(item.width))
                    counts[item.axis] += 1
    return found


def rank_rows(dimension: Dimension, rank: int, world: int) -> list[int]:
    """Rows of the whole dimension that one rank holds."""
    if not dimension.sharded:
        return list(range(dimension.size))
    found, start = [], 0
    for size in dimension.part_sizes():
        share = size // world
        found.extend(range(start + rank * share, start + (rank + 1) * share))
        start += size
    return found


def masked_rows(dimension: Dimension, selection: Selection) -> list[int]:
    """Rows whose entry the axis' own mask keeps, and whose place in it that of the other axis."""
    kept = {axis: kept_entries(FAMILY.orders[axis], size) for axis, size in selection.sizes.items()}
    return [
        number
        for number, row in enumerate(row_labels(dimension))
        if (row.axis is None or row.entry in kept[row.axis])
        and (row.width_axis is None or row.place in kept[row.width_axis])
    ]


@pytest.mark.parametrize("name", sorted({name.split(".", 3)[-1]: name for name in PARAMETERS}.values()))
@settings(max_examples=10)
@given(selection=selections())
def test_segments_are_where_the_masks_are_one(name: str, selection: Selection) -> None:
    for dimension in PARAMETERS[name]:
        expected = masked_rows(dimension, selection)
        assert indices(dimension.segments(selection.sizes, SHAPE.full)) == expected
        assert dimension.kept_size(selection.sizes, SHAPE.full) == len(expected)
        for world in (2, 4):
            local = indices(dimension.segments(selection.sizes, SHAPE.full, world))
            shards = [[rank_rows(dimension, rank, world)[row] for row in local] for rank in range(world)]
            joined = sorted({row for shard in shards for row in shard})
            assert joined == expected, f"{name} over {world} ranks"


def test_segments_do_not_touch_and_ascend() -> None:
    selection = narrow(hidden=8, ffn=16, mamba_heads=8, mamba_head_dim=1, attention_heads=4).sizes
    for dimensions in PARAMETERS.values():
        for dimension in dimensions:
            segments = dimension.segments(selection, SHAPE.full)
            assert all(start < stop for start, stop in segments)
            assert all(a[1] < b[0] for a, b in pairwise(segments))


def test_segments_of_the_full_selection_are_everything() -> None:
    for dimensions in PARAMETERS.values():
        for dimension in dimensions:
            assert dimension.segments(SHAPE.full, SHAPE.full) == ((0, dimension.size),)


def random_orders(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        axis: FAMILY.orders[axis].permutation(torch.rand(FAMILY.orders[axis].size, generator=generator))
        for axis in FAMILY.orders
    }


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_a_dimension_moves_every_row_with_its_entry(seed: int) -> None:
    orders = random_orders(seed)
    for name, dimensions in PARAMETERS.items():
        for dimension in dimensions:
            permutation = dimension.permutation(orders)
            elastic = any(item.axes for part in dimension.parts for item in part.items)
            assert (permutation is not None) == elastic
            if permutation is None:
                continue
            assert sorted(permutation.tolist()) == list(range(dimension.size))
            before = row_labels(dimension)
            for number, row in enumerate(before):
                entry = row.entry if row.axis is None else int(orders[row.axis][row.entry])
                place = row.place if row.width_axis is None else int(orders[row.width_axis][row.place])
                old = before[int(permutation[number])]
                assert old == replace(row, entry=entry, place=place), f"{name} row {number}"


def mixer(name: str) -> tuple[Dimension, ...]:
    return PARAMETERS[f"decoder.layers.0.mixer.{name}"]


def test_rows_of_one_head_stay_together_in_the_order_of_the_channels() -> None:
    heads, channels = random_orders(3)["mamba_heads"], torch.tensor([1, 0])
    (inner,) = mixer("norm.weight")
    for orders, place in (
        ({"mamba_heads": heads}, torch.arange(2)),
        ({"mamba_heads": heads, "mamba_head_dim": channels}, channels),
    ):
        permutation = inner.permutation(orders)
        assert permutation is not None
        assert torch.equal(permutation.view(12, 2), heads[:, None] * 2 + place)


def test_a_channel_is_kept_in_every_head() -> None:
    (inner,) = mixer("norm.weight")
    one_channel = narrow(mamba_head_dim=1, mamba_heads=8).sizes
    # Four groups of three heads of two channels, of which two heads and one channel are left.
    assert indices(inner.segments(one_channel, SHAPE.full)) == [6 * g + 2 * h for g in range(4) for h in range(2)]


def test_mamba_parameters_move_alike() -> None:
    """z, x, dt, the convolution, A_log, the gated norm and out_proj all follow the heads' order; B and C stay."""
    orders = {"mamba_heads": random_orders(5)["mamba_heads"]}
    assert not torch.equal(orders["mamba_heads"], torch.arange(SHAPE.mamba_heads))
    zxbcdt = mixer("in_proj.weight")[0]
    inner, heads = mixer("norm.weight")[0].permutation(orders), mixer("A_log")[0].permutation(orders)
    packed, conv = zxbcdt.permutation(orders), mixer("conv1d_bias")[0].permutation(orders)
    assert inner is not None
    assert heads is not None
    assert packed is not None
    assert conv is not None
    assert torch.equal(heads, orders["mamba_heads"])
    sizes = zxbcdt.part_sizes()
    offsets = [sum(sizes[:part]) for part in range(len(sizes))]
    z, x, b, c, dt = (part - offset for part, offset in zip(packed.split(sizes), offsets, strict=True))
    assert torch.equal(z, inner)
    assert torch.equal(x, inner)
    assert torch.equal(dt, heads)
    for fixed in (b, c):
        assert torch.equal(fixed, torch.arange(len(fixed)))
    assert torch.equal(conv, packed[sizes[0] : sum(sizes[:4])] - sizes[0])
    assert mixer("A_log") == mixer("D") == mixer("dt_bias")
    assert mixer("conv1d_weight")[0] == mixer("conv1d_bias")[0]
    assert mixer("out_proj.weight") == (FAMILY.layout.hidden, *mixer("norm.weight"))


def test_packed_qkv_moves_queries_inside_their_group() -> None:
    order = torch.tensor([1, 0, 2, 3, 5, 4, 6, 7])
    qkv = PARAMETERS["decoder.layers.2.self_attention.linear_qkv.weight"][0]
    permutation = qkv.permutation({"attention_heads": order})
    assert permutation is not None
    group = permutation.view(4, 12)  # two query heads, a key and a value head of three channels
    assert group[0].tolist() == [3, 4, 5, 0, 1, 2, *range(6, 12)]
    assert group[1].tolist() == list(range(12, 24))


def test_sorting_one_axis_leaves_the_others() -> None:
    assert PARAMETERS["decoder.layers.1.mlp.linear_fc1.weight"][0].permutation({"hidden": torch.arange(12)}) is None
    plain = Dimension((Part(1, (Item(None, 5),)),))
    assert plain.permutation(random_orders(1)) is None
    assert plain.segments(narrow(hidden=6, ffn=8, mamba_heads=4, attention_heads=4).sizes, SHAPE.full) == ((0, 5),)
