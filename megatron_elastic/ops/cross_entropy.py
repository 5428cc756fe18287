"""Cross entropy fused with the LM head, one chunk of tokens at a time.

The vocabulary may be sharded over a process group; every rank then returns the loss over the whole vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_elastic.ops.fused_head import Gradients, all_reduce, check_shapes, chunks, hand_out, logits_of


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Cross entropy `sum_t -w_t log p_t[label_t]` in nats.

    Where a gradient is wanted it is computed with the loss, chunk by chunk, and only scaled in the backward, which
    therefore runs once.

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
    check_shapes(hidden, weight, token_weights, chunk_tokens)
    settings = (group, chunk_tokens, torch.is_grad_enabled())
    loss: Tensor = _CrossEntropy.apply(hidden, weight, labels, token_weights, settings)  # type: ignore[no-untyped-call]
    return loss


def cross_entropy_ref(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    """`cross_entropy` with all logits at once and a whole vocabulary; shapes as there."""
    compute = torch.promote_types(hidden.dtype, torch.float32)
    logits = (hidden @ weight.t()).to(compute).flatten(0, 1)
    losses = F.cross_entropy(logits, labels.flatten(), reduction="none")
    return (losses * token_weights.flatten().to(compute)).sum()


def shard_targets(labels: Tensor, vocabulary: int, group: dist.ProcessGroup | None) -> Tensor:
    """Labels as ids in this rank's shard of `vocabulary` entries, `[s * b]`; others lie outside it."""
    return labels.flatten() - vocabulary * (0 if group is None else dist.get_rank(group))


def cross_entropy_of_logits(
    logits: Tensor, targets: Tensor, group: dist.ProcessGroup | None, *, gradient: bool
) -> Tensor:
    """Cross entropy `[c]` of one chunk's logits `[c, V / TP]`, which are overwritten.

    Args:
        logits: of this rank's shard.
        targets: `[c]`, of `shard_targets`.
        group: ranks that hold the shards.
        gradient: leaves the gradient of the logits in `logits`.
    """
    logits -= all_reduce(logits.amax(-1), dist.ReduceOp.MAX, group)[:, None]
    here = (targets >= 0) & (targets < logits.size(1))
    index = targets.where(here, 0)[:, None]
    target = logits.gather(-1, index)[:, 0].where(here, 0.0)
    sums = all_reduce(torch.stack([logits.exp_().sum(-1), target]), dist.ReduceOp.SUM, group)
    if gradient:
        logits /= sums[0, :, None]
        logits.scatter_add_(-1, index, -here[:, None].to(logits.dtype))
    return sums[0].log() - sums[1]


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
        total = torch.zeros((), dtype=compute, device=hidden.device)
        flat, weights = hidden.flatten(0, 1), token_weights.flatten().to(compute)
        targets = shard_targets(labels, vocabulary, group)
        wanted = grad_enabled and ctx.needs_input_grad[0], grad_enabled and ctx.needs_input_grad[1]
        gradients = Gradients(hidden, weight, compute, wanted)
        for part in chunks(tokens, vocabulary, chunk_tokens):
            logits = logits_of(flat[part], weight, 1.0, compute)
            losses = cross_entropy_of_logits(logits, targets[part], group, gradient=any(wanted))
            total += torch.dot(losses, weights[part])
            if any(wanted):
                gradients.add(part, logits.mul_(weights[part, None]))
        gradients.finish(ctx)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *hand_out(ctx, grad), None, None, None
