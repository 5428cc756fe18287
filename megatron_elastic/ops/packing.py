"""Documents that are packed into one sequence: the number of every token's document."""

import torch
from torch import Tensor


def documents_from_cu_seqlens(cu_seqlens: Tensor, total_tokens: int) -> Tensor:
    """Document numbers from the starts of the documents.

    Args:
        cu_seqlens: `[documents + 1]`, 0 and the end of each document, not decreasing.
        total_tokens: of the whole sequence; tokens after the last end make a document of their own.

    Returns:
        `[1, total_tokens]` int32.

    Raises:
        ValueError: `cu_seqlens` is not one dimension of at least one entry.
    """
    if cu_seqlens.dim() != 1 or not cu_seqlens.numel():
        raise ValueError(f"cu_seqlens has the shape {list(cu_seqlens.shape)}; give [documents + 1]: 0 and every end")
    tokens = torch.arange(total_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)[None].to(torch.int32)


def check_documents(documents: Tensor | None, batch: int, length: int) -> None:
    """Refuses document numbers of another shape than the tokens (that they do not decrease is the caller's matter).

    Raises:
        ValueError: they are not `[batch, length]`.
    """
    if documents is not None and documents.shape != (batch, length):
        raise ValueError(
            f"documents has the shape {list(documents.shape)} for a batch of {batch} x {length} tokens; give one "
            "number for every token of the whole sequence"
        )
