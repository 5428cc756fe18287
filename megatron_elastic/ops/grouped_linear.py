"""One product for many experts: every group of rows has a weight of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 8
"""Entries of bfloat16 that rows of the grouped kernel's operands are a multiple of (16 bytes)."""


def grouped_linear(x: Tensor, weights: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows of `x`, group after group, times their group's weight.

    Args:
        x: `[rows, inputs]`, sorted by group.
        weights: `[groups, outputs, inputs]`.
        counts: rows of each group; their sum is all rows.

    Returns:
        `[rows, outputs]`.
    """
    aligned = not any(size % _ALIGNMENT for size in weights.shape[1:])
    if x.is_cuda and x.dtype is torch.bfloat16 and aligned and len(x):
        return grouped_product(x, weights, counts)
    return grouped_linear_ref(x, weights, counts)


def grouped_product(x: Tensor, weights: Tensor, counts: Sequence[int]) -> Tensor:
    """`grouped_linear` by torch's grouped kernel."""
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(x.device, non_blocking=True)
    return torch.nn.functional.grouped_mm(x, weights.transpose(-2, -1), offs=ends)


def grouped_linear_ref(x: Tensor, weights: Tensor, counts: Sequence[int]) -> Tensor:
    """`grouped_linear`, one group after the other."""
    groups = zip(torch.split(x, list(counts)), weights, strict=True)
    return torch.cat([torch.nn.functional.linear(rows, weight) for rows, weight in groups])
