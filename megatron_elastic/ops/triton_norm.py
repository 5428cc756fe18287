"""`rms_norm` as Triton kernels: one pass over the rows forward, one backward. Import it where triton is installed."""

# Kernels are Triton's language, not Python's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_elastic.ops.triton_rows import PROGRAMS, block, partial_sums, rows


def rms_norm(x: Tensor, weight: Tensor, eps: float, width: Tensor | None = None) -> Tensor:
    """`megatron_elastic.ops.norm.rms_norm` with its arguments; `width` of one element. Computed in fp32."""
    y: Tensor = _RMSNorm.apply(x, weight.contiguous(), eps, width)  # type: ignore[no-untyped-call]
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, width: Tensor | None) -> Tensor:
        read, channels = rows(x), x.size(-1)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if read.number:
            _forward[(read.number,)](
                read.values, weight, width, y, channels, *read.place, eps, width is not None, **block(channels)
            )
        ctx.save_for_backward(x, weight, width)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
        x, weight, width = ctx.saved_tensors
        read, given, channels = rows(x), rows(grad), x.size(-1)
        programs = min(read.number, PROGRAMS)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dweight, dwidth = partial_sums(programs, channels, like=x), partial_sums(programs, like=x)
        if programs:
            _backward[(programs,)](
                given.values, read.values, weight, width, dx, dweight, dwidth, read.number, channels, *given.place,
                *read.place, ctx.eps, width is not None, **block(channels),
            )  # fmt: skip
        of_width = None if width is None else dwidth.sum().to(width.dtype).view(width.shape)
        return dx, dweight.sum(0).to(weight.dtype), None, of_width


@triton.jit
def _forward(
    x, weight, width, y, channels, inner, outer_stride, inner_stride, eps, HAS_WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < channels
    start = row // inner * outer_stride + row % inner * inner_stride
    values = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    divisor = tl.load(width).to(tl.float32) if HAS_WIDTH else channels * 1.0
    inverse = 1.0 / tl.sqrt(tl.sum(values * values) / divisor + eps)
    tl.store(y + row * channels + columns, (values * inverse * scale).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, x, weight, width, dx, dweight, dwidth, rows, channels,
    grad_inner, grad_outer_stride, grad_inner_stride, inner, outer_stride, inner_stride, eps,
    HAS_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < channels
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    divisor = tl.load(width).to(tl.float32) if HAS_WIDTH else channels * 1.0
    weight_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    width_sum = 0.0
    for step in range(tl.cdiv(rows, tl.num_programs(0))):
        row = program + step * tl.num_programs(0)
        here = inside & (row < rows)
        start = row // inner * outer_stride + row % inner * inner_stride
        grad_start = row // grad_inner * grad_outer_stride + row % grad_inner * grad_inner_stride
        values = tl.load(x + start + columns, mask=here, other=0.0).to(tl.float32)
        given = tl.load(grad + grad_start + columns, mask=here, other=0.0).to(tl.float32)
        mean = tl.sum(values * values) / divisor
        inverse = 1.0 / tl.sqrt(mean + eps)
        scaled = given * scale
        # What the loss gains by the inverse root; that by the mean square is `-inverse^3 / 2` of it.
        by_inverse = tl.sum(scaled * values)
        slope = by_inverse * inverse * inverse * inverse / divisor
        found = scaled * inverse - values * slope
        tl.store(dx + row * channels + columns, found.to(dx.dtype.element_ty), mask=here)
        weight_sum += given * values * inverse
        width_sum += 0.5 * slope * mean
    tl.store(dweight + program * channels + columns, weight_sum, mask=inside)
    tl.store(dwidth + program, width_sum)
