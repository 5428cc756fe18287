"""The report, from a run made up of files."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_elastic import report as reports
from megatron_elastic.checkpoint import LazyTensor, write_checkpoint
from megatron_elastic.config import load_recipe
from megatron_elastic.cost_model import parameters
from megatron_elastic.errors import CheckpointError, ElasticError
from megatron_elastic.metadata import Metadata
from megatron_elastic.planning import nearest
from megatron_elastic.report.checks import gap_closed
from megatron_elastic.report.events import read_scalars

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
LOSSES = {"parent": 3.0, "p100": 3.01, "p75": 3.1, "p50": 3.3}


def write_events(folder: Path, points: dict[str, list[tuple[int, float]]]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for tag, values in points.items():
            for step, value in values:
                writer.add_scalar(tag, value, step)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run as the quickstart leaves it."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.read_text("utf-8"))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    family = recipe.family
    kept = [nearest(family, budget.fraction, budget.unit) for budget in family.budgets]
    described = Metadata(
        kind="family",
        shape=family.shape,
        ffn_blocks=family.ffn_blocks,
        flags=recipe.megatron,
        choices=family.choices,
        budgets=family.budgets,
        selections=tuple(kept),
    )
    tensors = {"decoder.final_norm.weight": LazyTensor((4,), torch.float32, lambda: torch.ones(4))}
    write_checkpoint(tmp_path / "family", tensors, common={}, metadata=described, iteration=recipe.iterations)
    write_evaluations(tmp_path, described)
    curve = [(step, 2.0 / step) for step in range(1, 181)]
    tags = {f"kd {budget.name}": curve for budget in family.budgets}
    tags |= {f"kd {budget.name} validation": curve[29::30] for budget in family.budgets}
    for budget in family.budgets[1:]:
        for axis, sizes in family.choices.items():
            tags |= {f"router/{budget.name}/{axis}/{size}": [(s, 1 / len(sizes)) for s in range(60)] for size in sizes}
    write_events(tmp_path / "family" / "tensorboard", tags)
    return tmp_path


def write_evaluations(folder: Path, family: Metadata) -> None:
    def put(name: str, loss: float, count: int) -> None:
        value = {"loss": loss, "tokens": 65_536, "parameters": count, "unigram_entropy": 6.0}
        reports.write_json(folder / "evaluations" / f"{name}.json", value)

    put("parent", LOSSES["parent"], parameters(family.shape, family.shape.full))
    for budget in family.budgets:
        count = parameters(family.shape, family.selection_of(budget.name).sizes)
        put(f"family-{budget.name}", LOSSES[budget.name], count)
        put(f"extracted-{budget.name}", LOSSES[budget.name], count)
        put(f"untrained-{budget.name}", 5.0, count)
        for seed, loss in enumerate((6.0, 6.5, 7.0), start=1):
            put(f"random-{budget.name}-{seed}", loss, count)
    put(f"scratch-{family.budgets[-1].name}", 4.0, count)


def test_report_says_what_was_measured(run: Path) -> None:
    found = reports.write_report(run)
    assert json.loads((run / "report.json").read_text()) == found
    assert list(found) == ["schema", "parent", "unigram_entropy", "validation_tokens", "budgets"]
    assert found["schema"] == 1
    assert set(found["parent"]) == {"parameters", "validation_loss"}
    assert found["validation_tokens"] == 65_536
    assert [budget["name"] for budget in found["budgets"]] == ["p100", "p75", "p50"]
    keys = (
        "name fraction parameters selection validation_loss_family validation_loss_extracted validation_loss_untrained"
    )
    keys += " validation_loss_random_cut validation_loss_from_scratch checkpoint"
    assert all(list(budget) == keys.split() for budget in found["budgets"])
    full, middle, small = found["budgets"]
    assert full["parameters"] == found["parent"]["parameters"]
    assert full["validation_loss_untrained"] == full["validation_loss_random_cut"] == LOSSES["parent"]
    assert (middle["validation_loss_from_scratch"], small["validation_loss_from_scratch"]) == (None, 4.0)
    assert small["validation_loss_random_cut"] == 6.5
    assert small["checkpoint"] == "budgets/p50"
    assert all(check.passed for check in reports.check_report(found)), reports.check_report(found)


def test_page_has_tables_checks_and_plots(run: Path) -> None:
    reports.write_report(run)
    page = (run / "report.md").read_text()
    for name in ("parameters", "losses", "router"):
        assert f"(report/{name}.png)" in page
        assert (run / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (run / "report" / f"{name}.png").stat().st_size > 10_000
    assert "| p50 | 3.3000 | 3.3000 | 5.0000 | 6.5000 | 4.0000 | 85% |" in page
    assert "14 of 14 hold" in page
    assert "**no**" not in page
    assert not [path for path in run.rglob(".*") if path.is_file() and path.parent.name in (run.name, "report")]


def test_without_logs_there_is_a_report_without_their_plots(run: Path) -> None:
    for path in (run / "family" / "tensorboard").iterdir():
        path.unlink()
    reports.write_report(run)
    page = (run / "report.md").read_text()
    assert "parameters.png" in page
    assert "losses.png" not in page
    assert "router.png" not in page


def test_an_unfinished_run_is_told_with_everything_that_is_missing(run: Path) -> None:
    for name in ("random-p75-2", "scratch-p50"):
        (run / "evaluations" / f"{name}.json").unlink()
    with pytest.raises(ElasticError, match=r"random-p75-2\.json.*scratch-p50\.json.*missing"):
        reports.write_report(run)
    assert not (run / "report.json").exists()


def test_an_extracted_model_of_another_size_is_refused(run: Path) -> None:
    reports.write_json(run / "evaluations" / "extracted-p50.json", {"loss": 3.3, "tokens": 65_536, "parameters": 7})
    with pytest.raises(ElasticError, match="7 parameters"):
        reports.build_report(run)


def test_a_folder_without_a_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ElasticError, match="does not exist"):
        reports.build_report(tmp_path / "none")
    with pytest.raises(CheckpointError, match="family does not exist"):
        reports.build_report(tmp_path)


def test_a_given_selection_needs_no_router(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    del recipe["elastic"]["router"]
    family = reports.build_report(run)
    recipe["elastic"]["selections"] = {budget["name"]: budget["selection"] for budget in family["budgets"]}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert reports.write_report(run) == family


GOOD: dict[str, Any] = {
    "schema": 1,
    "parent": {"parameters": 1000, "validation_loss": 3.0},
    "unigram_entropy": 6.0,
    "validation_tokens": 50_000,
    "budgets": [
        {
            "name": name,
            "fraction": fraction,
            "parameters": round(1000 * fraction),
            "selection": {},
            "validation_loss_family": 3.02,
            "validation_loss_extracted": 3.02,
            "validation_loss_untrained": 5.0,
            "validation_loss_random_cut": 6.0,
            "validation_loss_from_scratch": 4.0 if name == "small" else None,
            "checkpoint": f"budgets/{name}",
        }
        for name, fraction in (("full", 1.0), ("small", 0.5))
    ],
}


def failing(**changes: Any) -> list[str]:
    report = copy.deepcopy(GOOD)
    for key, value in changes.items():
        target: Any = report
        *path, last = key.split("__")
        for step in path:
            target = target[int(step) if step.isdigit() else step]
        target[last] = value
    return [check.name for check in reports.check_report(report) if not check.passed]


def test_a_good_report_passes() -> None:
    assert failing() == []


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("validation_tokens", 49_999, "validation tokens"),
        ("unigram_entropy", 3.99, "parent: below the unigram entropy"),
        ("budgets__1__parameters", 511, "small: parameters against the target"),
        ("budgets__1__parameters", 489, "small: parameters against the target"),
        ("budgets__0__validation_loss_family", 3.02003, "full: extracted against inside the family"),
        ("budgets__1__validation_loss_family", 3.02003, "small: extracted against inside the family"),
        ("budgets__1__validation_loss_untrained", 3.05, "small: gap to the parent closed"),
        ("budgets__1__validation_loss_random_cut", 5.0, "small: untrained cut below random cuts"),
        ("budgets__1__validation_loss_from_scratch", 3.02, "small: below the same shape from scratch"),
        ("budgets__1__validation_loss_from_scratch", None, "small: below the same shape from scratch"),
    ],
)
def test_each_expectation_can_fail(key: str, value: Any, name: str) -> None:
    assert failing(**{key: value}) == [name]


def test_the_full_budget_may_not_be_worse_than_its_parent() -> None:
    worse = {"budgets__0__validation_loss_family": 3.07, "budgets__0__validation_loss_extracted": 3.07}
    assert failing(**worse) == ["full: loss over the parent's"]
    better = {"budgets__0__validation_loss_family": 2.5, "budgets__0__validation_loss_extracted": 2.5}
    assert failing(**better) == []


def test_gap_closed() -> None:
    assert gap_closed(5.0, 3.5, 3.0) == pytest.approx(0.75)
    assert gap_closed(5.0, 5.5, 3.0) < 0
    # An untrained cut that is no worse than its parent leaves nothing to close, only something to spoil.
    assert gap_closed(3.0, 3.0, 3.0) == 1.0
    assert gap_closed(3.0, 3.1, 3.0) <= 0
    assert gap_closed(2.9, 3.1, 3.0) < 0


def test_a_step_that_was_logged_again_counts_once(tmp_path: Path) -> None:
    write_events(tmp_path, {"kd p50": [(1, 3.0), (2, 2.0)], "kd p50 vs samples": [(8, 3.0)]})
    write_events(tmp_path, {"kd p50": [(2, 1.5), (3, 1.0)]})
    curves = read_scalars(tmp_path)
    assert curves["kd p50"].steps == (1, 2, 3)
    assert curves["kd p50"].values == (3.0, 1.5, 1.0)
    assert list(curves) == ["kd p50"]
    assert curves["kd p50"].smoothed(2).values == (3.0, 2.25, 1.25)
    assert read_scalars(tmp_path / "none") == {}
