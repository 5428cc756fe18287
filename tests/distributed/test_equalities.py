"""Equalities 1 to 4: the parent, masked, sliced and extracted submodels are one model by different code paths."""

import json
from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks

# fp64, forward and gradients: sums of some hundred terms in another order. The inserted faults are 1e12 times as large.
TOLERANCE = 1e-11
FAULTS = (
    *("gated norm", "residual stream", "final norm", "LM head", "FFN", "QKV", "SSM groups", "extraction"),
    *("depth, masked", "depth, sliced", "head channels", "layers that differ"),
)


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Worst relative error of each case, from one launch."""
    out = tmp_path_factory.mktemp("equalities") / "errors.json"
    run_ranks("cases_body.py", 2, "--cases", "equality_cases", "--out", out)
    found: dict[str, dict[str, float]] = json.loads(Path(out).read_text())
    return found


@pytest.mark.parametrize("layout", ["tp1", "tp2"])
def test_full_selection_is_the_stock_model(errors: dict[str, dict[str, float]], layout: str) -> None:
    for path in ("plain", "sliced", "masked"):
        assert errors[layout][f"full/{path}"] < TOLERANCE, path


@pytest.mark.parametrize("pair", ["masked_sliced", "extracted_sliced", "fused_sliced", "fused_masked"])
@pytest.mark.parametrize("layout", ["tp1", "tp2"])
def test_paths_agree(errors: dict[str, dict[str, float]], layout: str, pair: str) -> None:
    cases = {key: value for key, value in errors[layout].items() if key.endswith(pair)}
    # Six axes alone, all at their smallest, three that differ between layers and all of it, five random combinations.
    assert len(cases) == 16
    assert max(cases.values()) < TOLERANCE, cases


@pytest.mark.parametrize("layout", ["tp1", "tp2"])
def test_sorting_changes_nothing(errors: dict[str, dict[str, float]], layout: str) -> None:
    assert errors[layout]["sorted"] < TOLERANCE
    assert errors[layout]["sorted_but_one"] > 1e-2


@pytest.mark.parametrize("layout", ["tp1", "tp2"])
def test_selections_differ(errors: dict[str, dict[str, float]], layout: str) -> None:
    assert min(value for key, value in errors[layout].items() if key.endswith("differs")) > 1e-2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_path_shows(errors: dict[str, dict[str, float]], fault: str) -> None:
    assert errors["faults"][fault] > 1e-2
    assert errors["faults"]["none"] < TOLERANCE


def test_layers_that_are_left_out_report_as_those_that_run(errors: dict[str, dict[str, float]]) -> None:
    """Data-parallel ranks gather and reduce buckets in the order of these reports, whatever budgets they run."""
    assert errors["orders"]["calls"] == errors["orders"]["gradients"] == 1.0
    assert errors["orders"]["layers that say nothing"] == 0.0
    assert errors["orders"]["order of the parameters"] == 0.0


def test_rotary_positions(errors: dict[str, dict[str, float]]) -> None:
    assert errors["rope"]["masked_sliced"] < TOLERANCE
    # Core keeps the rotary table in fp32, and both paths read the same one.
    assert errors["rope"]["extracted_sliced"] < TOLERANCE
    assert errors["rope"]["without_positions"] > 1e-2


@pytest.mark.parametrize("layout", ["tp2", "tp2_sp"])
def test_engine_is_the_local_backend_on_several_ranks(errors: dict[str, dict[str, float]], layout: str) -> None:
    assert errors["engine"][f"{layout}/sliced"] < TOLERANCE
    assert errors["engine"][f"{layout}/masked"] < TOLERANCE
    assert errors["engine"][f"{layout}/differs"] > 1e-2
    assert errors["engine"]["calls"] > 0
