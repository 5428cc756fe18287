"""Import's and export's memory: twice the largest parameter, whatever the model's size."""

import pytest

from tests.unit.peak_memory import peaks

CONSTANT = 48 << 20
"""Bytes for what does not grow with the tensors: buffers, and blocks of up to 32 MiB that the C library keeps."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    found = peaks("tests.unit.hf.memory", 24576, tmp_path_factory)
    assert found["largest"] > 90e6
    return found


@pytest.mark.parametrize("what", ["import", "export"])
def test_twice_the_largest_parameter_is_enough(measured: dict[str, int], what: str) -> None:
    assert measured[what] < 2 * measured["largest"] + CONSTANT


def test_the_whole_model_exceeds_the_bound(measured: dict[str, int]) -> None:
    assert measured["whole model"] > 2 * measured["largest"] + CONSTANT
