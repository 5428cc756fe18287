"""Distillation from a teacher's most probable tokens, fused with the LM head, one chunk of tokens at a time.

What is known of the teacher at a token are the log-probabilities of `k` tokens and, in one entry more, that of all
others together (the ghost token). The student's distribution is gathered into the same `k + 1` entries, and the
divergence is that of these two. It is never above the divergence over the whole vocabulary (forward and reverse KL and
JSD only shrink when outcomes are joined), and is zero where the student gives the kept tokens and their rest the
teacher's probabilities.

Megatron's own `topk_kl_div` is the forward KL of this, for whole logits `[s, b, V]`, at temperature 1, with a ghost of
`1 - sum`, which in fp32 loses what lies below 1e-7 (it takes 1e-8 for nothing). Here the rest is summed for itself.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_elastic.curriculum import FORWARD_KL, DistillationLoss
from megatron_elastic.ops.cross_entropy import cross_entropy_of_logits, cross_entropy_ref, shard_targets
from megatron_elastic.ops.divergence import divergence_of, divergence_ref
from megatron_elastic.ops.fused_head import Gradients, all_reduce, check_shapes, chunks, hand_out, logits_of

_SELECTING = 6
"""Tensors of a chunk's logits, in fp32, that are alive while the kept tokens are chosen: two of them are int64."""
_LOW = 2**32 - 1


