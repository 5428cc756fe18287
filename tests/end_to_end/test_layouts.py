"""A family saved on one layout goes on, and is extracted, on every other: through `train` and `extract` themselves."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_elastic.checkpoint import find_checkpoint
from megatron_elastic.extraction import extract_budget
from tests.end_to_end import small_run
from tests.rank_server import RankServer, Run, hook

PATTERN = {(1, 1): "M-*-", (2, 1): "M-|*-", (2, 2): "M|-|*|-"}
# The optimizer's state in a form that another data-parallel size can read: what `train` asks for with that optimizer.
DISTRIBUTED = {"use-distributed-optimizer": True}
OVERLAPS = {"overlap-grad-reduce": True, "overlap-param-gather": True}
STAGE = {"micro_batch_size": 1, "global_batch_size": 4, "weights": [0.6, 0.4], "sequence_length": 32}
SAVED, LAST = 2, 3
STILL = hook("tests.end_to_end.faults:stand_still")
"""The step after the change of layout moves no weight: what it saves is what it loaded, saved by another layout."""


def flags(*, tp: int = 1, pp: int = 1, vp: int = 1, cp: int = 1, **other: Any) -> dict[str, Any]:
    """Megatron's flags of a layout."""
    return {
        **small_run.WITHOUT_WANDB,
        "hybrid-layer-pattern": PATTERN[pp, vp],
        "tensor-model-parallel-size": tp,
        "pipeline-model-parallel-size": pp,
        "context-parallel-size": cp,
        "sequence-parallel": tp > 1,
        **{name.replace("_", "-"): value for name, value in other.items()},
        **DISTRIBUTED,
    }


SOURCE = flags(tp=2, pp=2)
# Name -> ranks and flags.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2 PP2 SP": (4, SOURCE),
    "TP1": (1, flags()),
    "TP2 SP": (2, flags(tp=2)),
    "PP2": (2, flags(pp=2)),
    "PP2 VPP2": (2, flags(pp=2, vp=2)),
    "CP2": (2, flags(cp=2)),
    "DP2, both overlaps": (2, {**flags(), **OVERLAPS}),
    # Core then aligns the reductions and gathers of the stages, which it does on the interleaved schedule alone.
    "PP2 VPP2 DP2, both overlaps": (4, {**flags(pp=2, vp=2), **OVERLAPS}),
}


@pytest.fixture(scope="module")
def server() -> Iterator[RankServer]:
    with RankServer() as started:
        yield started


def recipe(folder: Path, megatron: dict[str, Any], iterations: int) -> None:
    """The recipe of a layout, up to an iteration; the router decides after the second."""
    stages = [{"iterations": iterations, **STAGE}]
    router = {"iterations": SAVED, "warmup": 1, "tolerance": 0.06}
    small_run.write_recipe(folder, megatron, stages=stages, router=router)


@pytest.fixture(scope="module")
def saved(server: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family after two iterations on TP2 x PP2 with sequence parallelism."""
    folder = tmp_path_factory.mktemp("layouts") / "saved"
    folder.mkdir()
    small_run.prepare(folder)
    recipe(folder, SOURCE, SAVED)
    run = server.train(folder, ranks=4)
    assert run.status == 0, run.text()[-3000:]
    assert find_checkpoint(folder / "family").name == f"iter_{SAVED:07d}"
    return folder


def losses(run: Run) -> dict[int, list[float]]:
    """Iteration -> the losses that were printed, largest budget first."""
    lines = re.findall(r"elastic \| losses of iteration (\d+) \| (.*)", run.text())
    return {int(number): [float(part.split(": ")[1]) for part in line.split(" | ")] for number, line in lines}


@pytest.fixture(scope="module")
def gone_on(server: RankServer, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Run]]:
    """The family gone on with on every layout."""
    found = {}
    for name, (ranks, megatron) in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("layout") / "run"
        shutil.copytree(saved, folder)
        recipe(folder, megatron, LAST)
        run = server.train(folder, ranks=ranks, hooks=[STILL])
        assert run.status == 0, f"{name}: {run.text()[-3000:]}"
        found[name] = folder, run
    return found


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "TP2 PP2 SP"])
def test_the_next_step_is_the_same(gone_on: dict[str, tuple[Path, Run]], saved: Path, name: str) -> None:
    (folder, run), (other_folder, other_run) = gone_on[name], gone_on["TP2 PP2 SP"]
    here, there = losses(run), losses(other_run)
    assert sorted(here) == sorted(there) == [LAST]
    # fp32: a KL is a difference of log-probabilities of some 6 nats, each known to 4e-7.
    assert here[LAST] == pytest.approx(there[LAST], abs=1e-6)
    assert here[LAST][0] != pytest.approx(here[LAST][1], abs=1e-3)
    # Adam's moments after a step without gradient: what was saved, resharded, times the betas.
    mine, theirs, before = (
        moments(place, iteration) for place, iteration in ((folder, LAST), (other_folder, LAST), (saved, SAVED))
    )
    assert small_run.different(mine, theirs) == []
    assert sorted(small_run.different(mine, before)) == sorted(before)


def moments(folder: Path, iteration: int) -> dict[str, Tensor]:
    """Adam's moments of every weight, in names and shapes that do not depend on the layout."""
    state = small_run.state(folder, iteration)
    return {key: value for key, value in state.items() if "exp_avg" in key and "elastic" not in key}


@pytest.mark.parametrize("budget", ["whole", "half"])
def test_every_layout_s_checkpoint_gives_the_same_submodel(
    gone_on: dict[str, tuple[Path, Run]], saved: Path, budget: str, tmp_path: Path
) -> None:
    def files(source: Path, name: str, wanted: str = budget) -> dict[str, bytes]:
        out = tmp_path / name.replace(" ", "-").replace(",", "")
        extract_budget(source, wanted, out)
        return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}

    want = files(gone_on["TP2 PP2 SP"][0] / "family", "source")
    for name, (folder, _) in gone_on.items():
        weights, saved_weights = (
            {key: value for key, value in state.items() if "optimizer" not in key and "elastic" not in key}
            for state in (small_run.state(folder, LAST), small_run.state(saved, SAVED))
        )
        assert small_run.different(weights, saved_weights) == [], name
        found = files(folder / "family", name)
        assert sorted(found) == sorted(want), name
        assert [file for file in want if found[file] != want[file]] == [], name
    other = files(saved / "family", "other", "half" if budget == "whole" else "whole")
    assert [file for file in want if other.get(file) != want[file]]
