"""Context parallelism equals one process, and packed documents equal each document alone."""

import json
from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks

# fp64 sums of some hundred terms in another order; a weight whose gradient nearly cancels has the worst of them.
TOLERANCE = 1e-11
# Core keeps the rotary table in fp32: an angle of up to 72 is rounded to 72 * 2^-24 = 4e-6, and a document alone has
# smaller angles, rounded otherwise.
ROTARY_TOLERANCE = 1e-5
# How many of: one document and packed, at two slices and two soft selections. What is left out is what the others show.
CASES = {
    **{"cp2": 8, "cp2_rope": 4, "cp4": 4, "tp2_cp2": 4},
    **{"cp2_recompute_full": 2, "cp2_recompute_core": 2, "cp2_one_group": 2, "tp2_cp2_sp": 2},
}
FAULTS = (
    *("order of the queries", "order of the keys", "order of the scan", "positions"),
    *("documents", "order of the documents", "documents on the stock stack"),
)
Errors = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Errors:
    """Worst relative error of each quantity of each case, from one launch."""
    out = tmp_path_factory.mktemp("context_parallel") / "errors.json"
    run_ranks("cases_body.py", 4, "--cases", "context_parallel_cases", "--out", out)
    found: Errors = json.loads(Path(out).read_text())
    return found


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(errors: Errors, case: str) -> None:
    found = {name: each for name, each in errors.items() if name.startswith(f"{case}/")}
    assert len(found) == CASES[case]
    for name, each in found.items():
        assert set(each) == {"loss", "grads"} | ({"leaves"} if "soft" in name else set()), name
        assert max(each.values()) < TOLERANCE, (name, each)


@pytest.mark.parametrize("positions", ["none", "rope"])
@pytest.mark.parametrize("layout", ["tp1_cp1", "tp1_cp2", "tp1_cp4", "tp2_cp2"])
def test_the_stock_stack_and_the_full_parent_agree_too(errors: Errors, layout: str, positions: str) -> None:
    """Core's attention under a mask of ours against our attention, on packed documents, by the models' logits."""
    for model in ("stock", "elastic") if layout != "tp1_cp1" else ("stock",):
        assert max(errors[f"plain/{layout}/{positions}/{model}"].values()) < TOLERANCE, model


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(errors: Errors, fault: str) -> None:
    found = errors[f"fault/{fault}"]
    assert found["loss"] > 1e-3  # of a sum over all tokens
    assert min(found["grads"], found.get("leaves", 1.0)) > 1e-2
    assert max(errors["fault/none"].values()) < TOLERANCE


def test_the_routers_gradient_is_a_sum_over_the_ranks(errors: Errors) -> None:
    assert errors["fault/one rank's share of the router's gradient"]["leaves"] > 1e-2


def test_attention_is_recomputed(errors: Errors) -> None:
    # Two attention layers, two slices a rank, in teacher, student and once more in the student's backward. The teacher
    # is in evaluation mode.
    assert errors["fault/attention calls"]["number"] == 8
    assert errors["fault/attention calls recomputed"]["number"] == 12


@pytest.mark.parametrize(("positions", "tolerance"), [("none", TOLERANCE), ("rope", ROTARY_TOLERANCE)])
@pytest.mark.parametrize("way", ["sliced2", "soft1"])
def test_packed_documents_equal_each_alone(errors: Errors, way: str, positions: str, tolerance: float) -> None:
    assert max(errors[f"packing/{positions}/{way}"].values()) < tolerance
    assert min(errors[f"packing/{positions}/fault/{way}"].values()) > 1e-3
    assert errors[f"packing/{positions}/fault/{way}"]["grads"] > 1e-2


def test_wrong_arguments_are_refused(errors: Errors) -> None:
    found = errors["arguments/refused"]
    assert len(found) == 3
    assert set(found.values()) == {1.0}, found


def test_packed_sequences_are_documents(errors: Errors) -> None:
    for name in ("none/cp1", "rope/cp1", "rope/cp2"):
        assert max(errors[f"cu_seqlens/{name}"].values()) < TOLERANCE, name
