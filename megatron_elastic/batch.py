"""What a rank takes of a batch: its context-parallel slices, and the documents of the whole sequence."""

from collections.abc import Iterable, Mapping

import torch
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_elastic.ops.packing import documents_from_cu_seqlens


def rank_batch(
    batch: Mapping[str, Tensor], keys: Iterable[str], device: torch.device, cp_group: torch.distributed.ProcessGroup
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Moves a batch to the device, and cuts it.

    Args:
        batch: of the loader: `[b, s]` each; `cu_seqlens` `[b, n]` where documents are kept apart
            (`dataloader-inter-document-masking`).
        keys: what is wanted of it.
        device: of the model.
        cp_group: context-parallel group.

    Returns:
        The wanted tensors `[b, s / CP]` in Megatron's zigzag order, and the documents `[b, s]` or None. The zigzag runs
        over whole sequences, whatever documents are in them: documents are told apart by number.
    """
    documents = None
    if "cu_seqlens" in batch:
        length = batch["tokens"].size(1)
        rows = [documents_from_cu_seqlens(row, length) for row in batch["cu_seqlens"]]
        documents = torch.cat(rows).to(device, non_blocking=True)
    moved = {key: batch[key].to(device, non_blocking=True) for key in keys}
    cut: dict[str, Tensor] = get_batch_on_this_cp_rank(
        moved, is_hybrid_cp=False, cp_group=cp_group, use_per_sequence_balancing=True
    )
    return cut, documents
