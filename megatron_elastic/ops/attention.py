"""Causal attention with grouped key and value heads, inside documents."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_elastic.ops.packing import check_documents


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None = None) -> Tensor:
    """`softmax(scale * q k^T) v` over the tokens up to each one; query head `i` reads group `i // (heads / groups)`.

    The queries are the last `n` of the `s` tokens, so that a slice of a sequence can be run against all before it.

    Args:
        q: `[n, b, heads, d]`.
        k: `[s, b, groups, d]`.
        v: `[s, b, groups, d]`.
        scale: factor on the scores.
        documents: number of each key's document, `[b, s]`, not decreasing along `s`: a token sees its own document
            alone. None for one document.

    Returns:
        `[n, b, heads * d]`.

    Raises:
        ValueError: `heads` is not a multiple of `groups`, there are more queries than keys, or `documents` is not
            `[b, s]`.
    """
    _check(q, k, documents)
    queries, keys = q.size(0), k.size(0)
    visible = None
    if documents is not None or queries < keys:
        visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)[None]
        if documents is not None:
            visible = visible & (documents[:, keys - queries :, None] == documents[:, None])
        visible = visible[:, None]
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=visible is None, scale=scale, enable_gqa=True
    )
    return out.permute(2, 0, 1, 3).flatten(2)


def causal_attention_ref(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None = None) -> Tensor:
    """`causal_attention` one token and row of the batch at a time, the scores written out; shapes as there."""
    _check(q, k, documents)
    repeat = q.size(2) // k.size(2)
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    rows = []
    for row in range(q.size(1)):
        tokens = []
        for number, token in enumerate(q[:, row], start=k.size(0) - q.size(0)):
            first = 0
            if documents is not None:
                first = int((documents[row] == documents[row, number]).nonzero()[0])
            seen = slice(first, number + 1)
            weights = (torch.einsum("hd,jhd->hj", token, k[seen, row]) * scale).softmax(-1)
            tokens.append(torch.einsum("hj,jhd->hd", weights, v[seen, row]).flatten())
        rows.append(torch.stack(tokens))
    return torch.stack(rows, 1)


def _check(q: Tensor, k: Tensor, documents: Tensor | None) -> None:
    check_documents(documents, k.size(1), k.size(0))
    if q.size(0) > k.size(0):
        raise ValueError(f"{q.size(0)} queries for {k.size(0)} keys; the queries are the last of the keys' tokens")
    if q.size(2) % k.size(2):
        raise ValueError(
            f"{q.size(2)} query heads do not divide over {k.size(2)} key groups; use a multiple of the groups"
        )
