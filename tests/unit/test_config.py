"""Recipes: everything that is wrong is found in one pass, and what is right passes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_elastic.config import DistillationLoss, load_recipe, parse_recipe
from megatron_elastic.curriculum import TeacherCache
from megatron_elastic.errors import RecipeError
from tests.unit.small_family import every_selection

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
GOOD = yaml.safe_load(RECIPE.read_text("utf-8"))
GONE = object()
CACHE = {"folder": "cache", "top_k": 64}


def changed(**changes: Any) -> dict[str, Any]:
    """The quickstart's recipe with `section__key__...` replaced, or removed by GONE."""
    recipe: dict[str, Any] = copy.deepcopy(GOOD)
    for path, value in changes.items():
        *way, last = path.split("__")
        target: Any = recipe
        for step in way:
            target = target[int(step) if step.isdigit() else step]
        if value is GONE:
            del target[last]
        else:
            target[int(last) if last.isdigit() else last] = value
    return recipe


def faults(recipe: Any, world_size: int | None = 2) -> list[str]:
    with pytest.raises(RecipeError) as refusal:
        parse_recipe(recipe, world_size=world_size)
    assert all(fault in str(refusal.value) for fault in refusal.value.faults)
    return refusal.value.faults


def test_the_quickstarts_recipe_is_right() -> None:
    for world_size in (None, 2, 4):
        recipe = parse_recipe(changed(elastic__stages__0__micro_batch_size=2, elastic__stages__1__micro_batch_size=2,
                                      pretrain__micro_batch_size=2), world_size=world_size)  # fmt: skip
        assert [budget.name for budget in recipe.family.budgets] == ["p100", "p75", "p50"]
    recipe = load_recipe(RECIPE, world_size=2)
    assert recipe.roles == 4
    assert recipe.iterations == sum(stage.iterations for stage in recipe.stages)
    assert recipe.stage_of(recipe.iterations) == len(recipe.stages) + 1
    assert recipe.stage_of(recipe.iterations_before(2)) == 2
    assert recipe.stage_of(recipe.iterations_before(2) - 1) == 1
    assert recipe.pretrain is not None
    assert recipe.pretrain.stage.iterations == recipe.pretrain.iterations


def test_the_loss_is_the_forward_kl_unless_the_recipe_says_otherwise() -> None:
    assert parse_recipe(GOOD, world_size=2).loss == DistillationLoss(kind="forward_kl", ce_weight=0.0)
    chosen = parse_recipe(changed(elastic__loss={"kind": "jsd", "beta": 0.2, "ce_weight": 1}), world_size=2)
    assert chosen.loss == DistillationLoss(kind="jsd", beta=0.2, ce_weight=1.0)
    assert chosen.temperature == GOOD["elastic"]["temperature"]


def test_a_teacher_cache_is_only_what_the_recipe_says() -> None:
    assert parse_recipe(changed(), world_size=2).teacher_cache is None
    cached = parse_recipe(changed(elastic__teacher_cache=CACHE), world_size=2)
    assert cached.teacher_cache == TeacherCache(folder="cache", top_k=64, mode="auto", precision="fp16")
    # Megatron counts the same samples with it and without.
    assert cached.roles == parse_recipe(changed(), world_size=2).roles


def test_a_drawn_budget_makes_two_roles_and_the_parent_is_the_teacher_by_default() -> None:
    recipe = parse_recipe(changed(elastic__budget_mode="sampled"), world_size=2)
    assert (recipe.roles, recipe.evaluation_roles) == (2, 4)
    assert recipe.teacher == recipe.parent
    assert parse_recipe(changed(elastic__teacher="elsewhere"), world_size=2).teacher == "elsewhere"


