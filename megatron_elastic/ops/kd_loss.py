"""The distillation loss fused with the LM head, one chunk of tokens at a time.

Logits of all tokens never exist together. The vocabulary may be sharded over a process group; every rank then returns
the loss over the whole vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_elastic.curriculum import FORWARD_KL, DistillationLoss
from megatron_elastic.ops.cross_entropy import cross_entropy_of_logits, cross_entropy_ref, shard_targets
from megatron_elastic.ops.divergence import divergence_of, divergence_ref, tensors_alive
from megatron_elastic.ops.fused_head import Gradients, check_shapes, chunks, hand_out, logits_of


def kd_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weights: Tensor,
    *,
    temperature: float = 1.0,
    loss: DistillationLoss = FORWARD_KL,
    labels: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    teacher_lse: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`sum_t w_t (T^2 D(teacher_t, student_t) + c CE_t)`, in nats.

    `D` is the divergence of `loss` between `softmax(logits / T)`; `CE` the student's cross entropy at temperature 1,
    and `c` its weight. Where a gradient is wanted it is computed with the loss, chunk by chunk, and only scaled in the
    backward, which therefore runs once. The teacher, `token_weights` and `teacher_lse` get none. Computed in fp32 (fp64
    when `hidden` is fp64) on logits in the dtype of `hidden`.

    Args:
        hidden: student's normalised hidden states `[s, b, k]`.
        weight: student's LM head `[V / TP, k]`.
        teacher_hidden: `[s, b, h]`.
        teacher_weight: `[V / TP, h]`, the same shard of the vocabulary.
        token_weights: loss mask `[s, b]`.
        temperature: `T`, positive.
        loss: divergence and weight of the cross entropy.
        labels: ids in the whole vocabulary, `[s, b]`, outside it only where the token's weight is 0; required where the
            cross entropy has a weight.
        group: ranks that hold the shards of the vocabulary, in rank order; None for a whole one.
        teacher_lse: what an earlier call returned for this teacher, these tokens and this temperature.
        chunk_tokens: tokens per chunk; None for `default_chunk_tokens`.

    Returns:
        `(loss_sum, teacher_lse)`: 0-dim, the same on every rank of `group`; and `[s * b]`, the log-sum-exp of the
        teacher's logits over `T`.  The gradient of `hidden` is this shard's part of a sum over `group`.

    Raises:
        ValueError: `temperature` or `chunk_tokens` is not positive, labels are missing, or the shapes do not fit each
            other.

    Source: Hinton et al. (arXiv 1503.02531), section 2; the chunked head: Hsu et al. (arXiv 2410.10989), section 3.2.
    """
    check_shapes(hidden, weight, token_weights, chunk_tokens)
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if teacher_hidden.shape[:2] != hidden.shape[:2] or teacher_weight.size(0) != weight.size(0):
        raise ValueError(
            f"teacher {tuple(teacher_hidden.shape)} x {tuple(teacher_weight.shape)} beside student "
            f"{tuple(hidden.shape)} x {tuple(weight.shape)}; give the same tokens and vocabulary"
        )
    if loss.ce_weight and (labels is None or labels.shape != token_weights.shape):
        raise ValueError(
            f"ce_weight is {loss.ce_weight} and labels are {None if labels is None else tuple(labels.shape)}; give "
            f"labels {tuple(token_weights.shape)} [s, b], or a ce_weight of 0"
        )
    settings = (temperature, loss, group, chunk_tokens, torch.is_grad_enabled())
    total, lse = _KDLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, teacher_hidden, teacher_weight, token_weights, labels, teacher_lse, settings
    )
    return total, lse if teacher_lse is None else teacher_lse


def kd_loss_ref(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weights: Tensor,
    *,
    temperature: float = 1.0,
    loss: DistillationLoss = FORWARD_KL,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`kd_loss` with all logits at once and a whole vocabulary; shapes as there."""
    compute = torch.promote_types(hidden.dtype, torch.float32)
    with torch.no_grad():
        teacher = (teacher_hidden @ teacher_weight.t()).to(compute) / temperature
    student = (hidden @ weight.t()).to(compute) / temperature
    divergence = divergence_ref(student.log_softmax(-1), teacher.log_softmax(-1), loss)
    total = temperature**2 * (divergence * token_weights.to(compute)).sum()
    if loss.ce_weight:
        assert labels is not None
        total = total + loss.ce_weight * cross_entropy_ref(hidden, weight, labels, token_weights)
    return total, teacher.logsumexp(-1).flatten()


class _KDLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        token_weights: Tensor,
        labels: Tensor | None,
        teacher_lse: Tensor | None,
        settings: tuple[float, DistillationLoss, dist.ProcessGroup | None, int | None, bool],
    ) -> tuple[Tensor, Tensor]:
        temperature, loss, group, chunk_tokens, grad_enabled = settings
        compute = torch.promote_types(hidden.dtype, torch.float32)
        tokens, vocabulary = token_weights.numel(), weight.size(0)
        flat, teacher_flat = hidden.flatten(0, 1), teacher_hidden.flatten(0, 1)
        weights = token_weights.flatten().to(compute)
        totals = torch.zeros(2, dtype=compute, device=hidden.device)  # of the divergence, of the cross entropy
        lse = torch.empty(tokens, dtype=compute, device=hidden.device) if teacher_lse is None else teacher_lse.detach()
        wanted = grad_enabled and ctx.needs_input_grad[0], grad_enabled and ctx.needs_input_grad[1]
        gradients = Gradients(hidden, weight, compute, wanted)
        divergence_and_gradient = divergence_of(loss)
        targets = shard_targets(labels, vocabulary, group) if loss.ce_weight and labels is not None else None
        for part in chunks(tokens, vocabulary, chunk_tokens, tensors_alive(loss)):
            plain = None
            if targets is None:
                student = logits_of(flat[part], weight, temperature, compute)
            else:
                plain = logits_of(flat[part], weight, 1.0, compute)
                student = plain / temperature
                losses = cross_entropy_of_logits(plain, targets[part], group, gradient=any(wanted))
                totals[1] += torch.dot(losses, weights[part])
            teacher = logits_of(teacher_flat[part], teacher_weight, temperature, compute)
            known = None if teacher_lse is None else teacher_lse[part]
            divergence, part_lse = divergence_and_gradient(student, teacher, known, group)
            del teacher
            totals[0] += torch.dot(divergence, weights[part])
            if known is None:
                lse[part] = part_lse
            if any(wanted):
                if plain is not None:
                    student.add_(plain, alpha=loss.ce_weight / temperature)
                gradients.add(part, student.mul_(weights[part, None]))
            # Else the next chunk's logits would be made beside these.
            del student, plain
        # The loss has T^2, the logits were divided by T.
        gradients.finish(ctx, temperature)
        ctx.mark_non_differentiable(lse)
        total = totals[0] * temperature**2
        return total if targets is None else total + loss.ce_weight * totals[1], lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *hand_out(ctx, grad), None, None, None, None, None, None
