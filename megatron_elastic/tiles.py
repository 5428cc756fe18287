"""Which sizes FP8 products take: every width of a linear layer on one rank, at every choice, and the nearest that fit.

Transformer Engine asserts multiples of 16 of the dimension that a product sums over and of 8 of the other one. Every
width is summed over in one of a layer's three products (inputs forward, outputs in the gradient of the input, tokens in
the gradient of the weight), and Hopper has these products in one layout only, so all are multiples of 16. Blockwise
scaling asks for no more: its last block may be smaller.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from megatron_elastic.axes import BlockOrder
from megatron_elastic.curriculum import Stage
from megatron_elastic.layout import ModelShape
from megatron_elastic.parallel import Ranks

TILES = {"tensorwise": 16, "blockwise": 16, "mxfp8": 32}
"""What the widths of a product must be multiples of, by Megatron's `fp8-recipe`."""
BLOCKS = 128
"""Entries on a side of a block in blockwise scaling."""
LOCAL_TOKENS = 8
"""What the tokens that a rank has of a split sequence must be a multiple of, before they are gathered."""

Sizes = Mapping[str, int]
_Widths = Callable[[ModelShape, Sizes, Ranks], Iterator[tuple[str, int]]]


def _hidden(shape: ModelShape, sizes: Sizes, ranks: Ranks) -> Iterator[tuple[str, int]]:
    yield "width", sizes["hidden"]


def _neurons(axis: str) -> _Widths:
    def widths(shape: ModelShape, sizes: Sizes, ranks: Ranks) -> Iterator[tuple[str, int]]:
        yield "neurons", sizes[axis] // (ranks.etp if axis == "expert_ffn" else ranks.tp)

    return widths


def _attention(shape: ModelShape, sizes: Sizes, ranks: Ranks) -> Iterator[tuple[str, int]]:
    heads = sizes["attention_heads"]
    yield "queries, keys and values", (heads + 2 * shape.query_groups) * shape.head_dim // ranks.tp
    yield "heads' outputs", heads * shape.head_dim // ranks.tp


def _mamba(shape: ModelShape, sizes: Sizes, ranks: Ranks) -> Iterator[tuple[str, int]]:
    heads, states = sizes["mamba_heads"], 2 * shape.mamba_groups * shape.mamba_state
    inner = heads * sizes["mamba_head_dim"]
    yield "rows of in_proj (z, x, B, C, dt)", (2 * inner + states + heads) // ranks.tp
    yield "heads' outputs", inner // ranks.tp


_WIDTHS: Mapping[str, _Widths] = {
    "hidden": _hidden,
    **{axis: _neurons(axis) for axis in ("ffn", "expert_ffn", "shared_expert_ffn")},
    "mamba_heads": _mamba,
    "mamba_head_dim": _mamba,
    "attention_heads": _attention,
}
"""Axis -> the widths on a rank that it decides. How many experts there are is no width of a product."""


def _beside(axis: str, shape: ModelShape, choices: Mapping[str, Sequence[int]], ranks: Ranks, tile: int) -> list[Sizes]:
    """The sizes of the other axes that a choice of this one is judged beside.

    Channels of heads stand beside every number of heads that fits with all channels: the others are at fault already.
    """
    full = dict(shape.full)
    if axis != "mamba_head_dim":
        return [full]
    fitting = [h for h in choices["mamba_heads"] if not _wrong(axis, shape, {**full, "mamba_heads": h}, ranks, tile)]
    return [{**full, "mamba_heads": heads} for heads in fitting]


def _wrong(axis: str, shape: ModelShape, sizes: Sizes, ranks: Ranks, tile: int) -> list[str]:
    return [f"{width} {name}" for name, width in _WIDTHS[axis](shape, sizes, ranks) if width % tile]


def _nearest(fits: Callable[[int], bool], size: int, candidates: Iterable[int]) -> list[int]:
    """The next smaller and the next larger size that fits."""
    fitting = [candidate for candidate in candidates if fits(candidate)]
    return [*[c for c in fitting if c < size][-1:], *[c for c in fitting if c > size][:1]]


def tile_faults(
    shape: ModelShape,
    orders: Mapping[str, BlockOrder],
    choices: Mapping[str, Sequence[int]],
    ranks: Ranks,
    tile: int,
) -> Iterator[str]:
    """One sentence for every axis with choices whose widths on a rank are no multiples of the tile.

    Args:
        shape: the parent.
        orders: of its axes, for the sizes that there are.
        choices: of every axis.
        ranks: the layout.
        tile: what a width must be a multiple of.
    """
    for axis in (axis for axis in shape.axes if axis in _WIDTHS):
        beside, order = _beside(axis, shape, choices, ranks, tile), orders[axis]

        def wrong(size: int, axis: str = axis, beside: Sequence[Sizes] = beside) -> list[str]:
            found = (_wrong(axis, shape, {**other, axis: size}, ranks, tile) for other in beside)
            return list(dict.fromkeys(each for one in found for each in one))

        bad = [size for size in choices[axis] if wrong(size)]
        if not bad:
            continue
        sizes = range(order.blocks, order.size + 1, order.blocks)
        near = sorted({found for size in bad for found in _nearest(lambda s: not wrong(s), size, sizes)}, reverse=True)
        said = "; ".join(f"{size} gives {', '.join(wrong(size))}" for size in bad)
        remedy = f"the nearest that fit are {near}" if near else "no size fits this layout: use another TP"
        yield f"{axis}: FP8 takes multiples of {tile} on a rank, and {said}: {remedy}"


def token_faults(stages: Mapping[str, Stage], ranks: Ranks, *, split: bool, tile: int) -> Iterator[str]:
    """One sentence for every stage whose microbatches have a number of tokens on a rank that products do not take.

    Args:
        stages: by name.
        ranks: the layout.
        split: sequence parallelism splits the tokens over tensor-parallel ranks, which gather them for a product.
        tile: what the gathered tokens must be a multiple of.
    """
    for name, stage in stages.items():
        samples, length = stage.micro_batch_size, stage.sequence_length
        tokens = samples * length // ranks.cp
        multiple = max(tile, LOCAL_TOKENS * ranks.tp) if split else tile
        if tokens % multiple:
            below = tokens - tokens % multiple
            near = [each for each in (below, below + multiple) if each]
            yield (
                f"{name}: micro_batch_size {samples} x sequence_length {length} are {tokens} tokens on a rank, and FP8 "
                f"takes multiples of {multiple}: the nearest are {near}"
            )


def all_tile_faults(
    shape: ModelShape,
    orders: Mapping[str, BlockOrder],
    choices: Mapping[str, Sequence[int]],
    ranks: Ranks,
    flags: Mapping[str, Any],
) -> Iterator[str]:
    """`tile_faults` of the FP8 that the flags ask for; none without FP8."""
    tile = TILES.get(str(flags.get("fp8-recipe"))) if flags.get("fp8-format") else None
    if tile is not None:
        yield from tile_faults(shape, orders, choices, ranks, tile)