def test_virtual_stages_want_whole_groups_of_microbatches() -> None:
    layout = {
        "megatron__tensor-model-parallel-size": 1,
        "megatron__pipeline-model-parallel-size": 2,
        "megatron__hybrid-layer-pattern": "M-|M*|-M|-M*-",
        "elastic__budgets": GOOD["elastic"]["budgets"][:2],
        "elastic__stages": [{**GOOD["elastic"]["stages"][0], "weights": [0.5, 0.5], "global_batch_size": 8}],
    }
    found = faults(changed(**layout))
    for fault, when in zip(found, ("training", "evaluation"), strict=True):
        assert f"elastic.stages[0].global_batch_size: 8 makes 3 microbatches a step in {when} (3 for each of 1" in fault
        assert "multiple of pipeline-model-parallel-size 2" in fault
    layout["elastic__stages"][0]["micro_batch_size"] = 4
    parse_recipe(changed(**layout), world_size=2)


def test_every_budget_is_reached_by_several_selections() -> None:
    family = load_recipe(RECIPE).family
    shares = [family.selection_cost(each) / family.full_cost("parameters") for each in every_selection(family)]
    for budget in family.budgets[1:]:
        assert sum(abs(share / budget.fraction - 1) <= 0.02 for share in shares) >= 10


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"colour": 1}, "colour: unknown section"),
        ({"elastic__colour": 1}, "elastic.colour: unknown key"),
        ({"elastic__router__colour": 1}, "elastic.router.colour: unknown key"),
        ({"elastic__stages__0__colour": 1}, "elastic.stages[0].colour: unknown key"),
        ({"elastic__budgets__1__colour": 1}, "elastic.budgets[1].colour: unknown key"),
        ({"elastic__evaluation__colour": 1}, "elastic.evaluation.colour: unknown key"),
        ({"elastic__calibration__colour": 1}, "elastic.calibration.colour: unknown key"),
        ({"elastic__axes__colour": [8]}, "elastic.axes.colour: unknown axis"),
        ({"elastic__axes__experts": [8]}, "elastic.axes.experts: a parent 'M-M*-M-M*-' has ['hidden', 'ffn'"),
        ({"pretrain__colour": 1}, "pretrain.colour: unknown key"),
        ({"elastic__parent": GONE}, "elastic.parent: required"),
        ({"elastic__teacher": 3}, "elastic.teacher: 3 must be a path"),
        ({"elastic__budget_mode": "both"}, "elastic.budget_mode: 'both' must be one of ['joint', 'sampled']"),
        ({"elastic__stages__0__iterations": GONE}, "elastic.stages[0].iterations: required"),
        ({"pretrain__save": GONE}, "pretrain.save: required"),
        # Choices.
        ({"elastic__axes__ffn": [384, 300]}, "choice 300 does not divide by its 8 blocks: 296 would"),
        ({"elastic__axes__mamba_heads": [8, 5]}, "choice 5 does not divide by its 2 blocks"),
        ({"elastic__axes__attention_heads": [8, 6]}, "choice 6 does not divide by its 4 blocks"),
        ({"elastic__axes__ffn": [256, 128]}, "must begin with the full size 384"),
        ({"elastic__axes__hidden": [128, 72, 96]}, "must be strictly descending"),
        ({"elastic__axes__hidden": [128, 0]}, "choice 0 must lie in 1..128"),
        ({"elastic__axes__hidden": 128}, "must be a list of whole numbers"),
        ({"elastic__ffn_blocks": 0}, "elastic.ffn_blocks: 0"),
        # Budgets.
        ({"elastic__budgets__2__fraction": 0.1}, "elastic.budgets.p50: no selection comes within 2.0% of 0.100"),
        ({"elastic__budgets__0__fraction": 0.9}, "must be 1.0, the parent's own size"),
        ({"elastic__budgets__2__fraction": 0.8}, "must be strictly descending"),
        ({"elastic__budgets__2__fraction": 0}, "fraction 0.0 must lie above 0"),
        ({"elastic__budgets__2__fraction": "half"}, "'half' must be a number"),
        ({"elastic__budgets__2__name": "p75"}, "must differ"),
        ({"elastic__budgets__2__name": "../p50"}, "must be usable as a folder's name"),
        ({"elastic__budgets": []}, "must be a list"),
        # Stages and router.
        ({"elastic__stages__1__weights": [0.5, 0.3]}, "must be 3 numbers, one a budget, that sum to 1"),
        ({"elastic__stages__1__weights": [0.5, 0.3, 0.3]}, "that sum to 1"),
        ({"elastic__stages__1__weights": [1.5, -0.3, -0.2]}, "that sum to 1"),
        ({"elastic__stages__1__weights": ["a", "b", "c"]}, "that sum to 1"),
        ({"elastic__stages__0__global_batch_size": 12}, "must be a multiple of micro_batch_size x data-parallel size"),
        ({"elastic__stages__0__iterations": 0}, "elastic.stages[0].iterations: 0 must be at least 1"),
        ({"elastic__stages__0__iterations": 1.5}, "1.5 must be a whole number"),
        ({"elastic__stages__0__sequence_length": -8}, "must not be negative"),
        ({"elastic__router__iterations": 10_000}, "exceeds the stages' iterations"),
        ({"elastic__router": "on"}, "elastic.router: 'on' must be a mapping"),
        ({"elastic__temperature": 0}, "elastic.temperature: 0 must be a number above 0"),
        ({"elastic__loss": {"kind": "kl"}}, "elastic.loss.kind: 'kl' must be one of ['forward_kl'"),
        ({"elastic__loss": {"kind": "jsd", "beta": 1}}, "elastic.loss.beta: 1.0 must lie between 0 and 1"),
        ({"elastic__loss": {"ce_weight": -1}}, "elastic.loss.ce_weight: -1 must not be negative"),
        ({"elastic__loss": {"temperature": 2}}, "elastic.loss.temperature: unknown key"),
        ({"elastic__loss": "jsd"}, "elastic.loss: 'jsd' must be a mapping"),
        ({"elastic__save_interval": 0}, "elastic.save_interval: 0"),
        ({"elastic__teacher_cache": {"folder": "cache"}}, "elastic.teacher_cache.top_k: required"),
        ({"elastic__teacher_cache": {**CACHE, "top_k": 0}}, "elastic.teacher_cache.top_k: 0 must lie between 1 and"),
        ({"elastic__teacher_cache": {**CACHE, "top_k": 10**6}}, "one less than the vocabulary"),
        ({"elastic__teacher_cache": {**CACHE, "mode": "append"}}, "elastic.teacher_cache.mode: 'append' must be one"),
        ({"elastic__teacher_cache": {**CACHE, "precision": "bf16"}}, "precision: 'bf16' must be one of ['fp16',"),
        ({"elastic__teacher_cache": {**CACHE, "folder": 3}}, "elastic.teacher_cache.folder: 3 must be a folder"),
        ({"elastic__teacher_cache": CACHE, "elastic__stages__1__teacher": "trainable"},
         "elastic.stages[1].teacher: trainable, and elastic.teacher_cache is given"),
        ({"elastic__teacher_cache": CACHE, "elastic__stages__0__teacher": {"p50": "trainable"}},
         "elastic.stages[0].teacher: trainable, and elastic.teacher_cache is given"),
        ({"elastic__save": 3}, "elastic.save: 3 must be a path"),
        # The parent's training.
        ({"pretrain__iterations": 0}, "pretrain.iterations: 0 must be at least 1"),
        ({"pretrain__megatron__hidden-size": 64}, "pretrain.megatron: changes the model"),
        ({"pretrain__megatron__train-iters": 64}, "pretrain.megatron.train-iters"),
        ({"pretrain__global_batch_size": 12}, "pretrain.global_batch_size: 12 must be a multiple"),
        ({"pretrain__megatron": 3}, "pretrain.megatron: 3 must be a mapping"),
        # The layout.
        ({"megatron__pipeline-model-parallel-size": "two"}, "megatron.pipeline-model-parallel-size: 'two'"),
        ({"megatron__pipeline-model-parallel-size": 2}, "TP x PP x CP = 4 does not divide the 2 rank(s)"),
        ({"megatron__context-parallel-size": 0}, "megatron.context-parallel-size: 0 must be a whole number"),
        ({"megatron__sequence-parallel": True, "elastic__stages__0__sequence_length": 255},
         "elastic.stages[0].sequence_length: 255 must be a multiple of 2"),
        ({"megatron__cp-comm-type": "p2p"}, "megatron.cp-comm-type: 'p2p' is refused"),
    ],
)  # fmt: skip
def test_each_fault_is_found_alone(changes: dict[str, Any], text: str) -> None:
    found = faults(changed(**changes))
    assert len(found) == 1, found
    assert text in found[0]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"elastic__ffn_blocks": 7}, "does not divide into 7 blocks"),
        ({"elastic__ffn_blocks": 3}, "3 blocks do not divide by tensor-model-parallel-size 2"),
        ({"megatron__tensor-model-parallel-size": 0}, "megatron.tensor-model-parallel-size: 0"),
    ],
)
def test_a_fault_with_consequences_is_among_those_found(changes: dict[str, Any], text: str) -> None:
    assert any(text in fault for fault in faults(changed(**changes)))


