"""Depthwise causal convolution followed by SiLU, as Mamba applies to its packed `x | B | C` channels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_elastic.ops import kernels
from megatron_elastic.ops.packing import check_documents


def causal_conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor, documents: Tensor | None = None) -> Tensor:
    """`silu(bias + sum_i weight[:, 0, i] * x[t - (k - 1) + i])` per channel; tokens before the first one are zero.

    So are tokens of an earlier document.

    Runs as `k` shifted products, which on CPU takes half the time of a grouped `conv1d`; as causal-conv1d's kernel on a
    GPU that has it (`kernels.conv_kernel` says when).  Computed in at least fp32.

    Args:
        x: `[b, l, d]`, of any strides.
        weight: `[d, 1, k]`.
        bias: `[d]`.
        documents: number of each token's document, `[b, l]`, not decreasing along `l`; None for one document.

    Returns:
        `[b, l, d]` in the dtype of `x`.

    Raises:
        ValueError: `documents` is not `[b, l]`.
    """
    check_documents(documents, x.size(0), x.size(1))
    kernel = kernels.conv_kernel(x, weight)
    if kernel is not None:
        return _by_kernel(kernel, x, weight, bias, documents)
    y: Tensor = _ShiftedProducts.apply(x, weight, bias, documents)  # type: ignore[no-untyped-call]
    return y


def causal_conv1d_silu_ref(x: Tensor, weight: Tensor, bias: Tensor, documents: Tensor | None = None) -> Tensor:
    """`causal_conv1d_silu` through `conv1d`, on each document alone; shapes as there."""
    if documents is not None:
        rows = []
        for row, numbers in zip(x, documents, strict=True):
            lengths = numbers.unique_consecutive(return_counts=True)[1].tolist()
            alone = [causal_conv1d_silu_ref(part[None], weight, bias) for part in row.split(lengths)]
            rows.append(torch.cat(alone, 1))
        return torch.cat(rows)
    padded = F.pad(x.transpose(1, 2), (weight.size(-1) - 1, 0))
    return F.silu(F.conv1d(padded, weight.to(x.dtype), bias.to(x.dtype), groups=weight.size(0))).transpose(1, 2)


def _by_kernel(kernel: Any, x: Tensor, weight: Tensor, bias: Tensor, documents: Tensor | None) -> Tensor:
    """causal-conv1d takes `[b, d, l]`, here with the channels next to each other, as documents demand it.

    It reads 16 bytes at once and checks the strides for that but not where the first channel lies, which in a packed
    projection is behind others'; what does not fit is copied.
    """
    multiple = kernels.CONV_MULTIPLE
    fits = x.stride(2) == 1 and not any(place % multiple for place in (*x.stride()[:2], x.storage_offset()))
    x = x if fits else x.clone(memory_format=torch.contiguous_format)
    numbers = None if documents is None else documents.to(torch.int32)
    y: Tensor = kernel(x.transpose(1, 2), weight.squeeze(1), bias, seq_idx=numbers, activation="silu")
    return y.transpose(1, 2)


_BLOCK_BYTES = 1 << 20
"""Bytes of a block of tokens on the CPU: it stays in the cache from the first product to the last."""


def _blocks(x: Tensor) -> list[tuple[int, int]]:
    """Tokens of `[b, l, d]`, some at a time."""
    length = x.size(1)
    step = max(1, _BLOCK_BYTES // max(1, x[:, :1].numel() * x.element_size())) if x.device.type == "cpu" else length
    return [(start, min(start + step, length)) for start in range(0, length, step)]


class _ShiftedProducts(torch.autograd.Function):
    """Products accumulate in place; the backward keeps only the input and the value before SiLU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, documents: Tensor | None) -> Tensor:
        compute = torch.promote_types(x.dtype, torch.float32)
        inputs, taps, base = x.to(compute), weight[:, 0].to(compute).t().contiguous(), bias.to(compute)
        last = taps.size(0) - 1
        y, out = x.new_empty(x.shape, dtype=compute), x.new_empty(x.shape)
        for start, stop in _blocks(y):
            here = y[:, start:stop]
            torch.addcmul(base, inputs[:, start:stop], taps[last], out=here)
            for shift in range(1, min(last + 1, stop)):
                first = max(start, shift)
                seen = _inside(inputs[:, first - shift : stop - shift], documents, first, shift)
                y[:, first:stop].addcmul_(seen, taps[last - shift])
            out[:, start:stop] = F.silu(here)
        ctx.save_for_backward(x, weight, y, documents)
        ctx.bias_dtype = bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, y, documents = ctx.saved_tensors
        inputs, taps = x.to(y.dtype), weight[:, 0].to(y.dtype).t().contiguous()
        last = taps.size(0) - 1
        dx, d_taps, d_bias = torch.empty_like(y), torch.zeros_like(taps), torch.zeros_like(taps[0])
        for start, stop in _blocks(y):
            dy = torch.ops.aten.silu_backward(grad[:, start:stop].to(y.dtype), y[:, start:stop])
            torch.mul(dy, taps[last], out=dx[:, start:stop])
            product = inputs[:, start:stop] * dy
            d_taps[last] += product.sum((0, 1))
            d_bias += dy.sum((0, 1))
            for shift in range(1, min(last + 1, stop)):
                first = max(start, shift)
                reached = _inside(dy[:, first - start :], documents, first, shift)
                before = slice(first - shift, stop - shift)
                dx[:, before].addcmul_(reached, taps[last - shift])
                shifted = torch.mul(inputs[:, before], reached, out=product[:, first - start :])
                d_taps[last - shift] += shifted.sum((0, 1))
        return dx.to(x.dtype), d_taps.t()[:, None].to(weight.dtype), d_bias.to(ctx.bias_dtype), None


def _inside(t: Tensor, documents: Tensor | None, first: int, shift: int) -> Tensor:
    """`t` `[b, m, d]`, of the tokens from `first` on, zero where the one `shift` earlier is of another document."""
    if documents is None:
        return t
    stop = first + t.size(1)
    return t * (documents[:, first:stop] == documents[:, first - shift : stop - shift])[..., None]
