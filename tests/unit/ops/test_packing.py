import pytest
import torch

from megatron_elastic.ops.packing import documents_from_cu_seqlens


@pytest.mark.parametrize(
    ("ends", "total", "expected"),
    [
        ([0, 5, 7, 11], 16, [0] * 5 + [1] * 2 + [2] * 4 + [3] * 5),
        ([0, 5, 7, 11], 11, [0] * 5 + [1] * 2 + [2] * 4),
        ([0, 4], 4, [0] * 4),
        ([0, 2, 2, 4], 4, [0, 0, 2, 2]),  # an empty document takes a number
        ([0, 3, 8], 6, [0] * 3 + [1] * 3),  # padded beyond the sequence
        ([0], 3, [0] * 3),
    ],
)
def test_ends_become_numbers_as_in_core(ends: list[int], total: int, expected: list[int]) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    found = documents_from_cu_seqlens(cu_seqlens, total)
    assert found.tolist() == [expected]
    assert found.dtype == torch.int32
    core = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, total_tokens=total).seq_idx
    assert torch.equal(found, core[:, :total])


def test_cu_seqlens_of_another_shape_are_refused() -> None:
    for shape in ((0,), (1, 3)):
        with pytest.raises(ValueError, match="cu_seqlens has the shape"):
            documents_from_cu_seqlens(torch.zeros(shape, dtype=torch.int32), 4)