def with_cp(cp: int, *, tp: int = 1, heads: tuple[int, ...] = (8, 4), groups: int = 2, **more: Any) -> dict[str, Any]:
    """A recipe on TP x CP ranks, its parent's training included."""
    return changed(**{
        "megatron__context-parallel-size": cp, "megatron__tensor-model-parallel-size": tp,
        "pretrain__megatron__tensor-model-parallel-size": tp, "megatron__mamba-num-heads": heads[0],
        "megatron__mamba-num-groups": groups, "elastic__axes__mamba_heads": list(heads), **more,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("cp", "tp", "heads", "groups"),
    [
        (2, 1, (8, 6, 2), 2),  # each CP rank has one of two groups, whatever is kept in it
        (2, 2, (8, 4), 2),  # two CP ranks share the group of their shard
        (4, 1, (8, 4), 2),  # two CP ranks share each of two groups
        (2, 1, (12, 8, 4), 4),  # two groups each
    ],
)
def test_context_parallel_ranks_get_even_shares(cp: int, tp: int, heads: tuple[int, ...], groups: int) -> None:
    recipe = parse_recipe(with_cp(cp, tp=tp, heads=heads, groups=groups), world_size=tp * cp)
    assert recipe.family.choices["mamba_heads"] == heads
    with pytest.raises(RecipeError, match=f"TP x PP x CP = {tp * cp} does not divide the {tp * cp + 1} rank"):
        parse_recipe(with_cp(cp, tp=tp, heads=heads, groups=groups), world_size=tp * cp + 1)


def test_context_parallel_faults_are_listed_together() -> None:
    found = faults(
        with_cp(4, heads=(12, 10, 4, 2), elastic__stages__0__sequence_length=252, pretrain__sequence_length=250,
                elastic__stages__1__sequence_length=256), world_size=4
    )  # fmt: skip
    for text in (
        "elastic.axes.mamba_heads: [10, 2] heads do not divide over TP x CP = 1 x 4 ranks: take multiples of 4",
        "elastic.stages[0].sequence_length: 252 must be a multiple of 8: context parallelism takes 2 x CP equal slices",
        "pretrain.sequence_length: 250 must be a multiple of 8",
    ):
        assert any(text in fault for fault in found), (text, found)
    assert not any("stages[1]" in fault for fault in found)
    (groups,) = faults(with_cp(2, heads=(12, 6), groups=3), world_size=2)[:1]
    assert "mamba_groups / TP = 3 and CP = 2: one must be a multiple of the other" in groups
    # The parent's training may have a layout of its own: here its full 8 heads do not divide by 16.
    found = faults(changed(**{"pretrain__megatron__context-parallel-size": 16}), world_size=32)
    assert any("pretrain.megatron: [8] heads do not divide over TP x CP = 1 x 16" in fault for fault in found)


def test_sequence_and_context_parallelism_share_a_sequence() -> None:
    settings = {"megatron__sequence-parallel": True, "elastic__stages__0__sequence_length": 8}
    found = faults(with_cp(2, tp=3, heads=(12, 6), groups=3, **settings), world_size=6)
    assert any("stages[0].sequence_length: 8 must be a multiple of 12" in fault for fault in found)


def test_all_faults_are_listed_in_one_pass() -> None:
    changes = {
        "colour": 1,
        "megatron__fp16": True,
        "megatron__mtp-num-layers": 1,
        "elastic__shade": 2,
        "elastic__axes__ffn": [384, 300],
        "elastic__budgets__1__fraction": 1.5,
        "elastic__stages__0__weights": [1.0],
        "elastic__router__width": "wide",
        "elastic__calibration__samples": "some",
        "elastic__temperature": -1,
        "pretrain__iterations": 0,
    }
    found = faults(changed(**changes))
    for text in (
        "colour",
        "fp16",
        "mtp-num-layers",
        "shade",
        "choice 300",
        "fraction 1.5",
        "weights",
        "width",
        "samples",
    ):
        assert any(text in fault for fault in found), text
    assert any("temperature" in fault for fault in found)
    assert any("pretrain.iterations" in fault for fault in found)


@pytest.mark.parametrize("raw", [None, [], "text", {}, {"megatron": {}}, {"megatron": {}, "elastic": []}])
def test_what_is_no_recipe_is_refused(raw: Any) -> None:
    assert faults(raw)


def test_empty_sections_name_what_they_need() -> None:
    found = faults({"megatron": {}, "elastic": {}})
    for text in ("elastic.parent", "elastic.stages", "elastic.budgets", "elastic.axes", "megatron.hidden-size"):
        assert any(text in fault for fault in found), text


def test_an_unreadable_file_is_a_bad_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("megatron: [")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "bad.yaml")


