"""`masked` as Triton kernels: one pass over the rows forward, one backward. Import it where triton is installed."""

# Kernels are Triton's language, not Python's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_elastic.ops.triton_rows import PROGRAMS, partial_sums, rows

BLOCK = 1024
"""Channels of one program."""


def masked(values: Tensor, mask: Tensor, residual: Tensor | None = None) -> Tensor:
    """`megatron_elastic.ops.masking.masked` with its arguments, `mask` of one dimension. Computed in fp32."""
    out: Tensor = _Masked.apply(values, mask.contiguous(), residual)  # type: ignore[no-untyped-call]
    return out


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor, residual: Tensor | None) -> Tensor:
        read, channels = rows(values), values.size(-1)
        added = read if residual is None else rows(residual)
        out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
        if read.number:
            _forward[(read.number, triton.cdiv(channels, BLOCK))](
                read.values, mask, None if residual is None else added.values, out, channels, *read.place,
                *added.place, residual is not None, BLOCK,
            )  # fmt: skip
        ctx.save_for_backward(values, mask)
        ctx.residual = residual is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        values, mask = ctx.saved_tensors
        read, given, channels = rows(values), rows(grad), values.size(-1)
        programs = min(read.number, PROGRAMS)
        dvalues = torch.empty(values.shape, dtype=values.dtype, device=values.device)
        dmask = partial_sums(programs, channels, like=values)
        if programs:
            _backward[(programs, triton.cdiv(channels, BLOCK))](
                given.values, read.values, mask, dvalues, dmask, read.number, channels, *given.place, *read.place,
                BLOCK,
            )  # fmt: skip
        return dvalues, dmask.sum(0).to(mask.dtype), grad if ctx.residual else None


@triton.jit
def _forward(
    values, mask, residual, out, channels, inner, outer_stride, inner_stride,
    residual_inner, residual_outer_stride, residual_inner_stride, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < channels
    start = row // inner * outer_stride + row % inner * inner_stride
    found = tl.load(values + start + columns, mask=inside, other=0.0).to(tl.float32)
    found = found * tl.load(mask + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        start = row // residual_inner * residual_outer_stride + row % residual_inner * residual_inner_stride
        found += tl.load(residual + start + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * channels + columns, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, values, mask, dvalues, dmask, rows, channels, grad_inner, grad_outer_stride, grad_inner_stride,
    inner, outer_stride, inner_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < channels
    kept = tl.load(mask + columns, mask=inside, other=0.0).to(tl.float32)
    mask_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for step in range(tl.cdiv(rows, tl.num_programs(0))):
        row = program + step * tl.num_programs(0)
        here = inside & (row < rows)
        start = row // inner * outer_stride + row % inner * inner_stride
        grad_start = row // grad_inner * grad_outer_stride + row % grad_inner * grad_inner_stride
        given = tl.load(grad + grad_start + columns, mask=here, other=0.0).to(tl.float32)
        mask_sum += given * tl.load(values + start + columns, mask=here, other=0.0).to(tl.float32)
        tl.store(dvalues + row * channels + columns, (given * kept).to(dvalues.dtype.element_ty), mask=here)
    tl.store(dmask + program * channels + columns, mask_sum, mask=inside)
