"""What is summed while calibration text runs, and the ranks that hold parts of the sums."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather, all_reduce


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that activations are summed over a sequence in: fp32, or fp64 where they are."""
    return torch.promote_types(dtype, torch.float32)


def summed(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over the ranks of a group."""
    if group.size() > 1:
        tensor = tensor.clone()
        all_reduce(tensor, group=group)
    return tensor


def joined(tensor: Tensor, group: ProcessGroup, dimension: int = 0) -> Tensor:
    """The parts of the ranks of a group one after the other, all of one shape."""
    if group.size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dimension)


class SequenceNorms:
    """Mean over the sequence, L2 over the samples: sums of squares in fp64.

    Args:
        sequence_group: ranks that the sequence is split over (sequence parallelism), or None.
    """

    def __init__(self, sequence_group: ProcessGroup | None = None) -> None:
        self.sequence_group = sequence_group
        self._squares: Tensor | None = None

    def add(self, magnitudes: Tensor) -> None:
        """Adds samples.

        Args:
            magnitudes: not negative, `[s, b, n]`, `s` being this rank's tokens.
        """
        means = magnitudes.mean(dim=0, dtype=wide(magnitudes.dtype))
        if self.sequence_group is not None:
            means = summed(means, self.sequence_group) / self.sequence_group.size()
        squares = means.double().square().sum(dim=0)
        self._squares = squares if self._squares is None else self._squares + squares

    def value(self, samples: ProcessGroup | None = None) -> Tensor:
        """The scores so far, `[n]` fp64.

        Args:
            samples: ranks that saw other samples, or None.
        """
        if self._squares is None:
            raise ValueError("no activation was seen: the model's forward did not reach this module")
        return (self._squares if samples is None else summed(self._squares, samples)).sqrt()


class RoutedMeans:
    """Mean over the tokens that were routed to each expert: sums in fp64."""

    def __init__(self, experts: int) -> None:
        self._sums: list[Tensor | None] = [None] * experts
        self._tokens = [0] * experts

    def add(self, expert: int, magnitudes: Tensor) -> None:
        """Adds tokens of one expert: `[tokens, n]`, not negative; there may be none."""
        found = magnitudes.sum(dim=0, dtype=torch.float64)
        before = self._sums[expert]
        self._sums[expert] = found if before is None else before + found
        self._tokens[expert] += len(magnitudes)

    def value(self, samples: ProcessGroup) -> Tensor:
        """The means, `[experts, n]` fp64; 0 for an expert that no token was routed to.

        Args:
            samples: ranks that have the same experts and saw other tokens.
        """
        seen = [each for each in self._sums if each is not None]
        if len(seen) < len(self._sums):
            raise ValueError("no activation was seen: the model's forward did not reach these experts")
        sums = torch.stack(seen)
        tokens = torch.tensor(self._tokens, dtype=torch.float64, device=sums.device)
        return summed(sums, samples) / summed(tokens, samples).clamp(min=1)[:, None]
