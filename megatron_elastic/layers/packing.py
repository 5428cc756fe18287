"""Packed documents in Megatron's terms: what core's own layers carry from the model's arguments down to the mixers."""

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_elastic.errors import ElasticError
from megatron_elastic.ops.packing import documents_from_cu_seqlens


def packed_documents(documents: Tensor) -> PackedSeqParams:
    """What `HybridModel.forward` takes on the plain stack to keep documents apart.

    Core reads `max_seqlen_q` for the rotary table, which is that of the whole sequence, and hands the rest on.

    Args:
        documents: number of each token's document, `[b, s]`, of the whole sequence.
    """
    length = documents.size(1)
    made = PackedSeqParams(qkv_format="sbhd", max_seqlen_q=length, max_seqlen_kv=length)
    made.seq_idx = documents
    return made


def documents_of(packed: PackedSeqParams | None) -> Tensor | None:
    """The documents of `packed_documents`; None for None.

    Raises:
        ElasticError: for sequences packed in core's `thd` format.
    """
    if packed is None:
        return None
    if packed.qkv_format != "sbhd" or packed.seq_idx is None:
        raise ElasticError(
            f"packed_seq_params: the local layers take documents, not qkv_format {packed.qkv_format!r}: pass "
            "megatron_elastic.layers.packing.packed_documents"
        )
    return packed.seq_idx


def documents_of_any(packed: PackedSeqParams, rows: int, tokens: int) -> Tensor:
    """The documents `[rows, tokens]` of `packed_documents`, or of core's `cu_seqlens_q` or `cu_seqlens_q_padded`.

    Args:
        packed: in either format.
        rows: of the batch; one, where there are `cu_seqlens`.
        tokens: of the whole sequence.

    Raises:
        ValueError: `cu_seqlens` for several rows, or none.
    """
    if packed.qkv_format == "sbhd" and packed.seq_idx is not None:
        return packed.seq_idx
    ends = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    if ends is None or rows != 1:
        raise ValueError(
            f"packed_seq_params: {'no' if ends is None else 'one'} list of cu_seqlens for {rows} rows; pack all "
            "sequences into one row, or pass documents"
        )
    return documents_from_cu_seqlens(ends, tokens)
