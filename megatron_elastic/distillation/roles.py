"""Roles: every base microbatch is run by the teacher, then by each budget from narrow to full.

The role is a property of the dataset index, so Megatron's own sampler, its resume and its data-parallel split work as
they are: `MegatronPretrainingSampler` gives the data-parallel rank `r` the `r`-th micro batch of every run of
`micro_batch_size * data_parallel_size` indices, and all indices of a run share a role.
"""

from typing import Any

import torch


class RoleDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Maps an index to (base sample, role)."""

    def __init__(
        self, base: Any, *, roles: int, group: int, samples: int, start: int = 0, period: int | None = None
    ) -> None:
        """Args:
        base: dataset of base samples (dicts of tensors).
        roles: microbatches each base microbatch becomes: 1 (teacher) + budgets.
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
        return self.start + self.samples * self.roles

    def at(self, index: int) -> tuple[int, int]:
        """Index -> (base sample, role); role 0 is the teacher, `roles - 1` the full budget."""
        run, inside = divmod(index - self.start, self.group)
        sample = run // self.roles * self.group + inside
        return (sample if self.period is None else sample % self.period), run % self.roles

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < self.start:
            raise IndexError(f"index {index} lies before this stage's first index {self.start}")
        sample, role = self.at(index)
        return {**self.base[sample], "role": role}


def budget_of(role: int, budgets: int) -> int:
    """Index of the budget (largest first) that a student's role runs: narrow first, the full budget last.

    The full budget touches every parameter, and core's DDP with `overlap_grad_reduce` wants the last microbatch to.
    """
    return budgets - role
