"""Which sizes FP8 products take: every width of a linear layer on one rank, at every choice, and the nearest that fit.

Transformer Engine asserts multiples of 16 of the dimension that a product sums over and of 8 of the other one. Every
width is summed over in one of a layer's three products (inputs forward, outputs in the gradient of the input, tokens in
the gradient of the weight), and Hopper has these products in one layout only, so all are multiples of 16. Blockwise
scaling asks for no more: its last block may be smaller.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import lcm
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
    yield "channels", sizes["hidden"]


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
    beside: list[Sizes] = [{**full, "mamba_heads": heads} for heads in choices["mamba_heads"]]
    return [sizes for sizes in beside if not _wrong(axis, shape, sizes, ranks, tile)]


def _wrong(axis: str, shape: ModelShape, sizes: Sizes, ranks: Ranks, tile: int) -> list[tuple[str, int]]:
    return [(name, width) for name, width in _WIDTHS[axis](shape, sizes, ranks) if width % tile]


def _smaller(axis: str, ranks: Ranks) -> Iterator[tuple[str, Ranks]]:
    """The layouts with fewer ranks for an axis, largest first."""
    if axis != "hidden":
        name, size = ("expert TP", ranks.etp) if axis == "expert_ffn" else ("TP", ranks.tp)
        for fewer in (each for each in range(size - 1, 0, -1) if size % each == 0):
            yield f"{name} {fewer}", ranks._replace(**{"etp" if axis == "expert_ffn" else "tp": fewer})


def tile_faults(
    shape: ModelShape,
    orders: Mapping[str, BlockOrder],
    choices: Mapping[str, Sequence[int]],
    ranks: Ranks,
    tile: int,
) -> Iterator[tuple[str, str]]:
    """Every axis with choices whose widths on a rank are no multiples of the tile, and which, and what would fit.

    Args:
        shape: the parent.
        orders: of its axes, for the sizes that there are.
        choices: of every axis.
        ranks: the layout.
        tile: what a width must be a multiple of.
    """
    for axis in (axis for axis in shape.axes if axis in _WIDTHS):
        beside = _beside(axis, shape, choices, ranks, tile)

        def wrong(size: int, on: Ranks, axis: str = axis, beside: Sequence[Sizes] = beside) -> list[tuple[str, int]]:
            found = (_wrong(axis, shape, {**sizes, axis: size}, on, tile) for sizes in beside)
            return list(dict.fromkeys(each for one in found for each in one))

        bad = {size: found for size in choices[axis] if (found := wrong(size, ranks))}
        if not bad:
            continue
        widths: dict[str, list[str]] = {}
        for size, found in bad.items():
            for name, width in found:
                widths.setdefault(name, []).append(f"{width} at {size}")
        said = "; ".join(f"{name} {', '.join(each)}" for name, each in widths.items())
        near = _nearest([size for size in _sizes(orders[axis]) if not wrong(size, ranks)], bad)
        remedies = [f"the nearest that fit are {near}"] if near else []
        remedies += [
            f"with {name} all fit" for name, on in _smaller(axis, ranks) if not any(wrong(s, on) for s in choices[axis])
        ][:1]
        what = "; ".join(remedies) or "no size fits, on no fewer ranks either"
        yield axis, f"{said} on a rank, no multiples of {tile}: {what}"


def _sizes(order: BlockOrder) -> range:
    """The sizes that an axis can have, ascending."""
    return range(order.blocks, order.size + 1, order.blocks)


def _nearest(fitting: Sequence[int], bad: Iterable[int]) -> list[int]:
    """The next smaller and the next larger size that fits for each that does not, largest first."""
    near = set[int]()
    for size in bad:
        near.update([each for each in fitting if each < size][-1:])
        near.update([each for each in fitting if each > size][:1])
    return sorted(near, reverse=True)


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
        multiple = lcm(tile, LOCAL_TOKENS * ranks.tp) if split else tile
        if tokens % multiple:
            below = tokens - tokens % multiple
            near = [each for each in (below, below + multiple) if each]
            yield (
                f"{name}: micro_batch_size {samples} x sequence_length {length} are {tokens} tokens on a rank, and FP8 "
                f"takes multiples of {multiple}: the nearest are {near}"
            )


def tile_of(flags: Mapping[str, Any]) -> int | None:
    """What the FP8 of a recipe's Megatron flags asks widths to be multiples of; None without FP8."""
    return TILES.get(str(flags.get("fp8-recipe"))) if flags.get("fp8-format") else None
