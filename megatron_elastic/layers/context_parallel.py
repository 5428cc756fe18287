"""Attention on a sequence that is split over context-parallel ranks.

Megatron cuts a sequence into `2 * CP` equal slices and gives rank `r` the slices `r` and `2 * CP - 1 - r`, so that
causal attention costs every rank the same. Mamba layers trade the sequence for heads instead: core's
`MambaContextParallel` does that.
"""

from typing import Any

import torch
from megatron.core.ssm.mamba_context_parallel import _undo_attention_load_balancing
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_elastic.ops.attention import causal_attention


def slices_of_rank(group: Any) -> tuple[int, ...]:
    """Numbers of this rank's slices in the whole sequence, in the order in which it holds them."""
    size, rank = group.size(), group.rank()
    return (0,) if size == 1 else (rank, 2 * size - 1 - rank)


def whole_sequence(local: Tensor, group: Any) -> Tensor:
    """`[s / CP, ...]` of every rank -> `[s, ...]` in the order of the text; the gradients of all ranks are summed."""
    if group.size() == 1:
        return local
    return _undo_attention_load_balancing(gather_from_sequence_parallel_region(local, group=group), group.size())


def context_parallel_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None, group: Any
) -> Tensor:
    """`causal_attention` of this rank's tokens on the whole sequence.

    Each slice attends to the keys up to its own end, so that no rank computes more than its share.

    Args:
        q: `[s / CP, b, heads, d]`.
        k, v: `[s / CP, b, groups, d]`; gathered here.
        scale: factor on the scores.
        documents: `[b, s]`, of the whole sequence in the order of the text, or None.
        group: the context-parallel ranks.

    Returns:
        `[s / CP, b, heads * d]`.
    """
    if group.size() == 1:
        return causal_attention(q, k, v, scale, documents)
    k, v = whole_sequence(torch.cat([k, v], -1), group).chunk(2, -1)
    numbers, outputs = slices_of_rank(group), []
    for number, part in zip(numbers, q.chunk(len(numbers)), strict=True):
        end = (number + 1) * part.size(0)
        seen = None if documents is None else documents[:, :end]
        outputs.append(causal_attention(part, k[:end], v[:end], scale, seen))
    return torch.cat(outputs)
