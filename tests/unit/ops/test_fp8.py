"""FP8 in torch against the formats' own numbers and against scales by hand, and its linear layer against fp64."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron_elastic.ops.fp8 import (
    BLOCK,
    GRADIENT_TYPES,
    fp8_linear_ref,
    product,
    quantise,
    quantise_weight,
    scale_of,
    transposed,
)
from megatron_elastic.precision import Scaling
from tests.gpu.test_fp8 import by_reference, compare

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SCALINGS = [Scaling(format_, recipe) for format_ in ("e4m3", "hybrid") for recipe in ("tensorwise", "blockwise")]
# The gradient of an fp32 sum of 96 to 300 products: rounding of the sum, and of a dequantised number.
SUMS = 1e-5


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def numbers(fp8: torch.dtype) -> list[float]:
    """Every finite number of a format, ascending."""
    values = torch.arange(256, dtype=torch.uint8).view(fp8).float()
    return sorted(set(values[values.isfinite()].tolist()))


@pytest.mark.parametrize(("fp8", "largest", "smallest"), [(E4M3, 448.0, 2.0**-9), (E5M2, 57344.0, 2.0**-16)])
def test_a_number_becomes_the_nearest_one(fp8: torch.dtype, largest: float, smallest: float) -> None:
    table = numbers(fp8)
    assert table[-1] == largest
    assert min(value for value in table if value > 0) == smallest
    between = [(a + b) / 2 for a, b in pairwise(table)]
    x = torch.tensor([*table, *between, *(v * 0.999 for v in between), *(v * 1.001 for v in between)])
    got = quantise(torch.cat([x, torch.tensor([largest])])[None], fp8)
    assert got.inverse_scale == 1.0  # the largest magnitude is the format's own
    for value, found in zip(x.tolist(), got.data[0].float().tolist(), strict=False):
        best = min(abs(value - each) for each in table)
        assert abs(value - found) == best, value
    # Half way goes to the number whose last bit is zero.
    codes = torch.tensor(between)[None].to(fp8).view(torch.uint8)
    assert not (codes & 1).any()


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_scales_by_hand(fp8: torch.dtype) -> None:
    largest, most = torch.finfo(fp8).max, torch.finfo(torch.bfloat16).max
    amax = torch.tensor([1.0, 0.37, 3e-5, 1e4, largest])
    any_value = scale_of(amax, fp8, power_of_two=False, largest=most)
    assert torch.equal(any_value, torch.tensor(largest) / amax)
    powers = scale_of(amax, fp8, power_of_two=True, largest=most)
    assert powers.tolist() == [2.0 ** math.floor(math.log2(largest / value)) for value in amax.double().tolist()]
    odd = torch.tensor([0.0, math.inf, math.nan, 1e-44])
    assert scale_of(odd, fp8, power_of_two=False, largest=most).tolist() == [1.0, 1.0, 1.0, most]
    assert scale_of(odd, fp8, power_of_two=True, largest=most).tolist() == [1.0, 1.0, 1.0, 2.0**127]


def test_what_is_beyond_the_largest_number_becomes_it() -> None:
    got = quantise(torch.tensor([[math.inf, -math.inf, 1.0, math.nan]]), E4M3)
    assert got.data.float()[0, :3].tolist() == [448.0, -448.0, 1.0]
    assert got.data.float()[0, 3].isnan()


@pytest.mark.parametrize("block", [(1, BLOCK), (BLOCK, 1), (BLOCK, BLOCK)])
def test_each_block_has_a_scale_of_its_own(block: tuple[int, int]) -> None:
    x = normal(200, 300) * torch.logspace(-3, 3, 300)
    got = quantise(x, E4M3, block)
    assert got.inverse_scale.shape == (math.ceil(200 / block[0]), math.ceil(300 / block[1]))
    for row, column in ((0, 0), (200 - 1, 300 - 1), (130, 129), (127, 127)):
        top, left = row // block[0] * block[0], column // block[1] * block[1]
        part = x[top : top + block[0], left : left + block[1]]
        scale = 2.0 ** math.floor(math.log2(448.0 / part.abs().max().item()))
        assert got.inverse_scale[row // block[0], column // block[1]] == 1 / scale
        assert got.data[row, column] == (x[row, column] * scale).to(E4M3)
    # In units of the number itself: half a step of three mantissa bits. One scale for all loses the small ones.
    assert ((got.dequantised() - x).abs() <= x.abs() * 2**-4).float().mean() > 0.99
    assert ((quantise(x, E4M3).dequantised() - x).abs() <= x.abs() * 2**-4).float().mean() < 0.9


def test_a_transposed_matrix_has_the_same_numbers() -> None:
    for got in (quantise(normal(20, 300), E4M3), quantise(normal(20, 300), E4M3, (1, BLOCK))):
        assert torch.equal(transposed(got).dequantised(), got.dequantised().t())
        other = quantise(normal(8, 300, seed=1), E4M3)
        assert (product(got, other) - got.dequantised() @ other.dequantised().t()).abs().max() < 1e-3


def test_products_are_torchs_own() -> None:
    """Torch's scaled product of FP8 matrices, where one scale is for all."""
    a, b = (quantise(normal(32, 64, seed=seed), E4M3) for seed in (0, 1))
    theirs = torch._scaled_mm(
        a.data, b.data.t(), scale_a=a.inverse_scale, scale_b=b.inverse_scale, out_dtype=torch.float32
    )
    assert (product(a, b) - theirs).abs().max() <= SUMS * theirs.abs().max()


