"""One product for many experts against one product each."""

import pytest
import torch
from torch import Tensor

from megatron_elastic.ops.grouped_linear import grouped_linear, grouped_linear_ref, grouped_product

COUNTS = ((5, 0, 11, 4), (0, 0, 20, 0), (5, 5, 5, 5))


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, weights, grad = (torch.randn(*size, generator=generator) for size in ((20, 16), (4, 24, 16), (20, 24)))
    return x.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_(), grad.to(dtype)


@pytest.mark.parametrize("counts", COUNTS)
def test_every_row_meets_the_weight_of_its_group(counts: tuple[int, ...]) -> None:
    x, weights, grad = operands(torch.float64)
    group = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    each = torch.einsum("ri,roi->ro", x, weights[group])
    made = grouped_linear(x, weights, counts)
    for a, b in zip(
        (made, *torch.autograd.grad(made, (x, weights), grad)),
        (each, *torch.autograd.grad(each, (x, weights), grad)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(grouped_linear(x, weights.flip(0), counts), made)


@pytest.mark.parametrize("counts", COUNTS)
def test_torchs_kernel_is_called_with_what_it_wants(counts: tuple[int, ...]) -> None:
    """Its form for the CPU; the kernel itself is for GPUs, and compared there."""
    x, weights, grad = operands(torch.float32)
    made, each = grouped_product(x, weights, counts), grouped_linear_ref(x, weights, counts)
    for a, b in zip(
        (made, *torch.autograd.grad(made, (x, weights), grad)),
        (each, *torch.autograd.grad(each, (x, weights), grad)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_no_row_at_all() -> None:
    x, weights, _ = operands(torch.float64)
    made = grouped_linear(x[:0], weights, (0, 0, 0, 0))
    assert made.shape == (0, 24)
    (grad,) = torch.autograd.grad(made.sum(), weights)
    assert not grad.any()
