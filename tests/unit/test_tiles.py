"""Sizes that FP8 products take: one fault an axis, with widths by hand, and the nearest sizes, which do fit."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_elastic.config import parse_recipe
from megatron_elastic.errors import RecipeError

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FP8 = {"fp8-format": "hybrid", "fp8-recipe": "tensorwise"}
PARENT: dict[str, Any] = {
    "megatron": {
        "hybrid-layer-pattern": "M*-E", "hidden-size": 256, "ffn-hidden-size": 512, "num-attention-heads": 16,
        "group-query-attention": True, "num-query-groups": 4, "kv-channels": 16, "mamba-num-heads": 32,
        "mamba-head-dim": 16, "mamba-num-groups": 4, "mamba-state-dim": 16, "num-experts": 8,
        "moe-ffn-hidden-size": 128, "moe-shared-expert-intermediate-size": 256, "moe-router-topk": 2,
        "vocab-size": 512, "squared-relu": True, "normalization": "RMSNorm", "position-embedding-type": "none",
        "untie-embeddings-and-output-weights": True, "disable-bias-linear": True, "hidden-dropout": 0.0,
        "attention-dropout": 0.0, "calculate-per-token-loss": True, "tensor-model-parallel-size": 2,
        "sequence-parallel": True, "expert-tensor-parallel-size": 1, **FP8,
    },
    "elastic": {
        "parent": "sorted", "save": "family", "train_data": "train", "validation_data": "validation",
        "axes": {
            "hidden": [256, 192, 128], "ffn": [512, 384, 256], "mamba_heads": [32], "mamba_head_dim": [16, 8],
            "attention_heads": [16, 8], "experts": [8, 4], "expert_ffn": [128, 64], "shared_expert_ffn": [256, 128],
        },
        "expert_blocks": 4,
        "budgets": [{"name": "whole", "fraction": 1.0}, {"name": "half", "fraction": 0.6}],
        "router": {"iterations": 2, "tolerance": 0.2},
        "stages": [
            {
                "iterations": 4, "sequence_length": 64, "global_batch_size": 2, "micro_batch_size": 1,
                "weights": [0.5, 0.5],
            },
        ],
    },
}  # fmt: skip


def faults(megatron: dict[str, Any] | None = None, stage: dict[str, Any] | None = None, **axes: Any) -> list[str]:
    """Everything that is wrong with the recipe after changes."""
    raw = copy.deepcopy(PARENT)
    raw["megatron"].update(megatron or {})
    raw["elastic"]["axes"].update(axes)
    raw["elastic"]["stages"][0].update(stage or {})
    try:
        parse_recipe(raw)
    except RecipeError as error:
        return list(error.faults)
    return []


def test_sizes_that_fit_pass() -> None:
    assert faults() == []
    assert faults({"fp8-recipe": "blockwise"}) == []


CASES = {
    # On two ranks: 264 neurons are 132, 248 are 124; blocks of 8.
    "ffn": ([512, 264, 248], ["neurons 132 at 264, 124 at 248"], [288, 256, 224]),
    "hidden": ([256, 200, 100], ["channels 200 at 200, 100 at 100"], [208, 192, 112, 96]),
    # Expert tensor parallelism is 1 here; the shared expert is split as the MLP is.
    "expert_ffn": ([128, 72], ["neurons 72 at 72"], [80, 64]),
    "shared_expert_ffn": ([256, 144], ["neurons 72 at 144"], [160, 128]),
    # z, x, B, C and dt: (2 * 28 * 16 + 2 * 4 * 16 + 28) / 2, and (2 * 12 * 16 + 128 + 12) / 2; 16 would be (656) / 2.
    "mamba_heads": ([32, 28, 12], ["rows of in_proj (z, x, B, C, dt) 526 at 28, 262 at 12"], [32]),
}


@pytest.mark.parametrize("axis", CASES)
def test_an_axis_is_told_with_its_widths_and_the_nearest_sizes(axis: str) -> None:
    choices, said, near = CASES[axis]
    (fault,) = faults(**{axis: choices})
    assert fault.startswith(f"elastic.axes.{axis}: FP8 refuses ")
    for part in said:
        assert part in fault
    assert f"no multiples of 16: the nearest that fit are {near}" in fault
    # They do, and without FP8 all do.
    full = [choices[0]] if near[0] == choices[0] else [choices[0], *near]
    assert faults(**{axis: full}) == []
    assert faults({"fp8-format": None, "fp8-recipe": None}, **{axis: choices}) == []


def test_queries_keys_and_values() -> None:
    """4 groups of 16 channels with 4 heads: 12 x 16 / 2 rows fit; with heads of 4 channels 12 x 4 / 2 = 24 do not."""
    narrow = {"kv-channels": 4}
    (fault,) = faults(narrow, attention_heads=[16, 8, 4])
    assert "queries, keys and values 48 at 16" not in fault
    assert "elastic.axes.attention_heads: FP8 refuses queries, keys and values 24 at 4; heads' outputs 8 at 4" in fault
    assert "the nearest that fit are [8]" in fault
    assert faults(narrow, attention_heads=[16, 8]) == []


def test_channels_of_heads_are_judged_beside_heads_that_fit() -> None:
    # (2 * 16 * p + 2 * 4 * 18 + 16) / 2 rows always fit, 16 * 9 / 2 = 72 outputs do not.
    (fault,) = faults({"mamba-num-heads": 16, "mamba-state-dim": 18}, mamba_heads=[16], mamba_head_dim=[16, 9])
    assert fault == (
        "elastic.axes.mamba_head_dim: FP8 refuses heads' outputs 72 at 9 on a rank, no multiples of 16: the nearest "
        "that fit are [10, 8]; with TP 1 all fit"
    )
    # (2 * 16 * 16 + 128 + 16) / 2 = 328 rows: the heads are at fault, and their channels are not blamed for it.
    (fault,) = faults({"mamba-num-heads": 16}, mamba_heads=[16], mamba_head_dim=[16, 9])
    assert "elastic.axes.mamba_heads: FP8 refuses rows of in_proj (z, x, B, C, dt) 328 at 16" in fault
    assert fault.endswith("no multiples of 16: with TP 1 all fit")
    (fault,) = faults({"mamba-num-heads": 4}, mamba_heads=[4])
    assert fault.endswith("no size fits, on no fewer ranks either")


def test_fewer_ranks_are_a_remedy() -> None:
    (fault,) = faults(ffn=[512, 272])
    assert "136 at 272" in fault
    assert fault.endswith("; with TP 1 all fit")
    assert faults({"tensor-model-parallel-size": 1, "sequence-parallel": False}, ffn=[512, 272]) == []


def test_tokens_of_a_rank() -> None:
    (fault,) = faults(stage={"sequence_length": 72})
    assert fault == (
        "elastic.stages[0]: micro_batch_size 1 x sequence_length 72 are 72 tokens on a rank, and FP8 takes multiples "
        "of 16: the nearest are [64, 80]"
    )
    assert faults(stage={"sequence_length": 72, "micro_batch_size": 2}) == []
    # On four ranks that split the sequence each has 8 or more: 48 tokens are 12 each.
    found = faults({"tensor-model-parallel-size": 4}, {"sequence_length": 48})
    assert any("48 tokens on a rank, and FP8 takes multiples of 32" in fault for fault in found)


def test_all_faults_come_in_one_pass() -> None:
    found = faults(
        {"num-layers-at-end-in-bf16": 9, "first-last-layers-bf16": True}, {"sequence_length": 72},
        hidden=[256, 200], ffn=[512, 264], shared_expert_ffn=[256, 144],
    )  # fmt: skip
    told = [re.split(r":| FP8", fault)[0] for fault in found]
    assert told == [
        "megatron.num-layers-at-end-in-bf16", "elastic.stages[0]", "elastic.axes.hidden", "elastic.axes.ffn",
        "elastic.axes.shared_expert_ffn",
    ]  # fmt: skip


def test_the_parents_own_training_is_checked_on_its_layout() -> None:
    raw = copy.deepcopy(PARENT)
    raw["pretrain"] = {
        "save": "parent", "iterations": 2, "sequence_length": 64, "global_batch_size": 2, "micro_batch_size": 1,
    }  # fmt: skip
    assert parse_recipe(raw).pretrain is not None
    raw["pretrain"]["sequence_length"] = 40
    raw["pretrain"]["megatron"] = {"tensor-model-parallel-size": 4}
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw)
    told = [fault for fault in caught.value.faults if fault.startswith("pretrain")]
    assert any("40 tokens on a rank" in fault for fault in told)
    assert any("mamba_heads: FP8 refuses rows of in_proj (z, x, B, C, dt) 296 at 32" in fault for fault in told)


def test_layers_at_the_ends_that_depth_leaves_out() -> None:
    ends = {"first-last-layers-bf16": True}
    raw = copy.deepcopy(PARENT)
    raw["megatron"].update(ends)
    raw["elastic"]["axes"]["depth"] = [4, 3]
    raw["elastic"]["depth_ranking"] = [2]
    parse_recipe(raw)
    raw["elastic"]["depth_ranking"] = [3]
    with pytest.raises(RecipeError, match=r"elastic.axes.depth: layers \[3\] are left out by a submodel"):
        parse_recipe(raw)
    raw["megatron"]["num-layers-at-end-in-bf16"] = 0
    parse_recipe(raw)


def test_the_teachers_precision() -> None:
    raw = copy.deepcopy(PARENT)
    assert parse_recipe(raw).teacher_precision == "bf16"
    raw["elastic"]["teacher_precision"] = "fp8"
    assert parse_recipe(raw).teacher_precision == "fp8"
    raw["megatron"].update({"fp8-format": None, "fp8-recipe": None})
    with pytest.raises(RecipeError, match=r"teacher_precision: 'fp8' is the students' FP8: give megatron.fp8-format"):
        parse_recipe(raw)
    raw["elastic"]["teacher_precision"] = "fp16"
    with pytest.raises(RecipeError, match="'fp16' must be one of"):
        parse_recipe(raw)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_shipped_recipes_are_no_fp8_recipes(name: str) -> None:
    recipe = parse_recipe(yaml.safe_load((RECIPES / f"{name}.yaml").read_text()))
    assert recipe.precision is None
