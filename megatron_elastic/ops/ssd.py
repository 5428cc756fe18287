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
    (fp64 when `x` is fp64); the cost of a head is `l * chunk_size` inside chunks and `l / chunk_size` states.  On a GPU
    mamba-ssm's kernels run it, in chunks of their own, where `kernels.scan_kernel` has them.

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


_BLOCK_BYTES = 1 << 20
"""Bytes of the largest tensor of a block of chunks on the CPU: what is made of it stays in the cache."""


def _chunked(t: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """`[b, l, h, ...]` to `[c, b, h, chunk, ...]`, zero-padded at the end; a view where nothing is padded or cast."""
    pad = -t.size(1) % chunk
    if pad:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad))
    return t.to(dtype).view(t.size(0), -1, chunk, *t.shape[2:]).movedim(0, 1).transpose(2, 3)


def _sequence(t: Tensor, length: int) -> Tensor:
    """`[c, b, h, chunk, ...]` to `[b, l, h, ...]` without the padding: what `_chunked` made of it."""
    return t.transpose(2, 3).movedim(1, 0).flatten(1, 2)[:, :length]


class _DocumentMasks(NamedTuple):
    """1 where two places of a chunked scan lie in one document, else 0.

    Attributes:
        within: token `i` and a token `j` of its chunk that is not later, `[c, b, 1, q, q]`.
        entering: token `i` and the state that enters its chunk, `[c, b, 1, q]`.
        leaving: token `i` and the state that leaves its chunk, `[c, b, 1, q]`.
        through: the states that enter and leave a chunk, `[c, b, 1]`.
    """

    within: Tensor
    entering: Tensor
    leaving: Tensor
    through: Tensor


def _document_masks(documents: Tensor, chunk: int, dtype: torch.dtype) -> _DocumentMasks:
    """The masks of `documents`, `[b, l]`: they do not decrease, so two of one number have no boundary between them."""
    # The padding at the end goes to the last document: its steps are 0.
    padding = documents[:, -1:].expand(-1, -documents.size(1) % chunk)
    numbers = torch.cat([documents, padding], 1).view(documents.size(0), -1, 1, chunk).movedim(0, 1)
    leaving = numbers[..., -1]
    entering = torch.cat([numbers[:1, ..., 0], leaving[:-1]])
    return _DocumentMasks(
        (numbers[..., :, None] == numbers[..., None, :]).tril().to(dtype),
        (numbers == entering[..., None]).to(dtype),
        (numbers == leaving[..., None]).to(dtype),
        (entering == leaving).to(dtype),
    )


class _Decays(NamedTuple):
    """What a token's contribution is multiplied by on its way; `dt` of the token that it comes from is part of it.

    Attributes:
        cum: logarithm of the decay from the start of the chunk, or of the document inside it, `[c, b, h, q]`.
        steps: `dt`, `[c, b, h, q]`.
        from_start: of the state that enters the chunk, at each token, `[c, b, h, q]`.
        to_end: of each token's contribution, in the state that leaves the chunk, `[c, b, h, q]`.
        through: of the state over the whole chunk, `[c, b, h]`.
        within: documents, see `_DocumentMasks`; None for one.
    """

    cum: Tensor
    steps: Tensor
    from_start: Tensor
    to_end: Tensor
    through: Tensor
    within: Tensor | None

    @staticmethod
    def of(steps: Tensor, A: Tensor, documents: Tensor | None) -> "_Decays":
        """From `dt` in chunks, `A` `[h]`, and the documents `[b, l]`."""
        log = steps * A[:, None]
        if documents is None:
            cum, masks = log.cumsum(-1), None
        else:
            masks = _document_masks(documents, steps.size(-1), steps.dtype)
            # Summed from the document's start, not subtracted: what another one decays by is no rounding of this one.
            cum = (masks.within @ log[..., None]).squeeze(-1)
        from_start, to_end = cum.exp(), (cum[..., -1:] - cum).clamp_max_(0).exp_() * steps
        through = from_start[..., -1]
        if masks is None:
            return _Decays(cum, steps, from_start, to_end, through, None)
        return _Decays(cum, steps, from_start * masks.entering, to_end * masks.leaving, through * masks.through,
                       masks.within)  # fmt: skip

    def inside(self, block: slice, out: Tensor) -> Tensor:
        """From token `j` to token `i` of each chunk in a block, `[m, b, h, q, q]`; above the diagonal no number."""
        cum = self.cum[block]
        # There, and between documents, the logarithm may be positive: it is cut to 0, and the result is not used.
        torch.sub(cum[..., :, None], cum[..., None, :], out=out)
        return out.clamp_max_(0).exp_().mul_(self.steps[block][..., None, :])

    def masked(self, scores: Tensor, block: slice) -> Tensor:
        """`[m, b, g, q, q]` in place, without the tokens that are later or in another document."""
        return scores.tril_() if self.within is None else scores.mul_(self.within[block])


