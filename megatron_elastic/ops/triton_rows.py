"""What the Triton kernels on rows of channels share: where the rows lie, and how they are dealt to programs."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

PROGRAMS = 256
"""Programs of a backward: each sums its rows' part of a gradient that all rows share. It is no number of the
device's, so that the sums are the same on every GPU."""
_CHANNELS_PER_WARP = 256


class Rows(NamedTuple):
    """A tensor `[outer, inner, d]` whose channels lie next to each other.

    Attributes:
        values: the tensor.
        number: of rows, `outer * inner`.
        inner: rows of the middle dimension.
        outer_stride: between neighbours of the first dimension.
        inner_stride: between neighbours of the middle one.
    """

    values: Tensor
    number: int
    inner: int
    outer_stride: int
    inner_stride: int

    @property
    def place(self) -> tuple[int, int, int]:
        """`inner` and both strides: how a kernel finds a row."""
        return self.inner, self.outer_stride, self.inner_stride


def rows(t: Tensor) -> Rows:
    """The rows of `t` `[..., d]`, without a copy where it has three dimensions and its channels are contiguous."""
    if t.dim() != 3:
        t = t.reshape(1, -1, t.size(-1))
    if t.stride(-1) != 1:
        t = t.contiguous()
    return Rows(t, t.size(0) * t.size(1), t.size(1), t.stride(0), t.stride(1))


def block(channels: int) -> dict[str, int]:
    """Size of a block that holds so many channels, and the warps for it."""
    size = triton.next_power_of_2(channels)
    return {"BLOCK": size, "num_warps": min(max(size // _CHANNELS_PER_WARP, 1), 16)}


def partial_sums(programs: int, *size: int, like: Tensor) -> Tensor:
    """Room for what every program sums up, fp32."""
    return torch.empty(programs, *size, dtype=torch.float32, device=like.device)
