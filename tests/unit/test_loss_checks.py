"""What of a loss is handed to Megatron's rerun state machine, and under which name."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch


class Machine:
    """Takes down what it is asked to validate."""

    def __init__(self, first_iteration_complete: bool) -> None:
        self.first_iteration_complete = first_iteration_complete
        self.rejected: list[tuple[str, bool]] = []

    def is_unexpectedly_large(self, result: Any, threshold: float, context: str) -> bool:
        return bool(result >= threshold)

    def validate_result(self, result: Any, rejection: Any, message: str, *, tolerance: float, fatal: bool) -> None:
        assert not result.requires_grad
        if rejection(result):
            self.rejected.append((message, fatal))


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    from megatron_elastic import loss_checks

    def run(loss: float, *, nan: bool = True, spiky: bool = True, started: bool = True) -> list[tuple[str, bool]]:
        machine = Machine(started)
        args = SimpleNamespace(check_for_nan_in_loss_and_grad=nan, check_for_spiky_loss=spiky, curr_iteration=4)
        monkeypatch.setattr(loss_checks, "get_args", lambda: args)
        monkeypatch.setattr(loss_checks, "get_rerun_state_machine", lambda: machine)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
        loss_checks.check_loss(torch.tensor(loss, requires_grad=True), torch.tensor(8.0), "p50")
        return machine.rejected

    return run


def test_a_good_loss_passes(check: Any) -> None:
    assert check(72.0) == []  # 9 a token


@pytest.mark.parametrize(("loss", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_budget_iteration_and_rank_are_named(check: Any, loss: float, word: str) -> None:
    message = f"iteration 5, rank 3: the KD loss of budget p50 is {word}"
    assert check(loss, spiky=False) == [(message, True)]
    assert check(loss, nan=False, spiky=False) == []
    with pytest.raises(RuntimeError, match=f"{message}. The first step"):
        check(loss, started=False)


def test_a_spike_is_of_the_mean_and_not_fatal(check: Any) -> None:
    assert check(80.0) == [("iteration 5, rank 3: the KD loss of budget p50 is spiky", False)]
    assert check(80.0, spiky=False) == []
