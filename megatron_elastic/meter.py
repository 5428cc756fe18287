"""Losses of budgets that are drawn: each over the tokens it really had, since the last report."""

import torch
from torch import Tensor


class BudgetMeter:
    """Sums of loss and tokens per budget.

    Megatron averages a key over one step and would divide by zero tokens where a budget was not drawn in it.
    """

    def __init__(self, budgets: int) -> None:
        """`budgets`: number of budgets, largest first."""
        self._running: dict[int, Tensor] = {}
        self._step = torch.zeros(budgets, 2, dtype=torch.float64)
        self.sums = torch.zeros(budgets, 2, dtype=torch.float64)

    def add(self, budget: int, measured: Tensor) -> None:
        """Adds one microbatch: `measured` is (summed loss, tokens)."""
        self._running[budget] = self._running.get(budget, torch.zeros_like(measured)) + measured

    def finish(self, group: torch.distributed.ProcessGroup | None) -> None:
        """Ends a step, on every rank: sums over the group. A step that is rerun replaces what it had said before.

        Ranks that hold the same tokens (tensor parallel) all count them, which a quotient does not notice.
        """
        device = next((value.device for value in self._running.values()), None)
        if device is None:
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        total = torch.zeros(self.sums.shape, dtype=torch.float32, device=device)
        for budget, measured in self._running.items():
            total[budget] = measured
        self._running.clear()
        if group is not None and torch.distributed.get_world_size(group) > 1:
            torch.distributed.all_reduce(total, group=group)
        self._step = total

    def commit(self) -> None:
        """Takes over the step that `finish` ended."""
        self.sums = self.sums.to(self._step.device) + self._step
        self._step = torch.zeros_like(self._step)

    def means(self) -> list[float | None]:
        """Mean loss of each budget since the last call, nats a token; None where it was not drawn."""
        found = [loss / tokens if tokens else None for loss, tokens in self.sums.tolist()]
        self.sums = torch.zeros_like(self.sums)
        return found
