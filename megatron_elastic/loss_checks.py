"""NaN, infinite and spiky KD losses, reported through Megatron's own rerun state machine."""

import functools
from collections.abc import Callable

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import get_args
from torch import Tensor

SPIKE = 10.0
"""A loss this many times its largest value so far is a spike: Megatron's own factor."""


def check_loss(summed: Tensor, count: Tensor, budget: str) -> None:
    """Validates one microbatch's KD loss of one budget on the rank that computed it, as Megatron's loss functions do.

    The state machine reruns the step (`--rerun-mode`), and ends the run where a loss stays NaN or infinite. It
    validates nothing in the first step after a start, which it could not rerun from a checkpoint: such a loss ends the
    run here, before it gets into weights and checkpoint. The message has iteration and rank, since the iteration that
    the state machine itself tells is one too high.

    Args:
        summed: loss summed over tokens, 0-dim.
        count: tokens.
        budget: name of the budget.

    Raises:
        RuntimeError: the loss is NaN or infinite, and the step cannot be rerun.
    """
    args = get_args()
    machine = get_rerun_state_machine()
    where = f"iteration {args.curr_iteration + 1}, rank {torch.distributed.get_rank()}: the KD loss of budget {budget}"
    if args.check_for_nan_in_loss_and_grad:
        for rejected, word in ((torch.isnan, "NaN"), (torch.isinf, "infinite")):
            message = f"{where} is {word}"
            machine.validate_result(summed.detach(), rejected, message, tolerance=0.0, fatal=True)
            if not machine.first_iteration_complete and rejected(summed):
                raise RuntimeError(
                    f"{message}. The first step after a start cannot be rerun; nothing was saved: start again from the "
                    "last checkpoint"
                )
    if args.check_for_spiky_loss:
        spiky: Callable[[Tensor], bool] = functools.partial(
            machine.is_unexpectedly_large, threshold=SPIKE, context=f"KD loss of budget {budget}"
        )
        machine.validate_result(summed.detach() / count, spiky, f"{where} is spiky", tolerance=0.0, fatal=False)
