"""What a selection costs.

One formula, ints or tensors in: ints give the exact count, expected sizes the differentiable one.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from megatron_elastic.axes import AXES, layer_kinds
from megatron_elastic.budget import Selection
from megatron_elastic.layout import ModelShape


def _mamba[Size: (int, Tensor)](shape: ModelShape, hidden: Size, heads: Size) -> Size:
    inner = heads * shape.mamba_head_dim
    states = 2 * shape.mamba_groups * shape.mamba_state
    in_proj = hidden * (2 * inner + states + heads)
    conv = (inner + states) * (shape.conv_kernel + 1)
    return hidden + in_proj + conv + 3 * heads + inner + inner * hidden


def _attention[Size: (int, Tensor)](shape: ModelShape, hidden: Size, heads: Size) -> Size:
    query = heads * shape.head_dim
    return hidden + hidden * (query + 2 * shape.query_groups * shape.head_dim) + query * hidden


def _mlp[Size: (int, Tensor)](hidden: Size, ffn: Size) -> Size:
    return hidden + 2 * hidden * ffn


def parameters[Size: (int, Tensor)](shape: ModelShape, sizes: Mapping[str, Size]) -> Size:
    """Parameters of the submodel with the given size on each axis.

    Args:
        shape: the parent.
        sizes: axis -> kept entries; ints for the exact count, 0-dim tensors (expected sizes) for the differentiable
            one.
    """
    hidden = sizes["hidden"]
    kinds = layer_kinds(shape.pattern)
    total = 2 * shape.vocab * hidden + hidden
    if "M" in kinds:
        total = total + kinds.count("M") * _mamba(shape, hidden, sizes["mamba_heads"])
    if "*" in kinds:
        total = total + kinds.count("*") * _attention(shape, hidden, sizes["attention_heads"])
    if "-" in kinds:
        total = total + kinds.count("-") * _mlp(hidden, sizes["ffn"])
    return total


def forward_flops_per_token(shape: ModelShape, sizes: Mapping[str, int], sequence_length: int) -> int:
    """Floating point operations of one forward pass for one token: GEMMs, LM head, causal attention and SSD.

    Args:
        shape: the parent.
        sizes: axis -> kept entries.
        sequence_length: tokens; attention over it costs half, being causal.
    """
    kinds = layer_kinds(shape.pattern)
    hidden, inner = sizes["hidden"], sizes["mamba_heads"] * shape.mamba_head_dim
    query = sizes["attention_heads"] * shape.head_dim
    states = shape.mamba_groups * shape.mamba_state
    mamba = hidden * (2 * inner + 2 * states + sizes["mamba_heads"]) + inner * hidden
    mamba += (inner + 2 * states) * shape.conv_kernel + 3 * inner * shape.mamba_state
    attention = hidden * (query + 2 * shape.query_groups * shape.head_dim) + query * hidden + query * sequence_length
    mlp = 2 * hidden * sizes["ffn"]
    layers = kinds.count("M") * mamba + kinds.count("*") * attention + kinds.count("-") * mlp
    return 2 * (layers + shape.vocab * hidden)


def selections(choices: Mapping[str, Sequence[int]]) -> Iterator[Selection]:
    """Every selection that the choices allow, largest first along each axis."""
    for kept in itertools.product(*(choices[axis] for axis in AXES)):
        yield Selection(*kept)


def nearest(shape: ModelShape, choices: Mapping[str, Sequence[int]], fraction: float) -> tuple[Selection, float]:
    """The selection whose parameters come nearest to a fraction of the parent's, and the fraction it has."""
    parent = parameters(shape, shape.full)
    best = min(selections(choices), key=lambda s: abs(parameters(shape, s.as_dict()) / parent - fraction))
    return best, parameters(shape, best.as_dict()) / parent
