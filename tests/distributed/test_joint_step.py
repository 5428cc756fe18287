"""The joint step equals a plain loop, on TP=2 (with and without SP) and PP=2 (with and without recompute)."""

import json
from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks

LAYOUTS = ("tp2", "tp2_sp", "pp2", "pp2_recompute")
# fp64 weights in two orders of summation: a few hundred roundings of 1e-16. The router and the metrics are fp32.
TOLERANCES = {"grads": 1e-11, "router": 2e-6, "losses": 1e-7, "evaluated": 1e-7}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Worst relative error of each case, from one launch."""
    out = tmp_path_factory.mktemp("joint") / "errors.json"
    run_ranks("cases_body.py", 2, "--cases", "joint_cases", "--out", out)
    found: dict[str, dict[str, float]] = json.loads(Path(out).read_text())
    return found


@pytest.mark.parametrize("mode", ["soft", "sliced"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_plain_loop(errors: dict[str, dict[str, float]], layout: str, mode: str) -> None:
    found = errors[f"{layout}/{mode}"]
    assert set(found) == {"grads", "losses", "router" if mode == "soft" else "evaluated"}
    for quantity, error in found.items():
        assert error < TOLERANCES[quantity], (quantity, error)


@pytest.mark.parametrize("mode", ["soft", "sliced"])
def test_other_selections_give_other_gradients(errors: dict[str, dict[str, float]], mode: str) -> None:
    assert errors[f"other/{mode}"]["grads"] > 1e-2


@pytest.mark.parametrize("mode", ["soft", "sliced"])
@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_budgets_that_follow_different_teachers_equal_the_plain_loop(
    errors: dict[str, dict[str, float]], layout: str, mode: str
) -> None:
    """The full budget learns from the text and teaches one; another follows the frozen teacher."""
    for quantity, error in errors[f"{layout}_mixed_teachers/{mode}"].items():
        assert error < TOLERANCES[quantity], (quantity, error)
    assert errors[f"one_teacher/{mode}"]["grads"] > 1e-2


@pytest.mark.parametrize("mode", ["soft", "sliced"])
def test_a_divergence_beside_the_text_equals_the_plain_loop(errors: dict[str, dict[str, float]], mode: str) -> None:
    """JSD with a temperature, and a share of the labels' cross entropy: the plain loop has them from whole logits."""
    for quantity, error in errors[f"tp2_sp_mixture/{mode}"].items():
        assert error < TOLERANCES[quantity], (quantity, error)
    assert errors[f"forward_kl/{mode}"]["grads"] > 1e-2


def test_recompute_with_a_selection_left_on_the_module_would_show(errors: dict[str, dict[str, float]]) -> None:
    assert errors["ambient/soft"]["grads"] > 1e-2
