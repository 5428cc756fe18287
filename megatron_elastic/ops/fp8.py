"""FP8 numbers as Transformer Engine makes them, in plain torch: two ways to scale, and a linear layer that uses them.

A reference that runs on any device, and the local backend's FP8: the products are made in fp32 from the quantised
operands. Scales follow Transformer Engine 2.20 (`Float8CurrentScaling`, `Float8BlockScaling`):

- the scale is the format's largest number divided by the largest magnitude, in fp32; 1 where that is zero or not
  finite. Powers of two are rounded down;
- `tensorwise`: one scale a tensor, of any value;
- `blockwise`: one scale, a power of two, for every 128 entries of activations and gradients along the dimension that
  the product sums over, and for every 128 x 128 of a weight. A last block may be smaller.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_elastic.precision import Scaling

BLOCK = 128
"""Entries on a side of a block in blockwise scaling."""

FORWARD_TYPE = torch.float8_e4m3fn
GRADIENT_TYPES = {"e4m3": torch.float8_e4m3fn, "hybrid": torch.float8_e5m2}
"""Megatron's `fp8-format` -> the type of gradients."""


@dataclass(frozen=True)
class Quantised:
    """A matrix in FP8.

    Attributes:
        data: `[rows, columns]`, an FP8 type.
        inverse_scale: fp32; 0-dim, or a number for every block: `[rows / r, columns / c]`, rounded up.
        block: r and c; the matrix' own sizes where one scale is for all.
    """

    data: Tensor
    inverse_scale: Tensor
    block: tuple[int, int]

    def dequantised(self) -> Tensor:
        """The numbers that the FP8 data stand for, `[rows, columns]` fp32."""
        values = self.data.float()
        if self.inverse_scale.dim() == 0:
            return values * self.inverse_scale
        return values * _spread(self.inverse_scale, self.block, values.shape)


def scale_of(amax: Tensor, fp8: torch.dtype, *, power_of_two: bool, largest: float) -> Tensor:
    """What numbers are multiplied by before they are cast.

    Args:
        amax: largest magnitudes, fp32, any shape.
        fp8: the type they are cast to.
        power_of_two: round down to a power of two.
        largest: instead of an infinite scale (of magnitudes so small that fp32 has no scale for them).
    """
    scale = torch.full_like(amax, torch.finfo(fp8).max) / amax
    scale = torch.where(scale.isinf(), largest, scale)
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.where(mantissa == 0, 0.0, torch.ldexp(torch.ones_like(scale), exponent - 1))
    return torch.where(amax.isfinite() & (amax != 0), scale, 1.0)


def quantise(x: Tensor, fp8: torch.dtype, block: tuple[int, int] | None = None) -> Quantised:
    """A matrix in FP8, scaled by its own largest magnitudes.

    Args:
        x: `[rows, columns]`.
        fp8: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        block: rows and columns that share a scale, which is then a power of two; None for one scale of any value.
    """
    values, largest = x.detach().float(), torch.finfo(x.dtype if x.dtype is not torch.float64 else torch.float32).max
    if block is None:
        amax = values.abs().amax() if values.numel() else values.new_zeros(())
        scale = scale_of(amax, fp8, power_of_two=False, largest=largest)
        return Quantised(_cast(values * scale, fp8), scale.reciprocal(), (x.size(0), x.size(1)))
    scale = scale_of(_block_amax(values, block), fp8, power_of_two=True, largest=largest)
    return Quantised(_cast(values * _spread(scale, block, values.shape), fp8), scale.reciprocal(), block)


def _cast(scaled: Tensor, fp8: torch.dtype) -> Tensor:
    """The nearest FP8 numbers, and the largest one beyond it: torch's own cast makes NaN or infinity of those."""
    bound = torch.finfo(fp8).max
    return scaled.clamp(-bound, bound).to(fp8)


