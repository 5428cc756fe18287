"""`gated_rms_norm` as Triton kernels: gate, mask, norm and their gradients in one pass each over the rows.

Import it where triton is installed.
"""

# Kernels are Triton's language, not Python's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_elastic.ops.triton_rows import PROGRAMS, block, partial_sums, rows


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, mask: Tensor | None = None) -> Tensor:
    """`megatron_elastic.ops.gated_norm.gated_rms_norm` with its arguments. Computed in fp32."""
    kept = None if mask is None else mask.contiguous()
    out: Tensor = _GatedNorm.apply(y, z, weight.contiguous(), groups, eps, kept)  # type: ignore[no-untyped-call]
    return out


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, mask: Tensor | None) -> Tensor:
        values, gates, size = rows(y), rows(z), y.size(-1) // groups
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        if values.number:
            _forward[(values.number, groups)](
                values.values, gates.values, weight, mask, out, size, *values.place, *gates.place, eps,
                mask is not None, **block(size),
            )  # fmt: skip
        ctx.save_for_backward(y, z, weight, mask)
        ctx.groups, ctx.eps = groups, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight, mask = ctx.saved_tensors
        values, gates, given, size = rows(y), rows(z), rows(grad), y.size(-1) // ctx.groups
        programs = min(values.number, PROGRAMS)
        dy, dz = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (y, z))
        dweight, dmask = (partial_sums(programs, ctx.groups, size, like=y) for _ in range(2))
        if programs:
            _backward[(programs, ctx.groups)](
                given.values, values.values, gates.values, weight, mask, dy, dz, dweight, dmask, values.number, size,
                *given.place, *values.place, *gates.place, ctx.eps, mask is not None, **block(size),
            )  # fmt: skip
        of_mask = None if mask is None else dmask.sum(0).flatten().to(mask.dtype)
        return dy, dz, dweight.sum(0).flatten().to(weight.dtype), None, None, of_mask


@triton.jit
def _kept(mask, group, size, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """A group's mask, and the sum of it that divides its mean square."""
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    if HAS_MASK:
        kept = tl.load(mask + group * size + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        kept = tl.where(inside, 1.0, 0.0)
    # A group without any kept channel has a sum of squares of 0: it is divided by fp32's smallest normal number.
    return kept, tl.maximum(tl.sum(kept), 1.1754943508222875e-38)


@triton.jit
def _forward(
    y, z, weight, mask, out, size, inner, outer_stride, inner_stride, z_inner, z_outer_stride, z_inner_stride, eps,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    kept, width = _kept(mask, group, size, HAS_MASK, BLOCK)
    channels = group * size + columns
    start = row // inner * outer_stride + row % inner * inner_stride
    z_start = row // z_inner * z_outer_stride + row % z_inner * z_inner_stride
    gate = tl.load(z + z_start + channels, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(y + start + channels, mask=inside, other=0.0).to(tl.float32)
    values = values * gate * tl.sigmoid(gate) * kept
    scale = tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(values * values) / width + eps)
    place = row * tl.num_programs(1) * size + channels
    tl.store(out + place, (values * inverse * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, y, z, weight, mask, dy, dz, dweight, dmask, rows, size,
    grad_inner, grad_outer_stride, grad_inner_stride, inner, outer_stride, inner_stride,
    z_inner, z_outer_stride, z_inner_stride, eps,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, group, groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    kept, width = _kept(mask, group, size, HAS_MASK, BLOCK)
    channels = group * size + columns
    scale = tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    mask_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    width_sum = 0.0
    for step in range(tl.cdiv(rows, tl.num_programs(0))):
        row = program + step * tl.num_programs(0)
        here = inside & (row < rows)
        start = row // inner * outer_stride + row % inner * inner_stride
        z_start = row // z_inner * z_outer_stride + row % z_inner * z_inner_stride
        grad_start = row // grad_inner * grad_outer_stride + row % grad_inner * grad_inner_stride
        gate = tl.load(z + z_start + channels, mask=here, other=0.0).to(tl.float32)
        scanned = tl.load(y + start + channels, mask=here, other=0.0).to(tl.float32)
        given = tl.load(grad + grad_start + channels, mask=here, other=0.0).to(tl.float32)
        open_ = tl.sigmoid(gate)
        gated = scanned * gate * open_
        values = gated * kept
        mean = tl.sum(values * values) / width
        inverse = 1.0 / tl.sqrt(mean + eps)
        scaled = given * scale
        slope = tl.sum(scaled * values) * inverse * inverse * inverse / width
        by_values = scaled * inverse - values * slope
        by_gated = by_values * kept
        place = row * groups * size + channels
        tl.store(dy + place, (by_gated * gate * open_).to(dy.dtype.element_ty), mask=here)
        by_gate = by_gated * scanned * open_ * (1.0 + gate * (1.0 - open_))
        tl.store(dz + place, by_gate.to(dz.dtype.element_ty), mask=here)
        weight_sum += given * values * inverse
        mask_sum += by_values * gated
        width_sum += 0.5 * slope * mean
    place = program * groups * size + channels
    tl.store(dweight + place, weight_sum, mask=inside)
    if HAS_MASK:
        # Of a group without any kept channel the mean is 0, and so is what comes by the width.
        tl.store(dmask + place, mask_sum + width_sum, mask=inside)
