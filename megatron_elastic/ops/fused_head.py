"""What the losses fused with the LM head share: chunks of tokens, logits, collectives and gradients.

Logits of all tokens never exist together: a loss and its gradient are made chunk by chunk.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_elastic.ops.sliced_parameter import ExactGradient, dummy_gradient

FEWEST_TOKENS = 128
"""Smaller chunks make the LM head's GEMM reread its weight too often."""
_LARGEST_CHUNK = 2**25
"""Most logits in one chunk, whatever the number of tokens: 128 MiB in fp32."""
_ROWS = 2**14
"""Rows of the weight's gradient that are made at once, where they are added in a higher precision."""
_TENSORS = 3
"""Tensors of a chunk's logits that are alive together in the plain KD loss."""


def default_chunk_tokens(tokens: int, vocabulary: int, tensors: int = _TENSORS) -> int:
    """Tokens per chunk, at least 128.

    At most 1/32 of them and `2**25` logits, and as many less as more than three `tensors` of logits are alive together.
    """
    most = min(tokens // 32, _LARGEST_CHUNK // max(vocabulary, 1))
    return max(FEWEST_TOKENS, most * _TENSORS // max(tensors, _TENSORS))


def check_shapes(hidden: Tensor, weight: Tensor, token_weights: Tensor, chunk_tokens: int | None) -> None:
    """Raises ValueError where hidden states, LM head and loss mask do not fit each other."""
    if hidden.dim() != 3 or token_weights.shape != hidden.shape[:2] or weight.shape[1:] != hidden.shape[2:]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, token weights {tuple(token_weights.shape)}; "
            "give [s, b, k], [V, k] and [s, b]"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")


def chunks(tokens: int, vocabulary: int, chunk_tokens: int | None, tensors: int = _TENSORS) -> list[slice]:
    """The chunks of a batch, in order."""
    size = default_chunk_tokens(tokens, vocabulary, tensors) if chunk_tokens is None else chunk_tokens
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def logits_of(hidden: Tensor, weight: Tensor, temperature: float, compute: torch.dtype) -> Tensor:
    """Logits over the temperature, `[c, V / TP]`."""
    logits = (hidden @ weight.t()).to(compute)
    return logits if temperature == 1.0 else logits.div_(temperature)


def all_reduce(values: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    """In place, over the ranks that hold the vocabulary."""
    if group is not None and group.size() > 1:
        dist.all_reduce(values, op=operation, group=group)
    return values


class Gradients:
    """Gradients of a loss of logits `hidden @ weight.t()`, added up chunk by chunk; None where none is wanted.

    That of the weight is added up in `compute`. A slice of a parameter takes it as it is: rounded to the weight's dtype
    for autograd it would be a second tensor of the weight's size, and less exact.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, compute: torch.dtype, wanted: tuple[bool, bool]) -> None:
        self.flat, self.weight, self.shape = hidden.flatten(0, 1), weight, hidden.shape
        self.hidden = torch.empty_like(self.flat) if wanted[0] else None
        self.weights = torch.zeros_like(weight, dtype=compute) if wanted[1] else None

    def add(self, part: slice, d_logits: Tensor) -> None:
        """Takes one chunk's gradient of the logits, `[c, V / TP]`."""
        if self.hidden is None and self.weights is None:
            return
        d_logits = d_logits.to(self.flat.dtype)
        if self.hidden is not None:
            torch.mm(d_logits, self.weight, out=self.hidden[part])
        if self.weights is not None and self.weights.dtype == d_logits.dtype:
            self.weights.addmm_(d_logits.t(), self.flat[part])
        elif self.weights is not None:
            # By rows: a product in the low precision, before it is added, is no second tensor of the weight's size.
            for start in range(0, self.weights.size(0), _ROWS):
                rows = slice(start, start + _ROWS)
                self.weights[rows] += d_logits[:, rows].t() @ self.flat[part]

    def finish(self, ctx: Any, factor: float = 1.0) -> None:
        """Leaves the gradients, times a factor, for `hand_out`."""
        for gradient in (self.hidden, self.weights):
            if gradient is not None and factor != 1.0:
                gradient.mul_(factor)
        weights, ctx.exact = self.weights, None
        if weights is not None and weights.dtype != self.weight.dtype:
            exact = ExactGradient.of(self.weight)
            if exact is None:
                weights = weights.to(self.weight.dtype)
            else:
                ctx.exact = exact, dummy_gradient(self.weight)
        ctx.gradients = None if self.hidden is None else self.hidden.view(self.shape), weights


def hand_out(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of hidden states and weight, scaled in place: a copy would be as large as the weight.

    Raises:
        RuntimeError: they were handed out before.
    """
    if ctx.gradients is None:
        raise RuntimeError(
            "a loss fused with the LM head was differentiated twice: its gradients are made once, with the loss. "
            "Compute the loss again"
        )
    (hidden, weight), ctx.gradients = ctx.gradients, None
    for gradient in (hidden, weight):
        if gradient is not None:
            gradient.mul_(grad.to(gradient.dtype))
    if ctx.exact is None:
        return hidden, weight
    exact, carried = ctx.exact
    exact.value = weight
    return hidden, carried
