"""The curriculum in Megatron's terms, and the recipe's accounting in base samples."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_elastic import backend
from megatron_elastic.config import Recipe, Stage, load_recipe
from megatron_elastic.errors import RecipeError
from megatron_elastic.schedule import stage_argv, stage_flags

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
STAGES = (
    Stage(iterations=30, sequence_length=64, global_batch_size=16, micro_batch_size=4, weights=(0.5, 0.5)),
    Stage(iterations=20, sequence_length=256, global_batch_size=4, micro_batch_size=2, weights=(0.7, 0.3)),
)
FLAGS = {"hidden-size": 64, "lr": 1e-3, "lr-warmup-iters": 5, "calculate-per-token-loss": True}


def flags(number: int, save: Path | str = "nowhere", **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"roles": 3, "evaluation_roles": 3, "save_interval": 10, "eval_interval": 5}
    settings.update({"eval_iterations": 2, "cuda": False, **changes})
    return stage_flags({**FLAGS, **settings.pop("flags", {})}, STAGES, number, save=str(save), **settings)


def test_batches_count_every_role() -> None:
    assert [flags(n)["global-batch-size"] for n in (1, 2)] == [48, 12]
    assert [flags(n, roles=1)["global-batch-size"] for n in (1, 2)] == [16, 4]
    assert [flags(n)["micro-batch-size"] for n in (1, 2)] == [4, 2]


def test_evaluation_judges_every_budget_where_training_draws_one() -> None:
    made = flags(1, roles=2, evaluation_roles=3)
    assert (made["global-batch-size"], made["eval-global-batch-size"]) == (32, 48)


def test_iterations_continue_over_the_stages() -> None:
    assert [flags(n)["train-iters"] for n in (1, 2)] == [30, 50]


def test_sequences_grow_in_one_models_positions() -> None:
    assert [flags(n)["seq-length"] for n in (1, 2)] == [64, 256]
    assert {flags(n)["max-position-embeddings"] for n in (1, 2)} == {256}


@pytest.mark.parametrize("roles", [1, 3])
def test_the_learning_rates_horizon_is_the_same_in_samples(roles: int) -> None:
    """Megatron's scheduler counts iterations x global batch: that product must not change with the stage."""
    total = 30 * 16 + 20 * 4
    for number in (1, 2):
        made = flags(number, roles=roles)
        assert made["lr-decay-iters"] * made["global-batch-size"] == total * roles
        assert made["lr-warmup-iters"] * made["global-batch-size"] == 5 * 16 * roles
        assert made["override-opt_param-scheduler"] is True
    # In iterations they do differ.
    assert flags(1)["lr-decay-iters"] != flags(2)["lr-decay-iters"]


def test_without_warm_up_there_is_none() -> None:
    assert flags(2, flags={"lr-warmup-iters": 0})["lr-warmup-iters"] == 0


def test_a_checkpoint_is_loaded_only_where_there_is_one(tmp_path: Path) -> None:
    assert "load" not in flags(1, tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    made = flags(1, tmp_path)
    assert made["load"] == made["save"] == str(tmp_path)
    assert made["save-interval"] == 10


def test_evaluation_is_the_callers() -> None:
    assert (flags(1)["eval-interval"], flags(1)["eval-iters"]) == (5, 2)


def test_the_recipe_wins_over_the_backend_and_loses_to_the_curriculum() -> None:
    assert flags(1)["attention-backend"] == "unfused"
    made = flags(1, flags={"attention-backend": "fused", "train-iters": 7, "tensorboard-dir": "board"})
    assert (made["attention-backend"], made["train-iters"], made["tensorboard-dir"]) == ("fused", 30, "board")
    assert flags(1, "family")["tensorboard-dir"] == "family/tensorboard"


def test_cpu_ranks_get_gloo_and_gpus_do_not() -> None:
    assert flags(1)["distributed-backend"] == "gloo"
    assert "distributed-backend" not in flags(1, cuda=True)
    assert flags(1)["transformer-impl"] == "local"
    assert flags(1, cuda=True, flags={"transformer-impl": "local"})["transformer-impl"] == "local"


def test_the_backend_is_the_recipes_or_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_import_fault", lambda: None)
    made = flags(1, cuda=True)
    assert (made["transformer-impl"], made.get("attention-backend")) == ("transformer_engine", None)
    monkeypatch.setattr(backend, "_import_fault", lambda: "none")
    made = flags(1, cuda=True)
    assert (made["transformer-impl"], made.get("attention-backend")) == ("local", "unfused")
    with pytest.raises(RecipeError, match=r"megatron\.transformer-impl: 'transformer_engine' cannot be had here"):
        flags(1, cuda=True, flags={"transformer-impl": "transformer_engine"})


def test_the_command_line_says_the_same() -> None:
    argv = stage_argv(
        FLAGS, STAGES, 1, roles=3, evaluation_roles=3, save="s", save_interval=1, eval_interval=1, eval_iterations=1,
        cuda=True,
    )  # fmt: skip
    assert argv[argv.index("--global-batch-size") + 1] == "48"
    following = argv[argv.index("--calculate-per-token-loss") + 1]
    assert following.startswith("--")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return dataclasses.replace(load_recipe(RECIPE), stages=STAGES)


def test_tokens_of_text_count_once(recipe: Recipe) -> None:
    assert recipe.base_tokens == 30 * 16 * 64 + 20 * 4 * 256
    assert recipe.iterations == 50
    assert recipe.roles == 4


def test_the_stage_of_an_iteration(recipe: Recipe) -> None:
    assert [recipe.stage_of(i) for i in (0, 29, 30, 49, 50, 99)] == [1, 1, 2, 2, 3, 3]
    assert [recipe.iterations_before(n) for n in (1, 2, 3)] == [0, 30, 50]
    assert [recipe.base_samples_before(n) for n in (1, 2, 3)] == [0, 480, 560]


def test_an_empty_stage_is_passed_over(recipe: Recipe) -> None:
    empty = dataclasses.replace(STAGES[0], iterations=0)
    assert dataclasses.replace(recipe, stages=(empty, *STAGES)).stage_of(0) == 2


def test_sigterm_saves_unless_a_recipe_turns_it_off() -> None:
    assert flags(1)["exit-signal-handler"] is True
    off = {"flags": {"exit-signal-handler": False}}
    assert flags(1, **off)["exit-signal-handler"] is False


def test_asynchronous_saves_get_what_they_need_and_no_more() -> None:
    assert not {"async-strategy", "use-persistent-ckpt-worker"} & set(flags(1))
    made = flags(1, flags={"async-save": True})
    assert (made["async-strategy"], made["use-persistent-ckpt-worker"]) == ("mcore", True)
    assert flags(1, flags={"async-save": True, "async-strategy": "nvrx"})["async-strategy"] == "nvrx"
