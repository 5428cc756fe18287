"""State space duality scan of Mamba-2: in plain torch on any device, by mamba-ssm's kernels on a GPU that has them.

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6 and listing 1 (the chunked algorithm).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_elastic.ops import kernels
from megatron_elastic.ops.packing import check_documents


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_size: int = 32,
    documents: Tensor | None = None,
) -> Tensor:
    """Scan `S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T`, `y_t = C_t S_t + D x_t`, chunk by chunk.

    The state is zero before the first token of every document.  Head `i` uses group `i // (h / g)`.  Computed in fp32
    (fp64 when `x` is fp64); the cost is `l * chunk_size + (l / chunk_size)^2` per head, so `chunk_size` should grow
    with the root of very long sequences.  On a GPU mamba-ssm's kernels run it, in chunks of their own, where
    `kernels.scan_kernel` has them.

    Args:
        x: input `[b, l, h, p]`.
        dt: step sizes after softplus, `[b, l, h]`, positive.
        A: decay rates `[h]`, negative.
        B: input projections `[b, l, g, n]`.
        C: output projections `[b, l, g, n]`.
        D: skip weights `[h]`.
        chunk_size: tokens per chunk; any positive number, the result does not depend on it but for rounding.
        documents: number of each token's document, `[b, l]`, not decreasing along `l`; None for one document.

    Returns:
        `y`, `[b, l, h, p]` in the dtype of `x`.

    Raises:
        ValueError: `chunk_size` is not positive, `h` is not a multiple of `g`, or `documents` is not `[b, l]`.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    if x.size(2) % B.size(2):
        raise ValueError(f"{x.size(2)} heads do not divide over {B.size(2)} groups; use a multiple of the groups")
    check_documents(documents, x.size(0), x.size(1))
    kernel = kernels.scan_kernel(x)
    if kernel is not None:
        numbers = None if documents is None else documents.to(torch.int32)
        scanned: Tensor = kernel(x, dt, A, B, C, kernels.SCAN_CHUNK, D=D, seq_idx=numbers)
        return scanned
    y: Tensor = _ChunkedScan.apply(x, dt, A, B, C, D, chunk_size, documents)  # type: ignore[no-untyped-call]
    return y


def ssd_ref(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, documents: Tensor | None = None
) -> Tensor:
    """The recurrence of `ssd`, one token at a time; shapes as there."""
    b, length, h, p = x.shape
    repeat = h // B.size(2)
    compute = torch.promote_types(x.dtype, torch.float32)
    xs, dts, decay = x.to(compute), dt.to(compute), A.to(compute)
    state, outputs = xs.new_zeros(b, h, p, B.size(3)), []
    for t in range(length):
        b_t = B[:, t].to(compute).repeat_interleave(repeat, 1)
        c_t = C[:, t].to(compute).repeat_interleave(repeat, 1)
        if documents is not None and t:
            state = torch.where((documents[:, t] == documents[:, t - 1])[:, None, None, None], state, 0.0)
        step = torch.einsum("bhp,bhn->bhpn", xs[:, t] * dts[:, t, :, None], b_t)
        state = state * (dts[:, t] * decay).exp()[..., None, None] + step
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, c_t))
    return (torch.stack(outputs, 1) + xs * D.to(compute)[:, None]).to(x.dtype)


def _heads_first(t: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """`[b, l, h, ...]` to contiguous `[b, h, c, chunk, ...]`, zero-padded at the end of the sequence."""
    pad = -t.size(1) % chunk
    if pad:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad))
    t = t.transpose(1, 2).to(dtype).contiguous()
    return t.view(t.size(0), t.size(1), -1, chunk, *t.shape[3:])


def _sequence_first(t: Tensor, length: int) -> Tensor:
    """`[b, h, c, chunk, ...]` to a view `[b, l, h, ...]` without the padding."""
    return t.flatten(2, 3)[:, :, :length].transpose(1, 2)


def _chunk_decay(total: Tensor) -> Tensor:
    """Decay `[b, h, c, c]` from the end of chunk `j` to the start of chunk `i` (0 unless `j < i`).

    `total`: log decay over each chunk, `[b, h, c]`.  The log decays are summed from `j` on rather than subtracted as
    two long prefix sums, which would cancel on long sequences.
    """
    c = total.size(2)
    later = torch.ones(c, c, dtype=torch.bool, device=total.device).tril(-1)
    log = torch.where(later, total[..., None], 0.0).cumsum(2)
    reached = torch.ones_like(later).tril()
    return F.pad(log.masked_fill(~reached, -torch.inf).exp()[:, :, :-1], (0, 0, 1, 0))


