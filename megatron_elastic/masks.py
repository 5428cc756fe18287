"""Masks of a soft selection: the probability-weighted mix of the choices' block-prefix masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_elastic.axes import AXES, BlockOrder
from megatron_elastic.budget import Selection


@dataclass(frozen=True)
class Masks:
    """Mask of each axis on this tensor-parallel rank, values in [0, 1].

    Attributes:
        hidden: `[h]`, the residual stream.
        ffn: `[ffn / TP]`.
        mamba_heads: `[heads / TP]`.
        attention_heads: `[query heads / TP]`.
    """

    hidden: Tensor
    ffn: Tensor
    mamba_heads: Tensor
    attention_heads: Tensor


class MaskTables(torch.nn.Module):
    """The 0/1 mask of every choice, built once for one rank; mixes them by probability."""

    def __init__(self, orders: Mapping[str, BlockOrder], choices: Mapping[str, Sequence[int]], tp_size: int) -> None:
        super().__init__()
        for axis in AXES:
            world = 1 if axis == "hidden" else tp_size
            self.register_buffer(axis, orders[axis].mask_table(choices[axis], world), persistent=False)

    def forward(self, probabilities: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Mixes the tables: `probabilities[axis] [choices]` -> masks in the order of `AXES`."""
        tables = dict(self.named_buffers())
        return tuple(probabilities[axis].to(tables[axis].dtype) @ tables[axis] for axis in AXES)


def one_hot(
    selection: Selection, choices: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The probabilities that are certain of one selection (a hard mask): axis -> `[choices]`."""
    kept = selection.as_dict()
    return {
        axis: torch.tensor([float(choice == kept[axis]) for choice in choices[axis]], dtype=dtype) for axis in AXES
    }
