"""A contiguous slice of a parameter whose gradient goes straight into the parent's gradient buffer."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

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
    exact = ExactGradient()
    packed: Tensor = _Slice.apply(weight, _ranges(weight, segments), exact)  # type: ignore[no-untyped-call]
    packed.exact_gradient = exact  # type: ignore[attr-defined]
    return packed


class ExactGradient:
    """Carries a packed weight's gradient past autograd, which would round it to the weight's dtype.

    For a packed weight that is used once: autograd adds up what several uses bring, and this does not.

    Attributes:
        value: `[kept_0, kept_1, ...]`, in place of the gradient that autograd brings; None leaves that one.
    """

    def __init__(self) -> None:
        """Start without one."""
        self.value: Tensor | None = None

    @staticmethod
    def of(packed: Tensor) -> "ExactGradient | None":
        """Where the gradient of what `sliced_parameter` returned may be put; None for any other tensor."""
        return getattr(packed, "exact_gradient", None)

    def take(self, carried: Tensor) -> Tensor:
        """The gradient, once: the exact one where there is one."""
        found, self.value = carried if self.value is None else self.value, None
        return found


@contextmanager
def packed_again(packed: Tensor, weight: Tensor, *segments: Segments | None) -> Iterator[None]:
    """What runs inside keeps no copy of `packed` for its backward: the slice is packed again there.

    A budget would otherwise hold a second set of its weights from its forward to its backward. The weight must not
    change in between, as it does not inside a step.

    Args:
        packed: what `sliced_parameter` made of the other arguments.
        weight, segments: as there.
    """
    copy = packed.untyped_storage().data_ptr()
    if copy == weight.untyped_storage().data_ptr():
        yield
        return
    ranges = _ranges(weight, segments)

    def keep(saved: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...], int]:
        if saved.untyped_storage().data_ptr() != copy:
            return saved
        return saved.size(), saved.stride(), int(saved.storage_offset())

    def find(kept: Tensor | tuple[torch.Size, tuple[int, ...], int]) -> Tensor:
        return kept if isinstance(kept, Tensor) else _pack(weight.detach(), ranges).as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(keep, find):
        yield


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


class _Run(NamedTuple):
    """Equally long ranges at equal distances along one dimension: a strided view, however many they are.

    Attributes:
        start: of the first range.
        stride: from one range's start to the next one's.
        width: entries of each range.
        repeats: number of ranges.
        offset: where the first one lies in the packed dimension, in which they touch.
    """

    start: int
    stride: int
    width: int
    repeats: int
    offset: int


@lru_cache(maxsize=4096)
def _runs(kept: Segments | None, size: int) -> tuple[_Run, ...]:
    """Ranges as few runs, joined where they touch and without empty ones; `()` keeps nothing."""
    if kept is None:
        return (_Run(0, size, size, 1, 0),)
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
    runs: list[_Run] = []
    offset = 0
    for start, stop in merged:
        width, last = stop - start, runs[-1] if runs else None
        if last is not None and last.width == width and last.repeats == 1:
            runs[-1] = last._replace(stride=start - last.start, repeats=2)
        elif last is not None and last.width == width and start == last.start + last.repeats * last.stride:
            runs[-1] = last._replace(repeats=last.repeats + 1)
        else:
            runs.append(_Run(start, width, width, 1, offset))
        offset += width
    return tuple(runs)


def _ranges(weight: Tensor, segments: tuple[Segments | None, ...]) -> tuple[tuple[_Run, ...], ...]:
    if len(segments) > weight.dim():
        raise ValueError(f"{len(segments)} segment lists for {weight.dim()} dimensions; give one a dimension at most")
    return tuple(_runs(kept, weight.size(dim)) for dim, kept in enumerate(segments))


def _kept_size(runs: tuple[_Run, ...]) -> int:
    return sum(run.width * run.repeats for run in runs)


def _blocks(full: Tensor, packed: Tensor, ranges: tuple[tuple[_Run, ...], ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of views `(in full, in packed)` of one shape that cover the slice: one pair for each choice of runs."""
    rest = full.shape[len(ranges) :]
    for block in product(*ranges):
        shape = [size for run in block for size in (run.repeats, run.width)]
        views = []
        for tensor, packs in ((full, False), (packed, True)):
            strides, start = list[int](), tensor.storage_offset()
            for run, step in zip(block, tensor.stride(), strict=False):
                strides += [(run.width if packs else run.stride) * step, step]
                start += (run.offset if packs else run.start) * step
            views.append(tensor.as_strided((*shape, *rest), (*strides, *tensor.stride()[len(ranges) :]), start))
        yield views[0], views[1]


def _pack(weight: Tensor, ranges: tuple[tuple[_Run, ...], ...]) -> Tensor:
    """The kept entries: a view where they are contiguous, else one copy."""
    if all(len(runs) == 1 and runs[0].repeats == 1 for runs in ranges):
        packed = weight
        for dim, (run,) in enumerate(ranges):
            packed = packed.narrow(dim, run.start, run.width)
        return packed.contiguous()
    packed = weight.new_empty([*map(_kept_size, ranges), *weight.shape[len(ranges) :]])
    for whole, part in _blocks(weight, packed, ranges):
        part.copy_(whole)
    return packed


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ranges: tuple[tuple[_Run, ...], ...], exact: ExactGradient) -> Tensor:
        # Kept as an attribute: its values are not needed, but its `main_grad` is.
        ctx.weight, ctx.ranges, ctx.exact = weight, ranges, exact
        packed = _pack(weight, ranges)
        return packed.view_as(packed) if packed is weight else packed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, ranges, grad = ctx.weight, ctx.ranges, ctx.exact.take(grad)
        main_grad = getattr(weight, "main_grad", None)
        if main_grad is None:
            if grad.shape == weight.shape:
                return grad.to(weight.dtype), None, None
            full = torch.zeros_like(weight)
            for whole, part in _blocks(full, grad, ranges):
                whole.copy_(part)
            return full, None, None
        for whole, part in _blocks(main_grad, grad, ranges):
            whole.add_(part)
        weight.grad_added_to_main_grad = True
        return dummy_gradient(weight), None, None