class _DocumentMasks(NamedTuple):
    """1 where two places of a chunked scan lie in one document, else 0.

    Attributes:
        within: token `i` and a token `j` of its chunk that is not later, `[b, 1, c, q, q]`.
        entering: token `i` and the state that enters its chunk, `[b, 1, c, q]`.
        leaving: token `i` and the state that leaves its chunk, `[b, 1, c, q]`.
        carry: the state that enters chunk `i` and the one that leaves chunk `j`, `[b, 1, c, c]`.
    """

    within: Tensor
    entering: Tensor
    leaving: Tensor
    carry: Tensor


def _document_masks(documents: Tensor, chunk: int, dtype: torch.dtype) -> _DocumentMasks:
    """The masks of `documents`, `[b, l]`: they do not decrease, so two of one number have no boundary between them."""
    # The padding at the end goes to the last document: its steps are 0.
    padding = documents[:, -1:].expand(-1, -documents.size(1) % chunk)
    numbers = torch.cat([documents, padding], 1).view(documents.size(0), 1, -1, chunk)
    leaving = numbers[..., -1]
    entering = torch.cat([numbers[..., 0, 0, None], leaving[..., :-1]], -1)
    return _DocumentMasks(
        (numbers[..., :, None] == numbers[..., None, :]).tril().to(dtype),
        (numbers == entering[..., None]).to(dtype),
        (numbers == leaving[..., None]).to(dtype),
        (entering[..., :, None] == leaving[..., None, :]).to(dtype),
    )


