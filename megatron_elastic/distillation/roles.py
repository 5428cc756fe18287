"""Roles: every base microbatch is run by a teacher (or two), then by budgets: all of them, or one that is drawn.

The role is a property of the dataset index, so Megatron's own sampler, its resume and its data-parallel split work as
they are: `MegatronPretrainingSampler` gives the data-parallel rank `r` the `r`-th micro batch of every run of
`micro_batch_size * data_parallel_size` indices, and all indices of a run share a role.
"""

import bisect
import hashlib
import itertools
import struct
from collections.abc import Sequence
from typing import Any, Protocol

import torch

TEACHER = -1
"""Stands for a budget's index in the frozen teacher's microbatches."""
LIVE_TEACHER = -2
"""The same where the full budget teaches, as it is at this step."""
OF_KIND = {"frozen": TEACHER, "trainable": LIVE_TEACHER}


class Roles(Protocol):
    """What one base microbatch becomes."""

    @property
    def count(self) -> int:
        """Microbatches that each base microbatch becomes, the teacher's included."""

    def budget(self, role: int, sample: int) -> int:
        """Budget (largest first) that runs base sample `sample` in a role, `TEACHER` or `LIVE_TEACHER`."""


class JointRoles:
    """The teachers, then every budget from narrow to full.

    The full budget touches every parameter, and core's DDP with `overlap_grad_reduce` wants the last microbatch to.
    """

    def __init__(self, budgets: int, teachers: Sequence[int] = (TEACHER,)) -> None:
        """Args:
        budgets: number of budgets; with 0 every base sample comes once, as in ordinary training.
        teachers: `TEACHER`, `LIVE_TEACHER` or both.
        """
        self.teachers = tuple(teachers)
        self.count = budgets + len(self.teachers)

    def budget(self, role: int, sample: int) -> int:
        """The same for every sample."""
        return self.teachers[role] if role < len(self.teachers) else self.count - 1 - role


class SampledRoles:
    """The teacher, then one budget, drawn for each base microbatch by its share of the loss.

    The draw is a pure function of (seed, first base sample that is run together): the same on every rank that takes
    part, and whatever the number of data-parallel ranks; nothing has to be saved. Every budget reaches every
    parameter (each keeps a part of it), so the last microbatch may be any.
    """

    count = 2

    def __init__(self, weights: Sequence[float], *, seed: int, together: int, teachers: Sequence[int] = ()) -> None:
        """Args:
        weights: share of each budget, largest budget first; they sum to 1.
        seed: of this stage of this run.
        together: base samples that are run together, and so by one budget: a microbatch, or those of all data-parallel
            ranks that share experts.
        teachers: of each budget, `TEACHER` (the default) or `LIVE_TEACHER`.
        """
        self.teachers = tuple(teachers) or (TEACHER,) * len(weights)
        self.seed, self.together = seed, together
        self.thresholds = list(itertools.accumulate(weights))
        self.last = max(index for index, weight in enumerate(weights) if weight > 0)

    def budget(self, role: int, sample: int) -> int:
        """Drawn by the microbatch that the sample belongs to; role 0 is the teacher of the one drawn."""
        drawn = self._drawn(sample)
        return drawn if role else self.teachers[drawn]

    def _drawn(self, sample: int) -> int:
        first = sample - sample % self.together
        digest = hashlib.blake2b(struct.pack("<2q", self.seed, first), digest_size=8).digest()
        drawn = int.from_bytes(digest, "little") / 2**64
        # Weights may sum to a little less than 1.
        return min(bisect.bisect_right(self.thresholds, drawn), self.last)


class RoleDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Maps an index to (base sample, role); an item carries the `budget` that runs it, and its number `sample`."""

    def __init__(
        self, base: Any, *, roles: Roles, group: int, samples: int, start: int = 0, period: int | None = None
    ) -> None:
        """Args:
        base: dataset of base samples (dicts of tensors).
        roles: what each base microbatch becomes.
        group: indices of one role in a row, micro batch size x data-parallel size.
        samples: base samples to offer after `start`.
        start: index at which the first base sample begins (what earlier curriculum stages have consumed).
        period: base samples after which the text repeats (evaluation reads the same text every time).
        """
        self.base, self.roles, self.group, self.start, self.period = base, roles, group, start, period
        self.samples = -(-samples // group) * group

    @property
    def index_split(self) -> Any:
        """The split of the base dataset: Megatron's loader picks the evaluation batch size by it."""
        return self.base.index_split

    def __len__(self) -> int:
        return self.start + self.samples * self.roles.count

    def at(self, index: int) -> tuple[int, int]:
        """Index -> (base sample, role); role 0 is a teacher."""
        run, inside = divmod(index - self.start, self.group)
        sample = run // self.roles.count * self.group + inside
        return (sample if self.period is None else sample % self.period), run % self.roles.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < self.start:
            raise IndexError(f"index {index} lies before this stage's first index {self.start}")
        sample, role = self.at(index)
        return {**self.base[sample], "budget": self.roles.budget(role, sample), "sample": sample}
