"""Documents in Megatron's terms and back."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_elastic.errors import ElasticError
from megatron_elastic.layers.packing import documents_of, documents_of_any, packed_documents

DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 3, 3, 3, 3, 3]])


def test_documents_go_through_core_unchanged() -> None:
    packed = packed_documents(DOCUMENTS)
    assert torch.equal(documents_of(packed), DOCUMENTS)
    assert torch.equal(documents_of_any(packed, 2, 6), DOCUMENTS)
    # Core makes the rotary table as long as this says.
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 6
    assert documents_of(None) is None


def test_padded_ends_come_first_as_in_core() -> None:
    ends, padded = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 6])
    found = documents_of_any(PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends), 1, 6)
    assert found.tolist() == [[0, 0, 1, 1, 1, 2]]
    found = documents_of_any(PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_q_padded=padded), 1, 6)
    assert found.tolist() == [[0, 0, 0, 1, 1, 1]]


def test_what_holds_no_documents_is_refused() -> None:
    ends = torch.tensor([0, 2, 6])
    with pytest.raises(ValueError, match="one list of cu_seqlens for 2 rows"):
        documents_of_any(PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends), 2, 6)
    with pytest.raises(ValueError, match="no list of cu_seqlens for 1 rows"):
        documents_of_any(PackedSeqParams(qkv_format="thd"), 1, 6)
    with pytest.raises(ElasticError, match="not qkv_format 'thd'"):
        documents_of(PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends))