def by_hand(x: Tensor, weight: Tensor, upstream: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both gradients in fp64 from numbers that are quantised here."""
    blockwise = scaling.recipe == "blockwise"

    def of(matrix: Tensor, fp8: torch.dtype, block: tuple[int, int]) -> Tensor:
        return quantise(matrix, fp8, block if blockwise else None).dequantised().double()

    w = of(weight, E4M3, (BLOCK, BLOCK))
    grad = GRADIENT_TYPES[scaling.format]
    out = of(x, E4M3, (1, BLOCK)) @ w.t()
    of_input = of(upstream, grad, (1, BLOCK)) @ w
    of_weight = of(upstream, grad, (BLOCK, 1)).t() @ of(x, E4M3, (BLOCK, 1))
    return out, of_input, of_weight


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s.format}-{s.recipe}")
def test_the_linear_layer(scaling: Scaling) -> None:
    x, weight, upstream = normal(6, 50, 144), normal(96, 144, seed=1) * 0.1, normal(6, 50, 96, seed=2) * 1e-4
    x.requires_grad_()
    weight.requires_grad_()
    out = fp8_linear_ref(x, weight, quantise_weight(weight, scaling), scaling)
    out.backward(upstream)
    assert x.grad is not None
    assert weight.grad is not None
    got = out.detach().flatten(0, 1), x.grad.flatten(0, 1), weight.grad
    right = by_hand(x.detach().flatten(0, 1), weight.detach(), upstream.flatten(0, 1), scaling)
    exact = x.detach() @ weight.detach().t(), upstream @ weight.detach(), upstream.flatten(0, 1).t() @ x.flatten(0, 1)
    for mine, hand, unquantised in zip(got, right, exact, strict=True):
        assert (mine - hand).abs().max() <= SUMS * hand.abs().max()
        near = (mine - unquantised.detach().view_as(mine)).norm() / unquantised.norm()
        assert 1e-2 < near < 8e-2  # three mantissa bits, and two of gradients in e5m2
    other = Scaling("hybrid" if scaling.format == "e4m3" else "e4m3", scaling.recipe)
    different = by_hand(x.detach().flatten(0, 1), weight.detach(), upstream.flatten(0, 1), other)
    assert torch.equal(different[0], right[0])
    assert all((a - b).abs().max() > 1e-3 * b.abs().max() for a, b in zip(different[1:], right[1:], strict=True))


def test_no_gradient_is_made_for_a_frozen_weight() -> None:
    weight, scaling = normal(32, 48), SCALINGS[0]
    x = normal(16, 48, seed=1).requires_grad_()
    fp8_linear_ref(x, weight, quantise_weight(weight, scaling), scaling).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_unknown_recipes_are_refused() -> None:
    with pytest.raises(ValueError, match="FP8 'e5m2', 'tensorwise'"):
        Scaling("e5m2", "tensorwise")
    with pytest.raises(ValueError, match="'delayed'"):
        Scaling("e4m3", "delayed")


@pytest.mark.parametrize("scaling", SCALINGS[1:3], ids=lambda s: f"{s.format}-{s.recipe}")
def test_what_transformer_engine_is_compared_by_on_a_gpu(scaling: Scaling) -> None:
    """The reference passes that comparison, and an unquantised layer does not."""
    compare(by_reference, scaling, "cpu")

    def unquantised(x: Tensor, weight: Tensor, upstream: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor, Tensor]:
        return x @ weight.t(), upstream @ weight, upstream.t() @ x

    with pytest.raises(AssertionError):
        compare(unquantised, scaling, "cpu")
