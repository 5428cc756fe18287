"""Accounting: FLOPs of a joint step, and base samples in the log."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_elastic.budget import Selection
from megatron_elastic.config import Recipe, Stage, load_recipe
from megatron_elastic.cost_model import forward_flops_per_token
from megatron_elastic.curriculum import TeacherCache
from megatron_elastic.metadata import Metadata

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
STAGES = (
    Stage(iterations=30, sequence_length=64, global_batch_size=16, micro_batch_size=4, weights=(0.4, 0.3, 0.3)),
    Stage(iterations=20, sequence_length=256, global_batch_size=4, micro_batch_size=2, weights=(0.4, 0.3, 0.3)),
)


@pytest.fixture(scope="module")
def metrics() -> Any:
    from megatron_elastic import metrics

    return metrics


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return dataclasses.replace(load_recipe(RECIPE), stages=STAGES)


def metadata(recipe: Recipe, *selections: Selection) -> Metadata:
    family = recipe.family
    return Metadata(
        kind="family", shape=family.shape, ffn_blocks=8, flags={}, choices=family.choices, budgets=family.budgets,
        selections=selections,
    )  # fmt: skip


def smallest(recipe: Recipe) -> Selection:
    return recipe.family.select({axis: choices[-1] for axis, choices in recipe.family.choices.items()})


def test_a_soft_step_runs_every_student_at_full_width(metrics: Any, recipe: Recipe) -> None:
    shape = recipe.family.shape
    full = forward_flops_per_token(shape, shape.full, 64)
    head = 2 * shape.vocab * shape.hidden
    # The teacher's forward once, its head once a budget, and forward and backward (twice as much) of three students.
    assert metrics.joint_flops_per_token(recipe, metadata(recipe), 64) == full + 2 * head + 3 * 3 * full


def test_a_cached_teacher_runs_its_head_once_or_nothing(metrics: Any, recipe: Recipe) -> None:
    shape = recipe.family.shape
    full = forward_flops_per_token(shape, shape.full, 64)
    cached = dataclasses.replace(recipe, teacher_cache=TeacherCache(folder="cache", top_k=8))
    assert metrics.joint_flops_per_token(cached, metadata(recipe), 64) == full + 3 * 3 * full
    assert metrics.joint_flops_per_token(cached, metadata(recipe), 64, teacher_runs=False) == 3 * 3 * full


def test_a_sampled_step_runs_the_teacher_and_a_budget(metrics: Any, recipe: Recipe) -> None:
    shape, small = recipe.family.shape, smallest(recipe)
    drawn, kept = dataclasses.replace(recipe, budget_mode="sampled"), (recipe.family.full, small, small)
    full, narrow = (forward_flops_per_token(shape, s.sizes, 64) for s in (recipe.family.full, small))
    found = metrics.joint_flops_per_token(drawn, metadata(recipe, *kept), 64, (0.4, 0.3, 0.3))
    assert found == pytest.approx(full + 3 * (0.4 * full + 0.6 * narrow))
    assert found < metrics.joint_flops_per_token(recipe, metadata(recipe, *kept), 64)


def test_a_sliced_step_is_cheaper(metrics: Any, recipe: Recipe) -> None:
    shape, small = recipe.family.shape, smallest(recipe)
    soft = metrics.joint_flops_per_token(recipe, metadata(recipe), 64)
    all_full = metrics.joint_flops_per_token(recipe, metadata(recipe, *[recipe.family.full] * 3), 64)
    sliced = metrics.joint_flops_per_token(recipe, metadata(recipe, recipe.family.full, small, small), 64)
    assert all_full == soft
    saved = forward_flops_per_token(shape, shape.full, 64) - forward_flops_per_token(shape, small.sizes, 64)
    assert soft - sliced == 2 * 3 * saved > 0


def test_longer_sequences_cost_more_a_token(metrics: Any, recipe: Recipe) -> None:
    described = metadata(recipe)
    assert metrics.joint_flops_per_token(recipe, described, 256) > metrics.joint_flops_per_token(recipe, described, 64)


@pytest.mark.parametrize(("stage", "iteration", "samples"), [(1, 10, 160), (2, 30, 480), (2, 40, 520)])
def test_the_log_counts_base_samples(
    metrics: Any,
    recipe: Recipe,
    capsys: pytest.CaptureFixture[str],
    stage: int,
    iteration: int,
    samples: int,
) -> None:
    log = metrics.StepLog(recipe, stage, 10)
    log.step(iteration, SimpleNamespace(trainer=None, metadata=metadata(recipe)))
    said = capsys.readouterr().out
    assert said == f"elastic | stage {stage} | iteration {iteration} | base samples {samples}\n"


def test_rates_count_base_tokens(
    metrics: Any, recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 102.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    log, state = metrics.StepLog(recipe, 1, 10), SimpleNamespace(trainer=None, metadata=metadata(recipe))
    for iteration in range(0, 11):
        log.step(iteration, state)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2  # at the interval, not in between
    rate = 10 * 16 * 64 / 2
    flops = rate * metrics.joint_flops_per_token(recipe, state.metadata, 64) / 1e9
    assert f"| base tokens/s {rate:.0f} | joint GFLOP/s {flops:.1f}" in lines[1]


def test_a_decision_is_told_with_its_share(metrics: Any, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    small = smallest(recipe)
    metrics.StepLog(recipe, 1, 10).decided(20, metadata(recipe, recipe.family.full, small, small))
    lines = capsys.readouterr().out.splitlines()
    assert "iteration 20 | the router is frozen" in lines[0]
    assert "p100" in lines[1]
    assert "= 1.0000 of" in lines[1]
    assert str(small.as_dict()) in lines[3]
