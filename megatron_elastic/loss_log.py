"""The losses of single iterations, as a line of the log that does not depend on where a run was stopped.

Megatron's own line is a mean since the line before, and its first line after a start is not taken out of the second:
the second line of every start is a mean of two iterations, whatever the interval.
"""

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor


class LossLog:
    """Sums the microbatches of one iteration on the last pipeline stage, and tells the means once it is committed."""

    def __init__(self, names: Sequence[str], interval: int) -> None:
        """Args:
        names: of the losses, a budget each.
        interval: iterations between two lines.
        """
        self.names, self.interval = tuple(names), max(1, interval)
        self._running: Tensor | None = None
        self._made: Tensor | None = None

    def add(self, budget: int, measured: Tensor) -> None:
        """Counts one microbatch.

        Args:
            budget: its index.
            measured: `[2]`: summed loss and number of tokens.
        """
        if self._running is None:
            self._running = torch.zeros(len(self.names), 2, dtype=torch.float64, device=measured.device)
        self._running[budget] += measured

    def finish(self) -> None:
        """Called when all microbatches of a step are through; a step that is rerun overwrites what it made before."""
        self._made, self._running = self._running, None

    def committed(self, iteration: int) -> dict[str, float]:
        """Tells the losses of a committed iteration, the `iteration`-th, of the budgets that ran in it.

        Returns:
            Name -> mean loss, where a line is due and on the last pipeline stage; else nothing.
        """
        made, self._made = self._made, None
        if made is None or iteration % self.interval:
            return {}
        torch.distributed.all_reduce(made, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        means = {name: loss / count for name, (loss, count) in zip(self.names, made.tolist(), strict=True) if count}
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            told = [f"{name}: {mean:.8E}" for name, mean in means.items()]
            print(f"elastic | losses of iteration {iteration} | {' | '.join(told)}", flush=True)
        return means
