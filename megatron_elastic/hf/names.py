"""How the tensors of Hugging Face's `nemotron_h` and Megatron's parameters are made of each other.

Every Hugging Face tensor is a view of one parameter under its stock name: the whole of it, the rows of queries, keys or
values (which Megatron keeps together, KV group by KV group), or one expert. Reading fills the views, writing copies
them, and so the one is the other's inverse.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_elastic.axes import Dimension
from megatron_elastic.layout import Layout, ModelShape

RELEASED, MODULES = "backbone", "model"
"""First word of the names: in released checkpoints, which every engine reads, and in transformers' own modules."""

_NORM = {
    "norm.weight": "norm.weight",
    "input_layernorm.weight": "norm.weight",
    "pre_mlp_layernorm.weight": "norm.weight",
}
_WHOLE = {
    **{name: name for name in ("mixer.in_proj.weight", "mixer.dt_bias", "mixer.A_log", "mixer.D", "mixer.norm.weight")},
    "mixer.out_proj.weight": "mixer.out_proj.weight",
    "mixer.conv1d_weight": "mixer.conv1d.weight",
    "mixer.conv1d_bias": "mixer.conv1d.bias",
    "self_attention.linear_proj.weight": "mixer.o_proj.weight",
    "mlp.linear_fc1.weight": "mixer.up_proj.weight",
    "mlp.linear_fc2.weight": "mixer.down_proj.weight",
    "mlp.router.weight": "mixer.gate.weight",
    "mlp.router.expert_bias": "mixer.gate.e_score_correction_bias",
    "mlp.shared_experts.linear_fc1.weight": "mixer.shared_experts.up_proj.weight",
    "mlp.shared_experts.linear_fc2.weight": "mixer.shared_experts.down_proj.weight",
    **_NORM,
}
"""Stock name -> Hugging Face's, without the layer's prefix."""
_QKV = "self_attention.linear_qkv.weight"
_EXPERTS = {
    "mlp.experts.experts.linear_fc1.weight": "mixer.experts.{}.up_proj.weight",
    "mlp.experts.experts.linear_fc2.weight": "mixer.experts.{}.down_proj.weight",
}
_OUTSIDE = {
    "embedding.word_embeddings.weight": "{}.embeddings.weight",
    "decoder.final_norm.weight": "{}.norm_f.weight",
    "output_layer.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class Piece:
    """One Hugging Face tensor.

    Attributes:
        name, shape: its own.
        rows: `(start, stop)` of it inside every KV group of the parameter; None where it is no part of one.
        expert: which entry of the parameter's first dimension it is; None where it is no expert.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    expert: int | None = None

    def of(self, parameter: Tensor, groups: int) -> Tensor:
        """The view of the parameter that it is: its numbers, in its order."""
        if self.expert is not None:
            return parameter[self.expert]
        if self.rows is not None:
            grouped = parameter.view(groups, -1, *parameter.shape[1:])
            return grouped[:, self.rows[0] : self.rows[1]]
        return parameter


@dataclass(frozen=True)
class Parameter:
    """A parameter under its stock name, and the Hugging Face tensors that it is made of.

    Attributes:
        stock: Megatron's name.
        dimensions: of the parameter.
        pieces: in their order; they cover it.
        groups: KV groups of a QKV weight; 1 for another one.
        merged: the one tensor that transformers' own modules hold all experts in; empty for another parameter.
    """

    stock: str
    dimensions: tuple[Dimension, ...]
    pieces: tuple[Piece, ...]
    groups: int = 1
    merged: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return tuple(dimension.size for dimension in self.dimensions)

    def piece(self, parameter: Tensor, number: int) -> Tensor:
        """One Hugging Face tensor of the parameter, contiguous."""
        piece = self.pieces[number]
        return piece.of(parameter, self.groups).reshape(piece.shape).contiguous()

    def fill(self, parameter: Tensor, number: int, tensor: Tensor) -> None:
        """Puts one Hugging Face tensor where it belongs."""
        view = self.pieces[number].of(parameter, self.groups)
        view.copy_(tensor.view(view.shape))

    def kept_rows(self, number: int, kept: Tensor) -> Tensor:
        """Which rows (first dimension) of a piece are left where some of the parameter's rows are.

        Args:
            number: of the piece, which is no expert.
            kept: entries of the parameter's first dimension, ascending.
        """
        size = self.shape[0]
        wanted = torch.zeros(size, dtype=torch.bool)
        wanted[kept] = True
        return self.pieces[number].of(wanted, self.groups).reshape(-1).nonzero().flatten()


def _layer_layout(shape: ModelShape, number: int, blocks: tuple[int, int]) -> dict[str, tuple[Dimension, ...]]:
    """Dimensions of one layer's parameters, also where layers differ; names without the layer's prefix."""
    kind = shape.pattern[number]
    own: dict[str, Any] = {axis: size for axis, size in shape.layer(number).items() if axis != "hidden"}
    return Layout(replace(shape, pattern=kind, **own), *blocks).of_kind(kind)


def _pieces(stock: str, shape: tuple[int, ...], prefix: str, groups: int, head_dim: int) -> tuple[Piece, ...]:
    if stock == _QKV:
        queries = shape[0] // groups - 2 * head_dim
        ends = {
            "q": (0, queries),
            "k": (queries, queries + head_dim),
            "v": (queries + head_dim, queries + 2 * head_dim),
        }
        return tuple(
            Piece(f"{prefix}mixer.{letter}_proj.weight", (groups * (stop - start), *shape[1:]), rows=(start, stop))
            for letter, (start, stop) in ends.items()
        )
    if stock in _EXPERTS:
        return tuple(Piece(prefix + _EXPERTS[stock].format(e), shape[1:], expert=e) for e in range(shape[0]))
    return (Piece(prefix + _WHOLE[stock], shape),)


def parameters(
    shape: ModelShape, first: str = RELEASED, *, ffn_blocks: int = 1, expert_blocks: int = 1
) -> Iterator[Parameter]:
    """Every parameter of a model, in the order of its layers.

    Args:
        shape: of the model; its layers may differ.
        first: first word of the Hugging Face names.
        ffn_blocks, expert_blocks: of a model in block order (`ModelShape.orders`).
    """
    outside = {
        stock: Parameter(stock, dimensions, (Piece(_OUTSIDE[stock].format(first), tuple(d.size for d in dimensions)),))
        for stock, dimensions in Layout(replace(shape, pattern=""), 1).outside_layers().items()
    }
    yield outside.pop("embedding.word_embeddings.weight")
    for number in range(len(shape.pattern)):
        prefix = f"{first}.layers.{number}."
        for stock, dimensions in _layer_layout(shape, number, (ffn_blocks, expert_blocks)).items():
            size = tuple(dimension.size for dimension in dimensions)
            groups = shape.query_groups if stock == _QKV else 1
            merged = prefix + _EXPERTS[stock].replace("{}.", "").removesuffix(".weight") if stock in _EXPERTS else ""
            pieces = _pieces(stock, size, prefix, groups, shape.head_dim)
            yield Parameter(f"decoder.layers.{number}.{stock}", dimensions, pieces, groups, merged)
    yield from outside.values()
