"""Extraction's and sorting's memory: twice the largest stored tensor, whatever the model's size."""

import pytest

from tests.unit.peak_memory import peaks

CONSTANT = 32 << 20
"""Bytes for what does not grow with the tensors: blocks that are copied at once, buffers, what the allocator keeps."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    # Two of its four largest tensors are parts of one parameter, 105 MB each.
    found = peaks("tests.unit.extraction_memory", 51200, tmp_path_factory)
    assert found["largest"] > 100e6
    return found


@pytest.mark.parametrize("what", ["half of 1", "half of 2", "sorted"])
def test_twice_the_largest_tensor_is_enough(measured: dict[str, int], what: str) -> None:
    assert measured[what] < 2 * measured["largest"] + CONSTANT


@pytest.mark.parametrize("what", ["joined parameter", "whole model"])
def test_more_at_once_exceeds_the_bound(measured: dict[str, int], what: str) -> None:
    assert measured[what] > 2 * measured["largest"] + CONSTANT