FULL = {"hidden": 128, "ffn": 384, "mamba_heads": 8, "mamba_head_dim": 32, "attention_heads": 8}
GIVEN = {"p100": {}, "p75": {"ffn": 256, "mamba_heads": 4, "attention_heads": 4}, "p50": {"hidden": 72}}


def test_given_selections_need_no_router() -> None:
    recipe = parse_recipe(changed(elastic__router=GONE, elastic__selections=GIVEN))
    assert recipe.router is None
    assert recipe.selections[0].as_dict() == FULL
    assert recipe.selections[1].as_dict() == {**FULL, "ffn": 256, "mamba_heads": 4, "attention_heads": 4}


@pytest.mark.parametrize(
    ("selections", "text"),
    [
        ({"p100": {}}, "must give one selection for each of"),
        ({**GIVEN, "p50": {"ffn": 200}}, "elastic.selections.p50.ffn: 200 is none of"),
        ({**GIVEN, "p50": {"experts": 2}}, "must map axes"),
        ({**GIVEN, "p50": {"depth": 2}}, "elastic.selections.p50.depth: 2 must be one of [10]"),
        ({**GIVEN, "p100": {"ffn": 256}}, "the largest budget must keep everything"),
        (3, "must give one selection for each of"),
    ],
)
def test_given_selections_are_checked(selections: Any, text: str) -> None:
    found = faults(changed(elastic__router=GONE, elastic__selections=selections))
    assert len(found) == 1, found
    assert text in found[0]


def test_selections_and_router_exclude_each_other() -> None:
    assert any("no router is built" in fault for fault in faults(changed(elastic__selections=GIVEN)))


def test_the_parents_training_may_be_left_out() -> None:
    assert parse_recipe(changed(pretrain=GONE)).pretrain is None
