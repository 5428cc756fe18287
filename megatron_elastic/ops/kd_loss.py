"""Losses fused with the LM head, one chunk of tokens at a time: logits of all tokens never exist together.

The vocabulary may be sharded over a process group; every rank then returns the loss over the whole vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_FEWEST_TOKENS = 128
"""Smaller chunks make the LM head's GEMM reread its weight too often."""
_LARGEST_CHUNK = 2**25
"""Most logits in one chunk, whatever the number of tokens: 128 MiB in fp32."""


def default_chunk_tokens(tokens: int, vocabulary: int) -> int:
    """Tokens per chunk: 1/32 of them at most, and no more than `_LARGEST_CHUNK` logits, but at least 128 tokens."""
    return max(_FEWEST_TOKENS, min(tokens // 32, _LARGEST_CHUNK // max(vocabulary, 1)))


def kd_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weights: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    teacher_lse: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward KL divergence `sum_t w_t T^2 KL(teacher_t || student_t)` of `softmax(logits / T)`, in nats.

    Where a gradient is wanted it is computed with the loss, chunk by chunk, and only scaled in the backward.  The
    teacher, `token_weights` and `teacher_lse` get none.  Computed in fp32 (fp64 when `hidden` is fp64) on logits in the
    dtype of `hidden`.

    Args:
        hidden: student's normalised hidden states `[s, b, k]`.
        weight: student's LM head `[V / TP, k]`.
        teacher_hidden: `[s, b, h]`.
        teacher_weight: `[V / TP, h]`, the same shard of the vocabulary.
        token_weights: loss mask `[s, b]`.
        temperature: `T`, positive.
        group: ranks that hold the shards of the vocabulary; None for a whole one.
        teacher_lse: what an earlier call returned for this teacher, these tokens and this temperature.
        chunk_tokens: tokens per chunk; None for `default_chunk_tokens`.

    Returns:
        `(loss_sum, teacher_lse)`: 0-dim, the same on every rank of `group`; and `[s * b]`, the log-sum-exp of the
        teacher's logits over `T`.  The gradient of `hidden` is this shard's part of a sum over `group`.

    Raises:
        ValueError: `temperature` or `chunk_tokens` is not positive, or the shapes do not fit each other.

    Source: Hinton et al. (arXiv 1503.02531), section 2; the chunked head: Hsu et al. (arXiv 2410.10989), section 3.2.
    """
    _check_shapes(hidden, weight, token_weights, chunk_tokens)
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if teacher_hidden.shape[:2] != hidden.shape[:2] or teacher_weight.size(0) != weight.size(0):
        raise ValueError(
            f"teacher {tuple(teacher_hidden.shape)} x {tuple(teacher_weight.shape)} beside student "
            f"{tuple(hidden.shape)} x {tuple(weight.shape)}; give the same tokens and vocabulary"
        )
    settings = (temperature, group, chunk_tokens, torch.is_grad_enabled())
    loss, lse = _KDLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, teacher_hidden, teacher_weight, token_weights, teacher_lse, settings
    )
    return loss, lse if teacher_lse is None else teacher_lse


def kd_loss_ref(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weights: Tensor,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`kd_loss` with all logits at once and a whole vocabulary; shapes as there."""
    compute = torch.promote_types(hidden.dtype, torch.float32)
    with torch.no_grad():
        teacher = (teacher_hidden @ teacher_weight.t()).to(compute) / temperature
    student = (hidden @ weight.t()).to(compute) / temperature
    divergence = F.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    return temperature**2 * (divergence * token_weights.to(compute)).sum(), teacher.logsumexp(-1).flatten()


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Cross entropy `sum_t -w_t log p_t[label_t]` in nats.

    Where a gradient is wanted it is computed with the loss, chunk by chunk, and only scaled in the backward.

    Args:
        hidden: normalised hidden states `[s, b, k]`.
        weight: LM head `[V / TP, k]`.
        labels: ids in the whole vocabulary, `[s, b]`; outside it only where the token's weight is 0.
        token_weights: loss mask `[s, b]`.
        group: ranks that hold the shards of the vocabulary, in rank order; None for a whole one.
        chunk_tokens: tokens per chunk; None for `default_chunk_tokens`.

    Returns:
        `loss_sum`, 0-dim, the same on every rank of `group`; fp32 (fp64 when `hidden` is fp64). The gradient of
        `hidden` is this shard's part of a sum over `group`.

    Raises:
        ValueError: `chunk_tokens` is not positive, or the shapes do not fit each other.
    """
    _check_shapes(hidden, weight, token_weights, chunk_tokens)
    settings = (group, chunk_tokens, torch.is_grad_enabled())
    loss: Tensor = _CrossEntropy.apply(hidden, weight, labels, token_weights, settings)  # type: ignore[no-untyped-call]
    return loss


def cross_entropy_ref(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    """`cross_entropy` with all logits at once and a whole vocabulary; shapes as there."""
    compute = torch.promote_types(hidden.dtype, torch.float32)
    logits = (hidden @ weight.t()).to(compute).flatten(0, 1)
    losses = F.cross_entropy(logits, labels.flatten(), reduction="none")
    return (losses * token_weights.flatten().to(compute)).sum()


def _check_shapes(hidden: Tensor, weight: Tensor, token_weights: Tensor, chunk_tokens: int | None) -> None:
    if hidden.dim() != 3 or token_weights.shape != hidden.shape[:2] or weight.shape[1:] != hidden.shape[2:]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, token weights {tuple(token_weights.shape)}; "
            "give [s, b, k], [V, k] and [s, b]"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")


def _chunks(tokens: int, vocabulary: int, chunk_tokens: int | None) -> list[slice]:
    size = default_chunk_tokens(tokens, vocabulary) if chunk_tokens is None else chunk_tokens
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _logits(hidden: Tensor, weight: Tensor, temperature: float, compute: torch.dtype) -> Tensor:
    logits = (hidden @ weight.t()).to(compute)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _reduce(values: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(values, op=operation, group=group)
    return values


def _divergence(
    student: Tensor, teacher: Tensor, teacher_lse: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """KL divergence and the teacher's log-sum-exp, `[c]` each, of one chunk's logits `[c, V / TP]`.

    Leaves `p_student - p_teacher` in `student` and overwrites `teacher`.  Two collectives: the maxima, then the sums.
    """
    if teacher_lse is None:
        maxima = _reduce(torch.stack([student.amax(-1), teacher.amax(-1)]), dist.ReduceOp.MAX, group)
        shift = maxima[1]
    else:
        maxima, shift = _reduce(student.amax(-1)[None], dist.ReduceOp.MAX, group), teacher_lse
    student -= maxima[0, :, None]
    teacher -= shift[:, None]
    difference = teacher - student
    p_teacher, p_student = teacher.exp_(), student.exp_()
    sums = [p_student.sum(-1), difference.mul_(p_teacher).sum(-1)]
    if teacher_lse is None:
        sums.append(p_teacher.sum(-1))
    reduced = _reduce(torch.stack(sums), dist.ReduceOp.SUM, group)
    divergence, lse = reduced[1] + reduced[0].log(), shift
    if teacher_lse is None:
        divergence = reduced[1] / reduced[2] + reduced[0].log() - reduced[2].log()
        lse = shift + reduced[2].log()
        p_teacher /= reduced[2, :, None]
    p_student.div_(reduced[0, :, None]).sub_(p_teacher)
    # It is never negative but by rounding, and metrics drop negative losses.
    return divergence.clamp_min_(0.0), lse


class _Gradients:
    """Gradients of a loss of logits `hidden @ weight.t()`, added up chunk by chunk; None where none is wanted."""

    def __init__(self, hidden: Tensor, weight: Tensor, compute: torch.dtype, wanted: tuple[bool, bool]) -> None:
        self.flat, self.weight = hidden.flatten(0, 1), weight
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
            self.weights += d_logits.t() @ self.flat[part]

    def finish(self, factor: float = 1.0) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of hidden states `[s * b, k]` and weight, times a factor, in their own dtypes."""
        if self.hidden is not None and factor != 1.0:
            self.hidden *= factor
        weights = self.weights
        if weights is not None:
            weights = (weights.mul_(factor) if factor != 1.0 else weights).to(self.weight.dtype)
        return self.hidden, weights


def _scaled(gradients: tuple[Tensor | None, ...], factor: Tensor, shape: torch.Size) -> tuple[Tensor | None, ...]:
    d_hidden, d_weight = gradients
    if d_hidden is not None:
        d_hidden = (d_hidden * factor.to(d_hidden.dtype)).view(shape)
    if d_weight is not None:
        d_weight = d_weight * factor.to(d_weight.dtype)
    return d_hidden, d_weight


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weights: Tensor,
        settings: tuple[dist.ProcessGroup | None, int | None, bool],
    ) -> Tensor:
        group, chunk_tokens, grad_enabled = settings
        compute = torch.promote_types(hidden.dtype, torch.float32)
        tokens, vocabulary = token_weights.numel(), weight.size(0)
        first = vocabulary * (0 if group is None else dist.get_rank(group))
        total = torch.zeros((), dtype=compute, device=hidden.device)
        flat, targets, weights = hidden.flatten(0, 1), labels.flatten() - first, token_weights.flatten().to(compute)
        wanted = grad_enabled and ctx.needs_input_grad[0], grad_enabled and ctx.needs_input_grad[1]
        gradients = _Gradients(hidden, weight, compute, wanted)
        for part in _chunks(tokens, vocabulary, chunk_tokens):
            logits = _logits(flat[part], weight, 1.0, compute)
            logits -= _reduce(logits.amax(-1), dist.ReduceOp.MAX, group)[:, None]
            here = (targets[part] >= 0) & (targets[part] < vocabulary)
            index = targets[part].where(here, 0)[:, None]
            target = logits.gather(-1, index)[:, 0].where(here, 0.0)
            sums = _reduce(torch.stack([logits.exp_().sum(-1), target]), dist.ReduceOp.SUM, group)
            total += torch.dot(sums[0].log() - sums[1], weights[part])
            if any(wanted):
                logits /= sums[0, :, None]
                logits.scatter_add_(-1, index, -here[:, None].to(compute))
                gradients.add(part, logits.mul_(weights[part, None]))
        ctx.save_for_backward(*gradients.finish())
        ctx.shape = hidden.shape
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx.saved_tensors, grad, ctx.shape), None, None, None