def teacher_top_k(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The `k` most probable tokens of a teacher, and the log-probability of each and of the rest.

    Which tokens they are depends on the logits in fp32 alone: of equal ones the lower id comes first, on any number of
    shards. Without a gradient. Computed in fp32 (fp64 when `hidden` is fp64).

    Args:
        hidden: normalised hidden states `[s, b, h]`.
        weight: LM head `[V / TP, h]`.
        k: tokens to keep, at most `V`.
        temperature: of the softmax.
        group: ranks that hold the shards of the vocabulary, in rank order; None for a whole one.
        chunk_tokens: tokens per chunk; None for `default_chunk_tokens`.

    Returns:
        ids `[s, b, k]` int32, most probable first, and log-probabilities `[s, b, k + 1]`, the ghost's last; without a
        ghost, `[s, b, k]`, where `k` is the whole vocabulary.

    Raises:
        ValueError: `k` is not between 1 and the vocabulary, or `temperature` is not positive.
    """
    world = 1 if group is None else group.size()
    tokens, vocabulary = hidden.shape[:2].numel(), weight.size(0)
    if not 1 <= k <= vocabulary * world or temperature <= 0:
        raise ValueError(
            f"k is {k} and temperature {temperature}: keep between 1 and {vocabulary * world} tokens, at a temperature "
            "above 0"
        )
    compute = torch.promote_types(hidden.dtype, torch.float32)
    ghost = k < vocabulary * world
    ids = torch.empty(tokens, k, dtype=torch.int32, device=hidden.device)
    log_probs = torch.empty(tokens, k + ghost, dtype=compute, device=hidden.device)
    with torch.no_grad():
        flat = hidden.flatten(0, 1)
        for part in chunks(tokens, vocabulary, chunk_tokens, _SELECTING):
            logits = logits_of(flat[part], weight, temperature, compute)
            ids[part] = _largest(logits, k, group)
            log_probs[part], _, _ = _joined(logits, ids[part], group, ghost=ghost)
            del logits
    return ids.view(*hidden.shape[:2], k), log_probs.view(*hidden.shape[:2], k + ghost)


def top_k_kd_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    token_weights: Tensor,
    *,
    temperature: float = 1.0,
    loss: DistillationLoss = FORWARD_KL,
    labels: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """`sum_t w_t (T^2 D(teacher_t, student_t) + c CE_t)`, in nats, over the kept tokens and the ghost.

    As `kd_loss`, which has the arguments in common; the gradient is computed with the loss, which is differentiated
    once. The teacher's log-probabilities are normalised first: they may have been rounded.

    Args:
        hidden: student's normalised hidden states `[s, b, k]`.
        weight: student's LM head `[V / TP, k]`.
        ids: of `teacher_top_k`, `[s, b, kept]`, in the whole vocabulary.
        log_probs: of `teacher_top_k`, at this temperature: `[s, b, kept + 1]`, or `[s, b, V]` where all are kept.
        token_weights: loss mask `[s, b]`.
        temperature: `T`, positive.
        loss: divergence and weight of the cross entropy.
        labels: `[s, b]`; required where the cross entropy has a weight.
        group: ranks that hold the shards of the vocabulary, in rank order; None for a whole one.
        chunk_tokens: tokens per chunk; None for `default_chunk_tokens`.

    Returns:
        0-dim, the same on every rank of `group`. The gradient of `hidden` is this shard's part of a sum over `group`.

    Raises:
        ValueError: `temperature` or `chunk_tokens` is not positive, labels are missing, or the shapes do not fit each
            other.
    """
    check_shapes(hidden, weight, token_weights, chunk_tokens)
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    entries = log_probs.size(-1) - ids.size(-1)
    if ids.shape[:2] != hidden.shape[:2] or log_probs.shape[:2] != hidden.shape[:2] or entries not in (0, 1):
        raise ValueError(
            f"ids {tuple(ids.shape)} and log-probabilities {tuple(log_probs.shape)} beside {tuple(hidden.shape)}; give "
            "[s, b, k] and [s, b, k + 1] of the same tokens"
        )
    if loss.ce_weight and (labels is None or labels.shape != token_weights.shape):
        raise ValueError(
            f"ce_weight is {loss.ce_weight} and labels are {None if labels is None else tuple(labels.shape)}; give "
            f"labels {tuple(token_weights.shape)} [s, b], or a ce_weight of 0"
        )
    settings = (temperature, loss, group, chunk_tokens, torch.is_grad_enabled())
    total: Tensor = _TopKLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, ids, log_probs, token_weights, labels, settings
    )
    return total


def top_k_kd_loss_ref(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    token_weights: Tensor,
    *,
    temperature: float = 1.0,
    loss: DistillationLoss = FORWARD_KL,
    labels: Tensor | None = None,
) -> Tensor:
    """`top_k_kd_loss` with all logits at once and a whole vocabulary; shapes as there."""
    compute = torch.promote_types(hidden.dtype, torch.float32)
    student = ((hidden @ weight.t()).to(compute) / temperature).log_softmax(-1)
    student = joined_ref(student, ids)
    divergence = divergence_ref(student, log_probs.to(compute).log_softmax(-1), loss)
    total = temperature**2 * (divergence * token_weights.to(compute)).sum()
    if loss.ce_weight:
        assert labels is not None
        total = total + loss.ce_weight * cross_entropy_ref(hidden, weight, labels, token_weights)
    return total


def joined_ref(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities `[..., V]` of kept tokens `[..., k]` and, in one entry more, of all others together."""
    kept = log_probs.gather(-1, ids.long())
    if ids.size(-1) == log_probs.size(-1):
        return kept
    others = torch.ones_like(log_probs, dtype=torch.bool).scatter(-1, ids.long(), False)
    rest = log_probs.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept, rest], -1)


def _offset(logits: Tensor, group: dist.ProcessGroup | None) -> int:
    """Id of this shard's first token."""
    return logits.size(1) * (0 if group is None else dist.get_rank(group))


def _largest(logits: Tensor, k: int, group: dist.ProcessGroup | None) -> Tensor:
    """Ids of the `k` largest logits of all shards `[c, V / TP]`, largest first, of equal ones the lower id: `[c, k]`.

    Each logit and its id make one integer, so that no two are equal and the order of a sort tells nothing else.
    """
    bits = logits.float().view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # integers in the order of the numbers
    del bits
    last = _LOW - _offset(logits, group)
    keys.bitwise_left_shift_(32).add_(torch.arange(last, last - keys.size(1), -1, device=keys.device))
    found = keys.topk(min(k, keys.size(1)), -1).values
    if group is not None and group.size() > 1:
        shards = [torch.empty_like(found) for _ in range(group.size())]
        dist.all_gather(shards, found, group=group)
        found = torch.cat(shards, -1).topk(k, -1).values
    return (_LOW - (found & _LOW)).to(torch.int32)


