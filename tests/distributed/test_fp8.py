"""FP8 of the local backend: sliced == extracted, each slice quantised once a step, no copy used after it is stale."""

import json
from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks

# fp64 around products of the same FP8 numbers. A scale of somebody else is 1e11 times as much.
TOLERANCE = 1e-11


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    """Every case's number on each rank, from one launch."""
    out = tmp_path_factory.mktemp("fp8") / "numbers.json"
    run_ranks("cases_body.py", 2, "--cases", "fp8_cases", "--out", out)
    found: dict[str, dict[str, list[float]]] = json.loads(Path(out).read_text())
    return found


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "ends"])
def test_a_slice_is_what_is_cut_out_of_it(numbers: dict[str, dict[str, list[float]]], recipe: str) -> None:
    """Bit for bit on our own layers, logits, loss and every gradient; and on core's."""
    for case, found in numbers[recipe].items():
        if case.endswith("own layers"):
            assert found == [1.0, 1.0], case
        elif case.endswith("stock layers"):
            assert max(found) < TOLERANCE, case
        else:  # and quantised it is: a deep model of random weights
            assert min(found) > 1e-2, case


def test_the_parents_scales_would_be_another_model(numbers: dict[str, dict[str, list[float]]]) -> None:
    found = {case: max(each) for case, each in numbers["scales"].items()}
    assert found["tensorwise/parent's"] > 1e-2
    # A power of two less changes no number, until it leaves fewer bits to those that are small beside an outlier.
    assert found["blockwise/parent's"] == 0.0
    assert found["blockwise, outliers/parent's"] > 1e-2
    assert found["all kept"] == 0.0
    # Soft masks have the parent's scales: what is masked at one-hot is the slice up to that.
    for recipe in ("tensorwise", "blockwise, outliers"):
        assert found[f"{recipe}/masked"] > 1e-2
        assert found[f"{recipe}/masked"] == pytest.approx(found[f"{recipe}/parent's"], rel=0.01)
    assert found["blockwise/masked"] < TOLERANCE


def test_a_slice_is_quantised_once_a_step(numbers: dict[str, dict[str, list[float]]]) -> None:
    """Two microbatches of two budgets: one copy for each of a budget's weights, and none of one that it cuts."""
    found = {case: set(each) for case, each in numbers["copies"].items()}
    assert found["untold"] == {1.0}  # of every use: nobody told when the weights change
    assert found["once"] == found["anew"] == found["a change of weights by itself"] == {1.0}
    assert found["again"] == {0.0}


def test_no_copy_is_used_after_a_step(numbers: dict[str, dict[str, list[float]]]) -> None:
    found = {case: min(each) for case, each in numbers["copies"].items()}
    assert found["after a step"] == 1.0
    assert found["stale"] > 1e-2  # of weights that changed and nobody told
    assert found["moved"] > 1e-2
    assert max(numbers["copies"]["copies of other slices"]) == 0.0


@pytest.mark.parametrize(
    "way", ["recompute", "grouped experts", "names", "ends", "teacher in FP8", "teacher in bf16"]
)
def test_ways_to_run(numbers: dict[str, dict[str, list[float]]], way: str) -> None:
    assert numbers["ways"][way] == [1.0, 1.0]


def test_each_rank_scales_its_own_shard(numbers: dict[str, dict[str, list[float]]]) -> None:
    """As Transformer Engine does: with one scale a tensor, another tensor-parallel size is another model in FP8."""
    found = numbers["tp2"]
    assert found["own layers"] == [1.0, 1.0]
    assert max(found["stock layers"]) < TOLERANCE
    assert max(found["scale of a shard"]) < 1e-6  # fp32
    assert min(found["one process"]) > 1e-2
