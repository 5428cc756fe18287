"""What a selection costs.

One formula, ints or tensors in: ints give the exact count, expected sizes the differentiable one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_elastic.axes import layer_kinds
from megatron_elastic.layout import ModelShape, sizes_of_layer

if TYPE_CHECKING:
    from torch import Tensor


def _mamba[Size: (int, Tensor)](shape: ModelShape, hidden: Size, heads: Size, head_dim: Size) -> Size:
    inner = heads * head_dim
    states = 2 * shape.mamba_groups * shape.mamba_state
    in_proj = hidden * (2 * inner + states + heads)
    conv = (inner + states) * (shape.conv_kernel + 1)
    return hidden + in_proj + conv + 3 * heads + inner + inner * hidden


def _attention[Size: (int, Tensor)](shape: ModelShape, hidden: Size, heads: Size) -> Size:
    query = heads * shape.head_dim
    return hidden + hidden * (query + 2 * shape.query_groups * shape.head_dim) + query * hidden


def _mlp[Size: (int, Tensor)](shape: ModelShape, hidden: Size, ffn: Size) -> Size:
    return (3 if shape.gated else 2) * hidden * ffn


def _layer(shape: ModelShape, number: int, sizes: Mapping[str, Any], *, active: bool) -> Any:
    hidden = sizes["hidden"]
    kind = shape.pattern[number]
    if kind == "M":
        return _mamba(shape, hidden, sizes["mamba_heads"], sizes["mamba_head_dim"])
    if kind == "*":
        return _attention(shape, hidden, sizes["attention_heads"])
    if kind == "-":
        return hidden + _mlp(shape, hidden, sizes["ffn"])
    experts = sizes["experts"]
    routed = shape.top_k if active else experts
    shared = _mlp(shape, hidden, sizes["shared_expert_ffn"]) if shape.shared_expert_ffn else 0
    return hidden + experts * hidden + routed * _mlp(shape, hidden, sizes["expert_ffn"]) + shared


def parameters(
    shape: ModelShape, sizes: Mapping[str, Any], gates: Sequence[Any] | None = None, *, active: bool = False
) -> Any:
    """Parameters of the submodel with the given size on each axis.

    Args:
        shape: the parent.
        sizes: axis -> kept entries, or one number a layer on an axis whose layers differ; ints for the exact count,
            0-dim tensors (expected sizes) for the differentiable one.
        gates: for each layer the share of it that is kept, 1 or 0 where it is decided; None keeps all.
        active: count only the experts that one token goes to.
    """
    hidden = sizes["hidden"]
    total = 2 * shape.vocab * hidden + hidden
    for number in range(len(layer_kinds(shape.pattern))):
        layer = _layer(shape, number, sizes_of_layer(sizes, shape.pattern, number), active=active)
        total = total + (layer if gates is None else gates[number] * layer)
    return total


def forward_flops_per_token(
    shape: ModelShape, sizes: Mapping[str, Any], sequence_length: int, gates: Sequence[Any] | None = None
) -> Any:
    """Floating point operations of one forward pass for one token: GEMMs, LM head, causal attention and SSD.

    Args:
        shape: the parent.
        sizes: axis -> kept entries, or one number a layer.
        sequence_length: tokens; attention over it costs half, being causal.
        gates: for each layer the share of it that is kept; None keeps all.
    """
    total = shape.vocab * sizes["hidden"]
    for number, kind in enumerate(shape.pattern):
        own = sizes_of_layer(sizes, shape.pattern, number)
        hidden = own["hidden"]
        if kind == "M":
            inner, states = own["mamba_heads"] * own["mamba_head_dim"], shape.mamba_groups * shape.mamba_state
            layer = hidden * (2 * inner + 2 * states + own["mamba_heads"]) + inner * hidden
            layer = layer + (inner + 2 * states) * shape.conv_kernel + 3 * inner * shape.mamba_state
        elif kind == "*":
            query = own["attention_heads"] * shape.head_dim
            layer = hidden * (2 * query + 2 * shape.query_groups * shape.head_dim) + query * sequence_length
        elif kind == "-":
            layer = _mlp(shape, hidden, own["ffn"])
        else:
            layer = own["experts"] * hidden + shape.top_k * _mlp(shape, hidden, own["expert_ffn"])
            layer = layer + (_mlp(shape, hidden, own["shared_expert_ffn"]) if shape.shared_expert_ffn else 0)
        total = total + (layer if gates is None else gates[number] * layer)
    return 2 * total
