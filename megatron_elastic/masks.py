"""Masks of a soft selection: the probability-weighted mix of the choices' block-prefix masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_elastic.axes import index_in_kind
from megatron_elastic.budget import Selection
from megatron_elastic.family import Family
from megatron_elastic.layout import Layout


@dataclass(frozen=True)
class Masks:
    """Masks of one layer on this rank, values in [0, 1].

    Attributes:
        hidden: `[h]`, the residual stream.
        residual: `[h]`, of what the layer adds to the residual stream: the hidden mask times the layer's own weight
            where depth is elastic.
        axes: axis of the layer -> `[entries on this rank]`; of `experts` all of them, `[E]`, on every rank.
    """

    hidden: Tensor
    residual: Tensor
    axes: Mapping[str, Tensor]


def effective_width(mask: Tensor) -> Tensor:
    """What a norm over masked channels divides by: the sum of `mask` `[h]`, 0-dim, in at least fp32.

    In bf16 a sum over thousands of channels would be rounded to a multiple of 16 or 32.
    """
    return mask.sum(dtype=torch.promote_types(mask.dtype, torch.float32))


class MaskTables(torch.nn.Module):
    """The 0/1 mask of every choice, built once for one rank; mixes them by probability.

    Args:
        family: axes, choices and blocks.
        tp_size: tensor-parallel size.
        etp_size: expert tensor-parallel size; None for `tp_size`.
    """

    def __init__(self, family: Family, tp_size: int, etp_size: int | None = None) -> None:
        super().__init__()
        self.family = family
        # Every rank routes tokens to all experts, so their mask is not split over expert-parallel ranks.
        worlds = {"": 1, "ep": 1, "tp": tp_size, "etp": tp_size if etp_size is None else etp_size}
        for axis in family.axes:
            choices = family.choices[axis]
            if axis == "depth":
                layers = len(family.shape.pattern)
                table = torch.ones(len(choices), layers)
                for row, kept in enumerate(choices):
                    table[row, list(family.skipped(kept))] = 0.0
            else:
                table = family.orders[axis].mask_table(choices, worlds[Layout.sharded[axis]])
            self.register_buffer(axis, table, persistent=False)

    def forward(self, probabilities: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Mixes the tables.

        Args:
            probabilities: axis -> `[uses, choices]`: one use, or on a heterogeneous axis one a layer.

        Returns:
            `[uses, entries]` for every axis of the family, in its order (`depth`: `[1, layers]`).
        """
        tables = dict(self.named_buffers())
        return tuple(probabilities[axis].to(tables[axis].dtype) @ tables[axis] for axis in self.family.axes)

    def of_layer(self, mixed: Sequence[Tensor], number: int) -> Masks:
        """The masks of the layer `number` (global, from 0), from what `forward` returned."""
        family = self.family
        pattern = family.shape.pattern
        by_axis = dict(zip(family.axes, mixed, strict=True))
        hidden = by_axis.pop("hidden")[0]
        depth = by_axis.pop("depth")[0]
        own = {
            axis: mask[index_in_kind(pattern, number) if len(mask) > 1 else 0]
            for axis, mask in by_axis.items()
            if number in family.layers_with(axis)
        }
        # With one choice of depth there is nothing to learn, and no product to pay for.
        residual = hidden * depth[number] if len(family.choices["depth"]) > 1 else hidden
        return Masks(hidden, residual, own)


def one_hot(selection: Selection, family: Family, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The probabilities that are certain of one selection (a hard mask): axis -> `[uses, choices]`."""
    sizes = {**selection.sizes, "depth": len(family.shape.pattern) - len(selection.skipped)}
    found = {}
    for axis in family.axes:
        size, choices = sizes[axis], family.choices[axis]
        kept = size if isinstance(size, tuple) else (size,) * family.uses(axis)
        found[axis] = torch.tensor([[float(choice == k) for choice in choices] for k in kept], dtype=dtype)
    return found
