"""Causal attention with grouped key and value heads."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`softmax(scale * q k^T) v` over the tokens up to each one; query head `i` reads group `i // (heads / groups)`.

    Args:
        q: `[s, b, heads, d]`.
        k: `[s, b, groups, d]`.
        v: `[s, b, groups, d]`.
        scale: factor on the scores.

    Returns:
        `[s, b, heads * d]`.

    Raises:
        ValueError: `heads` is not a multiple of `groups`.
    """
    _check_heads(q, k)
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.permute(2, 0, 1, 3).flatten(2)


def causal_attention_ref(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`causal_attention` with the scores written out; shapes as there."""
    _check_heads(q, k)
    repeat = q.size(2) // k.size(2)
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    scores = torch.einsum("ibhd,jbhd->bhij", q, k) * scale
    future = torch.ones(q.size(0), k.size(0), dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("bhij,jbhd->ibhd", weights, v).flatten(2)


def _check_heads(q: Tensor, k: Tensor) -> None:
    if q.size(2) % k.size(2):
        raise ValueError(
            f"{q.size(2)} query heads do not divide over {k.size(2)} key groups; use a multiple of the groups"
        )