def _block_amax(values: Tensor, block: tuple[int, int]) -> Tensor:
    """Largest magnitude of every block, `[rows / r, columns / c]` rounded up."""
    rows, columns = values.shape
    up, left = -rows % block[0], -columns % block[1]
    padded = torch.nn.functional.pad(values.abs(), (0, left, 0, up))
    return padded.view((rows + up) // block[0], block[0], (columns + left) // block[1], block[1]).amax(dim=(1, 3))


def _spread(of_block: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """Every block's number for each of its entries."""
    rows = of_block.repeat_interleave(block[0], dim=0)[: shape[0]]
    return rows.repeat_interleave(block[1], dim=1)[:, : shape[1]]


def product(a: Quantised, b: Quantised) -> Tensor:
    """`a @ b.T` with sums in fp32: `[rows of a, rows of b]` from matrices that share their columns."""
    if a.inverse_scale.dim() == 0 and b.inverse_scale.dim() == 0:
        return (a.data.float() @ b.data.float().t()) * (a.inverse_scale * b.inverse_scale)
    return a.dequantised() @ b.dequantised().t()


def transposed(matrix: Quantised) -> Quantised:
    """The same numbers as `[columns, rows]`: not quantised anew."""
    scale = matrix.inverse_scale
    return Quantised(matrix.data.t(), scale.t() if scale.dim() else scale, (matrix.block[1], matrix.block[0]))


def quantise_weight(weight: Tensor, scaling: Scaling) -> Quantised:
    """A weight `[outputs, inputs]`, for both the forward and the gradient of the input."""
    return quantise(weight, FORWARD_TYPE, (BLOCK, BLOCK) if scaling.recipe == "blockwise" else None)


def fp8_linear_ref(x: Tensor, weight: Tensor, quantised: Quantised, scaling: Scaling) -> Tensor:
    """A linear layer whose three products have FP8 operands.

    The input and the gradient of the output are quantised here, once for each product that sums over another dimension
    (blockwise) or once for both (tensorwise). Of the input only its FP8 form is kept for the backward.

    Args:
        x: `[..., inputs]`, of at least one row.
        weight: `[outputs, inputs]`, neither of them 0; its values are not read, the gradient comes to it.
        quantised: what `quantise_weight` made of the same values.
        scaling: formats and recipe.

    Returns:
        `[..., outputs]` in the type of `x`.
    """
    out: Tensor = _Fp8Linear.apply(x, weight, quantised, scaling)  # type: ignore[no-untyped-call]
    return out


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, quantised: Quantised, scaling: Scaling) -> Tensor:
        rows = x.reshape(-1, x.size(-1))
        blockwise = scaling.recipe == "blockwise"
        own = quantise(rows, FORWARD_TYPE, (1, BLOCK) if blockwise else None)
        # The gradient of the weight sums over tokens: blocks of another direction, made of the same values.
        over_tokens = own
        if blockwise and ctx.needs_input_grad[1]:
            over_tokens = quantise(rows, FORWARD_TYPE, (BLOCK, 1))
        # Attributes: none of these is a graph's own input or output, and the weight's copy is shared by all uses.
        ctx.quantised, ctx.scaling, ctx.dtypes, ctx.shape = quantised, scaling, (x.dtype, weight.dtype), x.shape
        ctx.rows = over_tokens if ctx.needs_input_grad[1] else None
        return product(own, quantised).to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, fp8 = grad.reshape(-1, grad.size(-1)), GRADIENT_TYPES[ctx.scaling.format]
        blockwise = ctx.scaling.recipe == "blockwise"
        own = quantise(rows, fp8, (1, BLOCK) if blockwise else None)
        of_input = of_weight = None
        if ctx.needs_input_grad[0]:
            of_input = product(own, transposed(ctx.quantised)).to(ctx.dtypes[0]).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            over_tokens = quantise(rows, fp8, (BLOCK, 1)) if blockwise else own
            of_weight = product(transposed(over_tokens), transposed(ctx.rows)).to(ctx.dtypes[1])
        return of_input, of_weight, None, None