class _ChunkedScan(torch.autograd.Function):
    """The scan with its backward written out.

    In `[b, h, c, q, ...]` layout every product is one batched GEMM on contiguous matrices, `C B^T` is taken once per
    group, and the recurrence over chunks is one GEMM with a `[c, c]` decay matrix.  `dt_j` is folded into the decay
    from `j` on.  The gradient of the log decay needs no `[q, q]` reduction: `y_t` is proportional to `exp(cum_t)` and
    what `x_t` adds to `exp(-cum_t)`, so it is `<dy_t, y_t> - <dx_t, x_t>` (both without the skip, whose terms cancel)
    summed from `t` to the chunk's end, plus `<dS, S>` of the state that leaves the chunk.  Documents cut the decays,
    which leaves these proportions as they are, and both sums end where the document does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        chunk_size: int,
        documents: Tensor | None,
    ) -> Tensor:
        compute = torch.promote_types(x.dtype, torch.float32)
        length = x.size(1)
        q = min(chunk_size, length)
        xs, steps = _heads_first(x, q, compute), _heads_first(dt, q, compute)
        Bs, Cs = _heads_first(B, q, compute), _heads_first(C, q, compute)
        b, h, c, _, p = xs.shape
        g, n = Bs.size(1), Bs.size(4)
        shape = (b, g, h // g, c, q)
        log = steps * A.to(compute)[:, None, None]
        masks = None if documents is None else _document_masks(documents, q, compute)
        # Summed from the document's start, not subtracted: what another document decays by is no rounding of this one.
        cum = log.cumsum(-1) if masks is None else (masks.within @ log[..., None]).squeeze(-1)
        # Above the diagonal and between documents the log decay may be positive: it is cut to 0 before exp, and the
        # result is not used.
        decay = (cum[..., :, None] - cum[..., None, :]).clamp_max_(0).exp_()
        decay = decay.mul_(steps[..., None, :])
        scores = (Cs @ Bs.mT).tril_()[:, :, None]
        from_start, to_end = cum.exp(), (cum[..., -1:] - cum).clamp_max_(0).exp_() * steps
        carry = _chunk_decay(cum[..., -1])
        if masks is not None:
            decay, from_start, to_end = decay * masks.within, from_start * masks.entering, to_end * masks.leaving
            carry = carry * masks.carry
        decay, carry = decay.view(*shape, q), carry.view(-1, c, c)
        from_start, to_end = from_start.view(*shape, 1), to_end.view(*shape, 1)
        B_end, C_start = (Bs[:, :, None] * to_end).view(-1, q, n), (Cs[:, :, None] * from_start).view(-1, q, n)
        rows = xs.view(-1, q, p)
        added = torch.bmm(B_end.mT, rows)
        state = torch.bmm(carry, added.view(b * h, c, n * p)).view(-1, n, p)
        mixing = (scores * decay).view(b, h, c, q, q)
        mixing.diagonal(dim1=-2, dim2=-1).add_(D.to(compute)[:, None, None])
        y = torch.bmm(mixing.view(-1, q, q), rows).baddbmm_(C_start, state)
        ctx.save_for_backward(xs, steps, A, Bs, Cs, D, y, state, carry, decay, scores, from_start, to_end,
                              None if masks is None else masks.within)  # fmt: skip
        ctx.sizes, ctx.dtypes = (b, length, g, h, c, q, n, p), (x.dtype, dt.dtype, B.dtype, C.dtype)
        return _sequence_first(y.view_as(xs), length).to(x.dtype, memory_format=torch.contiguous_format, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        xs, steps, A, Bs, Cs, D, y, state, carry, decay, scores, from_start, to_end, within = ctx.saved_tensors
        b, length, g, h, c, q, n, p = ctx.sizes
        shape = (b, g, h // g, c, q)
        dys = _heads_first(grad, q, xs.dtype)
        dy, rows = dys.view(-1, q, p), xs.view(-1, q, p)
        # The state, from the chunks that read it back to those that fed it.
        B_end, C_start = (Bs[:, :, None] * to_end).view(-1, q, n), (Cs[:, :, None] * from_start).view(-1, q, n)
        d_read = torch.bmm(C_start.mT, dy)
        d_state = torch.bmm(carry.mT, d_read.view(b * h, c, n * p)).view(-1, n, p)
        dC = torch.bmm(dy, state.mT).view(*shape, n).mul_(from_start).sum(2)
        dB = torch.bmm(rows, d_state.mT).view(*shape, n).mul_(to_end).sum(2)
        # Inside a chunk.
        square = torch.bmm(dy, rows.mT)
        d_scores = square.view(*shape, q).mul_(decay).sum(2).tril_()
        dC += d_scores @ Bs
        dB += d_scores.mT @ Cs
        mixing = torch.mul(scores, decay, out=square.view(*shape, q)).view(-1, q, q)
        dx = torch.bmm(mixing.mT, dy).baddbmm_(B_end, d_state)
        # The log decay and what it is made of; `product` is one buffer for the three sums over channels.
        ones, skip, product = rows.new_ones(p), D.to(xs.dtype)[:, None, None], rows * dx
        x_dx = torch.mv(product.view(-1, p), ones).view_as(steps)
        x_dy = torch.mv(torch.mul(rows, dy, out=product).view(-1, p), ones).view_as(steps)
        y_dy = torch.mv(torch.mul(y, dy, out=product).view(-1, p), ones).view_as(steps)
        d_cum = (y_dy - x_dx).addcmul_(x_dy, skip, value=-1)
        kept, d_kept = state.view(b, h, c, -1)[:, :, 1:], d_state.view(b, h, c, -1)[:, :, :-1]
        d_cum[:, :, :-1, -1] += (kept * d_kept).sum(-1)
        d_log = d_cum.flip(-1).cumsum(-1).flip(-1) if within is None else (within.mT @ d_cum[..., None]).squeeze(-1)
        d_dt = (x_dx / steps.clamp_min(torch.finfo(steps.dtype).tiny)).addcmul_(d_log, A.to(xs.dtype)[:, None, None])
        dA = (d_log * steps).sum((0, 2, 3)).to(A.dtype)
        dD = x_dy.sum((0, 2, 3)).to(D.dtype)
        dx = dx.view_as(xs).add_(torch.mul(dys, skip[..., None], out=product.view_as(dys)))
        x_type, dt_type, B_type, C_type = ctx.dtypes
        return (
            _sequence_first(dx, length).to(x_type), _sequence_first(d_dt, length).to(dt_type), dA,
            _sequence_first(dB, length).to(B_type), _sequence_first(dC, length).to(C_type), dD, None, None,
        )  # fmt: skip