def _joined(
    logits: Tensor, ids: Tensor, group: dist.ProcessGroup | None, *, ghost: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Log-probabilities of the kept tokens `[c, k]` and of all others together. Two collectives: maximum and sums.

    Args:
        logits: `[c, V / TP]`, overwritten: what is left are `exp(logit - maximum)`, and 0 for kept tokens.
        ids: `[c, k]`, in the whole vocabulary.
        group: ranks that hold the shards.
        ghost: whether there are others.

    Returns:
        Log-probabilities `[c, k + 1]` (`[c, k]` without a ghost); the sum of what is left in `logits`, `[c, 1]`; and,
        `[c, k]` each, the places of the kept tokens in this shard and whether they lie in it.
    """
    logits -= all_reduce(logits.amax(-1), dist.ReduceOp.MAX, group)[:, None]
    places = ids.long() - _offset(logits, group)
    here = (places >= 0) & (places < logits.size(1))
    places = places.where(here, 0)
    kept = logits.gather(-1, places).where(here, 0.0)
    logits.exp_()
    # Adding what takes a kept token to 0 leaves alone what stands at the place of one of another shard.
    logits.scatter_add_(-1, places, -logits.gather(-1, places).where(here, 0.0))
    sums = all_reduce(torch.cat([kept, logits.sum(-1, keepdim=True)], -1), dist.ReduceOp.SUM, group)
    # A rest that underflows stays above 0: its logarithm is then too large, and finite.
    kept, rest = sums[:, :-1], sums[:, -1:].clamp_min(torch.finfo(sums.dtype).tiny)
    if not ghost:
        return kept - kept.logsumexp(-1, keepdim=True), rest, (places, here)
    entries = torch.cat([kept, rest.log()], -1)
    return entries - entries.logsumexp(-1, keepdim=True), rest, (places, here)


class _TopKLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        log_probs: Tensor,
        token_weights: Tensor,
        labels: Tensor | None,
        settings: tuple[float, DistillationLoss, dist.ProcessGroup | None, int | None, bool],
    ) -> Tensor:
        temperature, loss, group, chunk_tokens, grad_enabled = settings
        compute = torch.promote_types(hidden.dtype, torch.float32)
        tokens, vocabulary = token_weights.numel(), weight.size(0)
        flat, kept, known = hidden.flatten(0, 1), ids.flatten(0, 1), log_probs.flatten(0, 1)
        weights = token_weights.flatten().to(compute)
        totals = torch.zeros(2, dtype=compute, device=hidden.device)  # of the divergence, of the cross entropy
        wanted = grad_enabled and ctx.needs_input_grad[0], grad_enabled and ctx.needs_input_grad[1]
        gradients = Gradients(hidden, weight, compute, wanted)
        divergence_and_gradient = divergence_of(loss)
        ghost = known.size(1) > kept.size(1)
        targets = shard_targets(labels, vocabulary, group) if loss.ce_weight and labels is not None else None
        # One tensor of logits is alive, two with a cross entropy: fewer than `kd_loss` has in the same chunks.
        for part in chunks(tokens, vocabulary, chunk_tokens):
            plain = None
            if targets is None:
                student = logits_of(flat[part], weight, temperature, compute)
            else:
                plain = logits_of(flat[part], weight, 1.0, compute)
                student = plain / temperature
                losses = cross_entropy_of_logits(plain, targets[part], group, gradient=any(wanted))
                totals[1] += torch.dot(losses, weights[part])
            joined, rest, (places, here) = _joined(student, kept[part], group, ghost=ghost)
            # The entries are on every rank: their divergence needs no collective. It leaves its gradient in `joined`.
            divergence, _ = divergence_and_gradient(joined, known[part].to(compute, copy=True), None, None)
            totals[0] += torch.dot(divergence, weights[part])
            if any(wanted):
                # Of the others, each has its share of the ghost's gradient.
                student *= joined[:, -1:] / rest if ghost else 0.0
                student.scatter_add_(-1, places, joined[:, : kept.size(1)].where(here, 0.0))
                if plain is not None:
                    student.add_(plain, alpha=loss.ce_weight / temperature)
                gradients.add(part, student.mul_(weights[part, None]))
            del student, plain
        gradients.finish(ctx, temperature)
        total = totals[0] * temperature**2
        return total if targets is None else total + loss.ce_weight * totals[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *hand_out(ctx, grad), None, None, None, None, None