class _Sizes(NamedTuple):
    """Batch, groups, heads of each, tokens of a chunk, channels of a head, states; and chunks of a block."""

    b: int
    g: int
    r: int
    q: int
    p: int
    n: int
    block: int

    @staticmethod
    def of(xs: Tensor, Bs: Tensor) -> "_Sizes":
        """Of chunked `x` and `B`."""
        c, b, h, q, p = xs.shape
        g, n = Bs.size(2), Bs.size(4)
        block = max(1, _BLOCK_BYTES // (b * h * q * max(p, q) * xs.element_size())) if xs.device.type == "cpu" else c
        return _Sizes(b, g, h // g, q, p, n, min(block, c))

    def blocks(self, chunks: int) -> list[slice]:
        """The chunks in order, some at a time."""
        return [slice(start, min(start + self.block, chunks)) for start in range(0, chunks, self.block)]

    def grouped(self, t: Tensor) -> Tensor:
        """`[m, b, h, q, ...]` as `[m, b, g, q, r, ...]`: a group's heads side by side."""
        return self.split(t).transpose(3, 4)

    def scaled(self, t: Tensor, by: Tensor) -> Tensor:
        """`t` `[m, b, h, q, p]` times `by` `[m, b, h, q]`, as matrices of the groups `[m * b * g, q, r * p]`."""
        out = t.new_empty(len(t), self.b, self.g, self.q, self.r, self.p)
        return torch.mul(self.grouped(t), self.grouped(by)[..., None], out=out).view(-1, self.q, self.r * self.p)

    def heads(self, t: Tensor) -> Tensor:
        """`[m, b, h, q, ...]` as matrices of the heads."""
        return t.view(-1, self.q, t.size(-1))

    def states(self, t: Tensor) -> Tensor:
        """Matrices of the groups, `[..., n, r * p]`, as `[m, b, g, n, r, p]`."""
        return t.view(-1, self.b, self.g, self.n, self.r, self.p)

    def split(self, t: Tensor) -> Tensor:
        """`[m, b, h, ...]` as `[m, b, g, r, ...]`: a view."""
        return t.view(len(t), self.b, self.g, self.r, *t.shape[3:])

    def rows(self, t: Tensor) -> Tensor:
        """Matrices of the groups, `[m * b * g, q, r * p]`, as `[m, b, g, r, q, p]`: a view."""
        return t.view(-1, self.b, self.g, self.q, self.r, self.p).transpose(3, 4)


class _ChunkedScan(torch.autograd.Function):
    """The scan with its backward written out.

    The heads of a group share `B` and `C`: their states are one matrix `[n, r * p]`, and what goes into them and comes
    out of them is one GEMM for all of them.  The sum over heads in the gradients of `B` and `C` is inside these GEMMs.
    Some chunks are run at a time, so that what they need stays in the cache; `dt_j` is folded into the decay from `j`
    on.  The gradient of the log decay needs no `[q, q]` reduction: `y_t` is proportional to `exp(cum_t)` and what `x_t`
    adds to `exp(-cum_t)`, so it is `<dy_t, y_t> - <dx_t, x_t>` (both without the skip, whose terms cancel) summed from
    `t` to the chunk's end, plus `<dS, S>` of the state that leaves the chunk.  Documents cut the decays, which leaves
    these proportions as they are, and both sums end where the document does.
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
        xs, steps, Bs, Cs = (_chunked(each, q, compute).contiguous() for each in (x, dt, B, C))
        decays = _Decays.of(steps, A.to(compute), documents)
        size, skip = _Sizes.of(xs, Bs), D.to(compute)
        chunks = len(xs)
        through = size.grouped(decays.through[..., None, None])
        y = xs.new_empty(size.b, chunks * q, size.g * size.r, size.p)
        ys = _chunked(y, q, compute)
        # Of each chunk that which enters it, `[c, b, g, n, r, p]`.
        state = xs.new_empty(chunks, size.b, size.g, size.n, size.r, size.p)
        state[0] = 0
        decay = xs.new_empty(*decays.cum.shape, q)
        for block in size.blocks(chunks):
            rows, to, of = xs[block], Bs[block].flatten(0, 2), Cs[block].flatten(0, 2)
            added = size.states(torch.bmm(to.mT, size.scaled(rows, decays.to_end[block])))
            for number in range(block.start + 1, min(block.stop + 1, chunks)):
                before = number - 1
                torch.addcmul(added[before - block.start], state[before], through[before], out=state[number])
            scores = decays.masked(torch.bmm(of, to.mT).view(-1, size.b, size.g, q, q), block)
            mixing = size.split(decays.inside(block, decay[block])) * scores[:, :, :, None]
            mixing.diagonal(dim1=-2, dim2=-1).add_(skip.view(size.g, size.r, 1))
            inside = size.split(torch.bmm(size.heads(mixing), size.heads(rows)).view(rows.shape))
            read = size.rows(torch.bmm(of, state[block].view(-1, size.n, size.r * size.p)))
            torch.addcmul(inside, read, size.split(decays.from_start[block])[..., None], out=size.split(ys[block]))
        out = y[:, :length].to(x.dtype)
        # What goes out is kept itself where nothing was cast.
        kept = out if out.dtype == compute else y[:, :length]
        ctx.save_for_backward(xs, A, Bs, Cs, D, kept, state, decay, *decays)
        ctx.dtypes = x.dtype, dt.dtype, B.dtype, C.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        xs, A, Bs, Cs, D, kept, state, decay, *decays = ctx.saved_tensors
        decays = _Decays(*decays)
        compute, length, (_, _, _, q, n) = Bs.dtype, grad.size(1), Bs.shape
        ys, dys = _chunked(kept, q, compute), _chunked(grad, q, compute).contiguous()
        size, skip = _Sizes.of(xs, Bs), D.to(compute)
        chunks = len(xs)
        through = size.grouped(decays.through[..., None, None])
        d_x = xs.new_empty(size.b, chunks * q, size.g * size.r, size.p)
        d_xs, d_Bs, d_Cs = _chunked(d_x, q, compute), torch.empty_like(Bs), torch.empty_like(Cs)
        x_dx, x_dy, y_dy, s_ds = (torch.zeros_like(decays.steps) for _ in range(4))
        ones = xs.new_ones(size.p)
        # Of the state that leaves a chunk: from the chunks that read it back to those that fed it.
        d_state = xs.new_empty(size.block, *state.shape[1:])
        after = torch.zeros_like(state[0])
        for block in reversed(size.blocks(chunks)):
            rows, d_rows, to, of = xs[block], dys[block], Bs[block].flatten(0, 2), Cs[block].flatten(0, 2)
            entering = state[block].view(-1, n, size.r * size.p)
            scaled = size.scaled(d_rows, decays.from_start[block])
            d_read = size.states(torch.bmm(of.mT, scaled))
            for number in range(block.stop - 1, block.start - 1, -1):
                d_state[number - block.start] = after
                after = torch.addcmul(d_read[number - block.start], after, through[number])
            left = state[block.start + 1 : block.stop + 1]
            s_ds[block][: len(left), ..., -1] = (left * d_state[: len(left)]).sum((-3, -1)).flatten(2)
            leaving = d_state[: block.stop - block.start].view(-1, n, size.r * size.p)
            d_of = torch.bmm(scaled, entering.mT)
            d_to = torch.bmm(size.scaled(rows, decays.to_end[block]), leaving.mT)
            d_added = size.rows(torch.bmm(to, leaving))
            # Inside a chunk.
            heads, d_heads = size.heads(rows), size.heads(d_rows)
            square = torch.bmm(d_heads, heads.mT).view_as(decay[block])
            x_dy[block] = square.diagonal(dim1=-2, dim2=-1)
            d_scores = size.split(square.mul_(decay[block])).sum(3)
            d_scores = decays.masked(d_scores, block).flatten(0, 2)
            torch.baddbmm(d_of, d_scores, to, out=d_Cs[block].view_as(of))
            torch.baddbmm(d_to, d_scores.mT, of, out=d_Bs[block].view_as(to))
            scores = decays.masked(torch.bmm(of, to.mT).view(-1, size.b, size.g, q, q), block)
            torch.mul(size.split(decay[block]), scores[:, :, :, None], out=size.split(square))
            d_inside = torch.bmm(size.heads(square).mT, d_heads).view(rows.shape)
            size.split(d_inside).addcmul_(d_added, size.split(decays.to_end[block])[..., None])
            # The log decay and what it is made of.
            product = d_inside * rows
            x_dx[block] = torch.mv(product.view(-1, size.p), ones).view_as(x_dx[block])
            torch.mul(ys[block], d_rows, out=product)
            y_dy[block] = torch.mv(product.view(-1, size.p), ones).view_as(y_dy[block])
            torch.addcmul(d_inside, d_rows, skip[:, None, None], out=d_xs[block])
        d_cum = (y_dy - x_dx).addcmul_(x_dy, skip[:, None], value=-1).add_(s_ds)
        if decays.within is None:
            d_log = d_cum.flip(-1).cumsum(-1).flip(-1)
        else:
            d_log = (decays.within.mT @ d_cum[..., None]).squeeze(-1)
        d_dt = (x_dx / decays.steps.clamp_min(torch.finfo(compute).tiny)).addcmul_(d_log, A.to(compute)[:, None])
        d_A = (d_log * decays.steps).sum((0, 1, 3)).to(A.dtype)
        d_D = x_dy.sum((0, 1, 3)).to(D.dtype)
        x_type, dt_type, B_type, C_type = ctx.dtypes
        return (
            d_x[:, :length].to(x_type), _sequence(d_dt, length).to(dt_type), d_A,
            _sequence(d_Bs, length).to(B_type), _sequence(d_Cs, length).to(C_type), d_D, None, None,
        )  # fmt: skip
