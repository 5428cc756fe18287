"""A contiguous slice of a parameter whose gradient goes straight into the parent's gradient buffer."""

from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Segments = tuple[tuple[int, int], ...]
"""Half-open ranges kept along one tensor dimension, ascending."""


def sliced_parameter(weight: Tensor, *segments: Segments | None) -> Tensor:
    """Pack the kept entries of `weight` into a contiguous tensor; no copy when the slice is contiguous already.

    With `weight.main_grad` (Megatron's DDP) the backward adds the packed gradient into that buffer segment by segment,
    sets `weight.grad_added_to_main_grad` and hands autograd a dummy gradient of zeros that nobody reads.  That flag
    stays set until the buffers are zeroed, so every use of a weight, the full one included, must come through here.
    Without `main_grad` the gradient is full-size, zero outside the slice.

    Args:
        weight: the parameter.
        segments: what is kept of each leading dimension, None for all of it; missing ones are whole.

    Returns:
        The kept entries, `[kept_0, kept_1, ...]`.

    Raises:
        ValueError: more segments than dimensions, or ranges that are not ascending inside the dimension.
    """
    if len(segments) > weight.dim():
        raise ValueError(f"{len(segments)} segment lists for {weight.dim()} dimensions; give one a dimension at most")
    ranges = tuple(_merged(kept, weight.size(dim)) for dim, kept in enumerate(segments))
    packed: Tensor = _Slice.apply(weight, ranges)  # type: ignore[no-untyped-call]
    return packed


def sliced_parameter_ref(weight: Tensor, *segments: Segments | None) -> Tensor:
    """`sliced_parameter` through `index_select`, with autograd's own full-size gradient."""
    for dim, kept in enumerate(segments):
        if kept is not None:
            index = torch.tensor([i for start, stop in kept for i in range(start, stop)], dtype=torch.long)
            weight = weight.index_select(dim, index.to(weight.device))
    return weight


class DummyGradients:
    """Gradients of zeros for autograd to carry where the true one is already in `main_grad`.

    One buffer per dtype and device, as large as the largest weight.  `detach` makes a fresh tensor object on it, which
    autograd takes over without a copy (an expanded scalar would be cloned to full size).  It stays zero, so that a
    parameter with `zero_out_wgrad` may add it.
    """

    def __init__(self) -> None:
        """Start without buffers."""
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def like(self, weight: Tensor) -> Tensor:
        """A tensor of zeros of `weight`'s shape, dtype and device; shared memory, not to be written."""
        key = (weight.dtype, weight.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < weight.numel():
            buffer = self._buffers[key] = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
        return buffer[: weight.numel()].view(weight.shape).detach()


_DUMMIES = DummyGradients()


def dummy_gradient(weight: Tensor) -> Tensor:
    """What autograd carries for a weight whose gradient is in `main_grad`; shared memory, not to be written."""
    return _DUMMIES.like(weight)


def _merged(kept: Segments | None, size: int) -> Segments:
    """Joined ranges without empty ones; `()` keeps nothing."""
    if kept is None:
        return ((0, size),)
    merged: list[tuple[int, int]] = []
    end = 0
    for start, stop in kept:
        if not end <= start <= stop <= size:
            raise ValueError(f"segments {kept} of a dimension of size {size}; give ascending ranges inside it")
        end = stop
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        elif stop > start:
            merged.append((start, stop))
    return tuple(merged)


def _pack(tensor: Tensor, ranges: tuple[Segments, ...], dim: int = 0) -> Tensor:
    """The kept entries of `tensor` from dimension `dim` on: a view where one range is kept, else a copy."""
    if dim == len(ranges):
        return tensor
    parts = [_pack(tensor.narrow(dim, start, stop - start), ranges, dim + 1) for start, stop in ranges[dim]]
    if not parts:
        return _pack(tensor.narrow(dim, 0, 0), ranges, dim + 1)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _blocks(full: Tensor, packed: Tensor, ranges: tuple[Segments, ...]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of views `(in full, in packed)` that cover the slice."""
    placed = []
    for kept in ranges:
        offset, along = 0, []
        for start, stop in kept:
            along.append((slice(start, stop), slice(offset, offset + stop - start)))
            offset += stop - start
        placed.append(along)
    return [
        (full[tuple(source for source, _ in block)], packed[tuple(target for _, target in block)])
        for block in product(*placed)
    ]


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ranges: tuple[Segments, ...]) -> Tensor:
        # Kept as an attribute: its values are not needed, but its `main_grad` is.
        ctx.weight, ctx.ranges = weight, ranges
        packed = _pack(weight, ranges).contiguous()
        return packed.view_as(packed) if packed is weight else packed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight, ranges = ctx.weight, ctx.ranges
        main_grad = getattr(weight, "main_grad", None)
        if main_grad is None:
            if grad.shape == weight.shape:
                return grad, None
            full = torch.zeros_like(weight)
            for whole, part in _blocks(full, grad, ranges):
                whole.copy_(part)
            return full, None
        for whole, part in _blocks(main_grad, grad, ranges):
            whole.add_(part)
        weight.grad_added_to_main_grad = True
        return dummy_gradient(weight), None
