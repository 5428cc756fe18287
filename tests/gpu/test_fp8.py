"""Transformer Engine's FP8 against this package's reference: quantised numbers, scales, and a linear layer.

What needs a GPU has not run on one yet. The reference itself is tested on the CPU, in tests/unit/ops/test_fp8.py and
tests/distributed/test_fp8.py; each comparison here is made with the reference in Transformer Engine's place first.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_elastic.ops.fp8 import BLOCK, FORWARD_TYPE, fp8_linear_ref, quantise, quantise_weight
from megatron_elastic.precision import Scaling

# bf16 results: 8 bits (4e-3), and Hopper's forward product with one scale a tensor adds up in fewer than fp32's bits.
TOLERANCE = 2e-2
FORMATS = {"e4m3": "E4M3", "hybrid": "HYBRID"}
Linear = Callable[[Tensor, Tensor, Tensor, Scaling], tuple[Tensor, Tensor, Tensor]]


def normal(*size: int, seed: int) -> Tensor:
    # Drawn on the CPU: the same numbers on every machine.
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).bfloat16()


def engine() -> Any:
    return pytest.importorskip("transformer_engine.pytorch")


def by_reference(x: Tensor, weight: Tensor, upstream: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both gradients."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = fp8_linear_ref(x, weight, quantise_weight(weight, scaling), scaling)
    out.backward(upstream)
    assert x.grad is not None
    assert weight.grad is not None
    return out.detach(), x.grad, weight.grad


def by_engine(x: Tensor, weight: Tensor, upstream: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor, Tensor]:
    """The same by Transformer Engine's `Linear`."""
    te, recipes = engine(), pytest.importorskip("transformer_engine.common.recipe")
    made = {"tensorwise": recipes.Float8CurrentScaling, "blockwise": recipes.Float8BlockScaling}[scaling.recipe]
    layer = te.Linear(*weight.t().shape, bias=False, params_dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        layer.weight.copy_(weight)
    x = x.clone().requires_grad_()
    with te.autocast(enabled=True, recipe=made(fp8_format=getattr(recipes.Format, FORMATS[scaling.format]))):
        out = layer(x)
    out.backward(upstream)
    assert x.grad is not None
    return out.detach(), x.grad, layer.weight.grad


def compare(found: Linear, scaling: Scaling, device: str) -> None:
    """Against the reference on the CPU; another scaling, the negative, is farther from it than this one."""
    x, weight, upstream = normal(256, 384, seed=0), normal(512, 384, seed=1) * 0.05, normal(256, 512, seed=2) * 1e-3
    mine = found(*(each.to(device) for each in (x, weight, upstream)), scaling)
    right = by_reference(x, weight, upstream, scaling)
    exact = x @ weight.t(), upstream @ weight, upstream.t() @ x
    for one, other, unquantised in zip(mine, right, exact, strict=True):
        error = (one.cpu().float() - other.float()).norm() / other.float().norm()
        assert error < TOLERANCE
        assert error < (unquantised.float() - other.float()).norm() / other.float().norm()


def unquantised(x: Tensor, weight: Tensor, upstream: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor, Tensor]:
    """What no FP8 layer does: the negative."""
    return x @ weight.t(), upstream @ weight, upstream.t() @ x


@pytest.mark.parametrize("format_", ["e4m3", "hybrid"])
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_a_linear_layer(device: torch.device, recipe: str, format_: str) -> None:
    """The reference on the device, and on a GPU Transformer Engine's. Has not run on a GPU yet."""
    scaling = Scaling(format_, recipe)
    compare(by_reference, scaling, device.type)
    with pytest.raises(AssertionError):
        compare(unquantised, scaling, device.type)
    if device.type == "cuda":
        compare(by_engine, scaling, device.type)


def test_numbers_with_one_scale() -> None:
    """Bit for bit: data and scale of `Float8CurrentScalingQuantizer`. Has not run on a GPU yet."""
    te, x = engine(), normal(128, 256, seed=3)
    for fp8, name in ((torch.float8_e4m3fn, "kFloat8E4M3"), (torch.float8_e5m2, "kFloat8E5M2")):
        quantizer = te.Float8CurrentScalingQuantizer(getattr(te.DType, name), torch.device("cuda"), columnwise=False)
        theirs, mine = quantizer(x.cuda()), quantise(x, fp8)
        assert torch.equal(theirs._scale_inv.cpu().view(()), mine.inverse_scale)
        assert torch.equal(theirs._data.cpu().view(fp8).float(), mine.data.float())
        assert not torch.equal(mine.data.float(), quantise(x * 1.1, fp8).data.float())


@pytest.mark.parametrize("dimensions", [1, 2])
def test_numbers_with_a_scale_for_each_block(dimensions: int) -> None:
    """Bit for bit: the dequantised numbers of `Float8BlockQuantizer`, rows and columns. Has not run on a GPU yet."""
    te, x = engine(), normal(256, 384, seed=4) * torch.logspace(-3, 3, 384).bfloat16()
    quantizer = te.Float8BlockQuantizer(
        te.DType.kFloat8E4M3, rowwise=True, columnwise=False, block_scaling_dim=dimensions
    )
    mine = quantise(x, FORWARD_TYPE, (1 if dimensions == 1 else BLOCK, BLOCK))
    theirs = quantizer(x.cuda())
    assert torch.equal(theirs.dequantize(dtype=torch.float32).cpu(), mine.dequantised())
    assert not torch.equal(mine.dequantised(), quantise(x, FORWARD_TYPE).dequantised())
