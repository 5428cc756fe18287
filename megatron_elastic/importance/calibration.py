"""Calibration text: windows spread evenly over a data set, the same ones every time."""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_elastic.errors import CorpusError


class CalibrationText:
    """Windows of consecutive tokens, their starts spread evenly over the whole data; none overlaps another."""

    def __init__(self, prefix: str | Path, *, samples: int, sequence_length: int, vocab: int) -> None:
        """Opens the data set.

        Args:
            prefix: of the `.bin` and `.idx` files.
            samples: windows wanted; there are fewer where the data is shorter.
            sequence_length: tokens of each.
            vocab: of the model that will read them.

        Raises:
            CorpusError: there is no data set, it is shorter than one window, or was made for a larger vocabulary.
        """
        import numpy
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        if not IndexedDataset.exists(str(prefix)):
            raise CorpusError(f"data set {prefix}: no .bin and .idx of it; `megatron-elastic corpus` makes them")
        self.prefix, self.sequence_length, self.vocab = str(prefix), sequence_length, vocab
        self._data: Any = IndexedDataset(str(prefix))
        self._ends = numpy.cumsum(self._data.sequence_lengths, dtype=numpy.int64)
        tokens = int(self._ends[-1]) if len(self._ends) else 0
        if tokens < sequence_length or sequence_length < 1:
            raise CorpusError(
                f"data set {prefix}: {tokens} tokens, one calibration sample needs {sequence_length}: give more text "
                "or a shorter calibration.sequence_length (1 or more)"
            )
        self.samples = min(samples, tokens // sequence_length)
        self._stride = tokens // max(1, self.samples)

    def window(self, number: int) -> Tensor:
        """Tokens of one sample, `[s]` int64, across document ends."""
        import numpy

        start, wanted = number * self._stride, self.sequence_length
        document = int(numpy.searchsorted(self._ends, start, side="right"))
        pieces = []
        while wanted:
            first = int(self._ends[document - 1]) if document else 0
            take = min(wanted, int(self._ends[document]) - start)
            if take:
                pieces.append(self._data.get(document, offset=start - first, length=take))
            start, wanted, document = start + take, wanted - take, document + 1
        tokens = torch.from_numpy(numpy.concatenate(pieces).astype(numpy.int64))
        if int(tokens.max()) >= self.vocab:
            raise CorpusError(
                f"data set {self.prefix}: token {int(tokens.max())}, the vocabulary is {self.vocab}: encode the "
                "text with the model's tokenizer"
            )
        return tokens

    def batches(self, size: int, rank: int = 0, ranks: int = 1) -> list[range]:
        """Numbers of the samples of each batch of a data-parallel rank, in the order of the data.

        Ranks get samples in equal numbers, or one more, and equally many batches: with expert parallelism they run
        every layer together. The batches of a rank are of nearly equal sizes.

        Args:
            size: samples of a batch at most; one more where a rank has one sample more than another.
            rank: of `ranks`.
            ranks: data-parallel size.

        Raises:
            CorpusError: fewer samples than ranks.
        """
        least, more = divmod(self.samples, ranks)
        if least < 1:
            raise CorpusError(
                f"data set {self.prefix}: {self.samples} calibration samples for {ranks} data-parallel ranks: give "
                "more of them (elastic.calibration.samples, or more text), or start fewer ranks"
            )
        count = min(least, -(-(least + bool(more)) // size))
        start, mine = rank * least + min(rank, more), least + (rank < more)
        ends = [start + mine * number // count for number in range(count + 1)]
        return [range(first, last) for first, last in pairwise(ends)]

    def tokens(self, batch: Iterable[int]) -> Tensor:
        """The samples of a batch, `[b, s]` int64."""
        return torch.stack([self.window(number) for number in batch])
