"""The router works: where half of an axis is provably useless it cuts that half, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.distributed
AXES = ("hidden", "ffn", "mamba_heads", "mamba_head_dim", "attention_heads", "depth")
TOYS = ("ffn", "mamba_heads")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every toy gave, from one launch."""
    out = tmp_path_factory.mktemp("toys") / "found.json"
    run_ranks("cases_body.py", 1, "--cases", "router_toy_cases", "--out", out)
    result: dict[str, Any] = json.loads(Path(out).read_text())
    return result


@pytest.mark.parametrize("toy", TOYS)
def test_half_of_the_axis_is_useless_and_nothing_else_is(found: dict[str, Any], toy: str) -> None:
    losses = dict(found[toy]["reachable"])
    wanted = str(found[toy]["runs"][0]["wanted"])
    # fp64: what is cut adds exactly zero, only sums are shorter.
    assert abs(losses.pop(wanted)) < 1e-12
    assert len(losses) >= 3
    assert min(losses.values()) > 1e-3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("toy", TOYS)
def test_the_useless_half_is_cut_first(found: dict[str, Any], toy: str, seed: int) -> None:
    run = found[toy]["runs"][seed]
    assert run["decided"] == run["wanted"], run
    assert min(run["certainty"].values()) > 0.9


@pytest.mark.parametrize("toy", TOYS)
def test_it_was_learnt_from_the_kd_loss(found: dict[str, Any], toy: str) -> None:
    for runs, when in (("runs", "before"), ("blind", "decided")):
        assert any(run[when] != run["wanted"] for run in found[toy][runs]), f"{runs}, {when}"


def test_the_router_alone_comes_to_the_target(found: dict[str, Any]) -> None:
    # A fifth of the parameters: the penalty is strong enough to matter before the choices are frozen.
    assert [run["cost"] for run in found["ffn"]["runs"]] == pytest.approx([1.0] * 3, abs=0.02)


@pytest.mark.parametrize("axis", AXES)
def test_the_kd_loss_reaches_every_axis(found: dict[str, Any], axis: str) -> None:
    gradient = found["gradients"][axis]
    assert gradient["norm"] > 1e-3
    # Central differences of step 1e-5 in fp64.
    assert gradient["error"] < 1e-6
