"""Weights that a microbatch does not use, reported to data parallelism all the same."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_elastic.ops.sliced_parameter import dummy_gradient


def unused(x: Tensor, *weights: Tensor) -> Tensor:
    """`x` itself, in whose backward every weight gets a gradient of nothing.

    With `weight.main_grad` (Megatron's DDP) nothing is added, `weight.grad_added_to_main_grad` is set, and autograd
    carries a dummy that nobody reads, as `sliced_parameter` does. Without it the weight gets no gradient.

    Args:
        x: any shape; the backward runs where its gradient comes by.
        weights: parameters that take no part; the order among them is autograd's own.
    """
    result: Tensor = _Unused.apply(x, *weights)  # type: ignore[no-untyped-call]
    return result


class _Unused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.weights = weights
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = []
        for weight in ctx.weights:
            if getattr(weight, "main_grad", None) is None:
                found.append(None)
            else:
                weight.grad_added_to_main_grad = True
                found.append(dummy_gradient(weight))
        return grad, *found
