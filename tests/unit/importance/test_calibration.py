"""Calibration text: which windows are taken from a data set."""

import pytest
import torch

from megatron_elastic.errors import CorpusError
from megatron_elastic.importance.calibration import CalibrationText


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tokens 0..99 in documents of several lengths, an empty one among them."""
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("data") / "text"
    builder, start = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16), 0
    for length in (1, 30, 0, 7, 2, 60):
        builder.add_document(numpy.arange(start, start + length, dtype=numpy.uint16), [length])
        start += length
    builder.finalize(f"{prefix}.idx")
    return prefix


def windows(data, **settings):
    text = CalibrationText(data, **{"samples": 4, "sequence_length": 10, "vocab": 100, **settings})
    return [text.window(number).tolist() for number in range(text.samples)]


def test_windows_are_consecutive_tokens_spread_evenly(data):
    assert windows(data) == [list(range(start, start + 10)) for start in (0, 25, 50, 75)]
    # Across the ends of documents at 1, 31, 38 and 40.
    assert windows(data, samples=1, sequence_length=100) == [list(range(100))]
    assert windows(data) == windows(data)
    assert windows(data, samples=5) != windows(data)


def test_no_token_is_counted_twice_in_short_data(data):
    found = windows(data, samples=1024, sequence_length=30)
    assert found == [list(range(start, start + 30)) for start in (0, 33, 66)]


def test_batches_hold_every_window_in_order(data):
    text = CalibrationText(data, samples=5, sequence_length=6, vocab=100)
    batches = [text.tokens(batch) for batch in text.batches(2)]
    assert sorted(tuple(batch.shape) for batch in batches) == [(1, 6), (2, 6), (2, 6)]
    assert batches[0].dtype == torch.int64
    assert torch.cat(batches).tolist() == [text.window(number).tolist() for number in range(5)]


@pytest.mark.parametrize("samples", range(1, 17))
@pytest.mark.parametrize("size", [1, 2, 3, 20])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_share_the_windows_in_equally_many_batches(data, samples, size, ranks):
    text = CalibrationText(data, samples=samples, sequence_length=6, vocab=100)
    if samples < ranks:
        with pytest.raises(CorpusError, match=f"{samples} calibration samples for {ranks} data-parallel ranks"):
            text.batches(size, 0, ranks)
        return
    dealt = [text.batches(size, rank, ranks) for rank in range(ranks)]
    assert [number for mine in dealt for batch in mine for number in batch] == list(range(samples))
    assert len({len(mine) for mine in dealt}) == 1
    sizes = [len(batch) for mine in dealt for batch in mine]
    assert min(sizes) >= 1
    assert max(sizes) <= size + (samples % ranks > 0)


def test_unusable_data_is_refused(data, tmp_path):
    with pytest.raises(CorpusError, match=r"no \.bin and \.idx"):
        windows(tmp_path / "nothing")
    with pytest.raises(CorpusError, match="100 tokens, one calibration sample needs 101"):
        windows(data, sequence_length=101)
    with pytest.raises(CorpusError, match="token 59, the vocabulary is 50"):
        windows(data, vocab=50)
