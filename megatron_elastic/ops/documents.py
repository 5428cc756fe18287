"""Which document every token belongs to."""

import torch
from torch import Tensor


def documents_from_cu_seqlens(cu_seqlens: Tensor, length: int) -> Tensor:
    """Document numbers from the documents' boundaries.

    Args:
        cu_seqlens: `[b, n]`, ascending; each row begins with 0, and repeats its last boundary as padding.
        length: tokens of a sequence.

    Returns:
        `[b, length]` int64, not descending along the sequence.
    """
    positions = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    ends = cu_seqlens[:, 1:].contiguous()
    return torch.searchsorted(ends, positions.expand(len(cu_seqlens), -1).contiguous(), right=True)
