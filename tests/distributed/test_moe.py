"""Equalities 1, 2, 5 and 6 of MoE layers and gated MLPs; whose tokens move biases, and how losses are weighted."""

import json
from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks

# fp64, forward and gradients: sums of some hundred terms in another order. The inserted faults are 1e12 times as large.
TOLERANCE = 1e-11
# Core scores experts in fp32. A sum over the scores of all experts, some of them zero, rounds otherwise than one over
# the kept ones; it is part of a softmax before the top-k and of the balancing losses alone.
SUM_OF_SCORES = 1e-6
LAYOUTS = ("ep2", "tp2", "tp2_ep2", "cp2", "cp2_ep2")
ROUTERS = ("sigmoid", "softmax", "pre_softmax", "balanced", "grouped")


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Worst relative error of each case, from one launch."""
    out = tmp_path_factory.mktemp("moe") / "errors.json"
    run_ranks("cases_body.py", 2, "--cases", "moe_cases", "--out", out)
    found: dict[str, dict[str, float]] = json.loads(Path(out).read_text())
    return found


@pytest.mark.parametrize("router", ROUTERS)
def test_full_selection_is_the_stock_model(errors: dict[str, dict[str, float]], router: str) -> None:
    for path in ("plain", "sliced", "masked"):
        assert errors[f"equalities/{router}"][f"full/{path}"] < TOLERANCE, path


@pytest.mark.parametrize("pair", ["masked_sliced", "extracted_sliced"])
@pytest.mark.parametrize("router", ROUTERS)
def test_paths_agree(errors: dict[str, dict[str, float]], router: str, pair: str) -> None:
    cases = {key: value for key, value in errors[f"equalities/{router}"].items() if key.endswith(pair)}
    assert len(cases) == 10  # axes alone, a mixture, layers that differ, all at their smallest, drawn ones
    summed = pair == "masked_sliced" and router in ("pre_softmax", "balanced")
    assert max(cases.values()) < (SUM_OF_SCORES if summed else TOLERANCE), cases


@pytest.mark.parametrize("router", ROUTERS)
def test_selections_differ(errors: dict[str, dict[str, float]], router: str) -> None:
    assert min(value for key, value in errors[f"equalities/{router}"].items() if key.endswith("differs")) > 1e-2


@pytest.mark.parametrize("path", ["sliced", "drawn", "soft"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
def test_a_layout_is_one_process(errors: dict[str, dict[str, float]], router: str, layout: str, path: str) -> None:
    assert errors[f"layouts/{router}"][f"{layout}/{path}"] < TOLERANCE
    assert errors[f"layouts/{router}"]["differs"] > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("router", ["sigmoid", "balanced", "grouped"])
def test_a_step_with_overlap_is_that_of_one_process(
    errors: dict[str, dict[str, float]], router: str, layout: str
) -> None:
    assert errors["steps"][f"{router}/{layout}"] < TOLERANCE


def test_a_step_moves_every_bias(errors: dict[str, dict[str, float]]) -> None:
    assert errors["steps"]["sigmoid/moved"] == pytest.approx(1e-3, rel=1e-3)  # core's rate, in fp32


@pytest.mark.parametrize("kind", ["full", "selective", "shared"])
def test_recompute_changes_nothing(errors: dict[str, dict[str, float]], kind: str) -> None:
    assert errors["recomputed"][f"{kind}/sliced"] < TOLERANCE
    assert errors["recomputed"][f"{kind}/soft"] < TOLERANCE
    assert errors["recomputed"][f"{kind}/counted"] == 0


def test_only_the_full_budgets_tokens_move_biases(errors: dict[str, dict[str, float]]) -> None:
    assert errors["counting"] == {"not asked": 0, "asked": 0, "cut experts": 0, "kept experts": 0}


def test_balancing_losses_have_the_roles_weight(errors: dict[str, dict[str, float]]) -> None:
    assert errors["weighted"]["linear"] < 1e-6  # two gradients are added in fp32, as core adds them
    assert errors["weighted"]["differs"] > 1e-2


@pytest.mark.parametrize("router", ["sigmoid", "softmax", "pre_softmax"])
def test_a_soft_choice_of_experts_has_its_slope(errors: dict[str, dict[str, float]], router: str) -> None:
    assert errors["slope"][f"{router}/size"] > 1e-2
    # A difference of losses that are fp32 in part, over a step of 1e-4: no better than a percent.
    assert errors["slope"][router] < 2e-2


@pytest.mark.parametrize("fault", ["router", "experts", "shared expert", "bias", "expert order"])
def test_a_fault_in_one_path_shows(errors: dict[str, dict[str, float]], fault: str) -> None:
    assert errors["faults"][fault] > 1e-2
    assert errors["faults"]["none"] < TOLERANCE


def test_checkpoints_travel_between_layouts_and_through_extraction(errors: dict[str, dict[str, float]]) -> None:
    wrong = dict(errors["checkpoints"])
    assert wrong.pop("differs") > 10
    assert wrong.pop("flags") < TOLERANCE  # the model that a recipe's flags build computes what the settings say
    assert len(wrong) == 11
    assert set(wrong.values()) == {0}, wrong