class _KDLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        token_weights: Tensor,
        teacher_lse: Tensor | None,
        settings: tuple[float, dist.ProcessGroup | None, int | None, bool],
    ) -> tuple[Tensor, Tensor]:
        temperature, group, chunk_tokens, grad_enabled = settings
        compute = torch.promote_types(hidden.dtype, torch.float32)
        tokens, vocabulary = token_weights.numel(), weight.size(0)
        flat, teacher_flat = hidden.flatten(0, 1), teacher_hidden.flatten(0, 1)
        weights = token_weights.flatten().to(compute)
        total = torch.zeros((), dtype=compute, device=hidden.device)
        lse = torch.empty(tokens, dtype=compute, device=hidden.device) if teacher_lse is None else teacher_lse.detach()
        wanted = grad_enabled and ctx.needs_input_grad[0], grad_enabled and ctx.needs_input_grad[1]
        gradients = _Gradients(hidden, weight, compute, wanted)
        for part in _chunks(tokens, vocabulary, chunk_tokens):
            student = _logits(flat[part], weight, temperature, compute)
            teacher = _logits(teacher_flat[part], teacher_weight, temperature, compute)
            known = None if teacher_lse is None else teacher_lse[part]
            divergence, part_lse = _divergence(student, teacher, known, group)
            total += torch.dot(divergence, weights[part])
            if known is None:
                lse[part] = part_lse
            if any(wanted):
                gradients.add(part, student.mul_(weights[part, None]))
        # The loss has T^2, the logits were divided by T.
        ctx.save_for_backward(*gradients.finish(temperature))
        ctx.shape = hidden.shape
        ctx.mark_non_differentiable(lse)
        return total * temperature**2, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx.saved_tensors, grad, ctx.shape), None, None, None, None, None
