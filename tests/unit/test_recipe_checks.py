"""What a recipe would do on GPUs, against sums by hand on the quickstart's small parent and on the shipped recipes."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_elastic.config import Recipe, parse_recipe
from megatron_elastic.cost_model import parameters
from megatron_elastic.curriculum import TeacherCache
from megatron_elastic.errors import RecipeError
from megatron_elastic.parallel import ranks_of
from megatron_elastic.recipe_checks import (
    RESERVED,
    gpu_memory,
    layout_faults,
    pipeline,
    rank_parameters,
    run_facts,
    unloadable,
)

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())


def recipe(**flags: Any) -> Recipe:
    raw = copy.deepcopy(QUICKSTART)
    raw["megatron"].update({name.replace("_", "-"): value for name, value in flags.items()})
    return parse_recipe(raw)


def shipped(name: str) -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    return raw


def test_stages_of_the_pipeline() -> None:
    assert pipeline(recipe(), 1) == [list(range(10))]
    assert pipeline(recipe(hybrid_layer_pattern="M-M|*-M-M*-", pipeline_model_parallel_size=2), 2) == [
        [0, 1, 2],
        [3, 4, 5, 6, 7, 8, 9],
    ]
    # Virtual stages are dealt round.
    four = recipe(hybrid_layer_pattern="M-|M*|-M|-M*-", pipeline_model_parallel_size=2)
    assert pipeline(four, 2) == [[0, 1, 4, 5], [2, 3, 6, 7, 8, 9]]


def test_ranks_hold_the_whole_model() -> None:
    plain = recipe(tensor_model_parallel_size=1)
    shape = plain.family.shape
    whole = parameters(shape, shape.full)
    assert rank_parameters(plain, ranks_of(plain.megatron, []), range(10), first=True, last=True) == (0, whole)
    stages = pipeline(plain, 2)
    parts = [
        rank_parameters(plain, ranks_of(plain.megatron, []), layers, first=place == 0, last=place == 1)[1]
        for place, layers in enumerate(stages)
    ]
    assert sum(parts) == whole
    # On two tensor-parallel ranks all but the norms over hidden channels are shared out: one a layer and the final one.
    split = recipe()
    _, half = rank_parameters(split, ranks_of(split.megatron, []), range(10), first=True, last=True)
    assert 2 * half - whole == (10 + 1) * 128


def test_experts_are_shared_over_their_ranks() -> None:
    raw = shipped("nemotron_3_nano_30b_a3b_to_23b_12b")
    made = parse_recipe(raw)
    shape = made.family.shape
    routed = 23 * 128 * 2 * 2688 * 1856
    alone = ranks_of({**raw["megatron"], "tensor-model-parallel-size": 1, "expert-model-parallel-size": 1}, [])
    assert rank_parameters(made, alone, range(52), first=True, last=True) == (
        routed,
        parameters(shape, shape.full) - routed,
    )
    spread = rank_parameters(made, ranks_of(raw["megatron"], []), range(52), first=True, last=True)
    assert spread[0] == routed // 8
    assert spread[1] < (parameters(shape, shape.full) - routed) * 0.51


def test_memory_by_hand() -> None:
    made = recipe(bf16=True, use_distributed_optimizer=True, tensor_model_parallel_size=1)
    count = parameters(made.family.shape, made.family.shape.full)
    ranks = ranks_of(made.megatron, [])
    found = gpu_memory(made, ranks, 4)
    assert found["weights"] == found["teacher"] == 2 * count
    assert found["gradients"] == 4 * count
    assert found["optimizer"] == 12 * count / 4
    assert found["reserved"] == RESERVED
    assert found["total"] == sum(value for name, value in found.items() if name != "total")
    # 2048 tokens of the second stage, 8 x 256 of the first: a Mamba layer of 8 heads x 32 keeps the residual, its norm,
    # z|x|B|C|dt, the convolution's, the scan's and the gated norm's output.
    mamba = 2 * 128 + (512 + 64 + 8) + (256 + 64) + 256 + 256
    attention = 2 * 128 + (128 + 2 * 64) + 128
    mlp = 2 * 128 + 2 * 384
    assert found["activations"] == 2 * 2048 * (4 * mamba + 2 * attention + 4 * mlp)
    fp32 = gpu_memory(recipe(tensor_model_parallel_size=1), ranks, 4)
    assert (fp32["weights"], fp32["optimizer"]) == (4 * count, 8 * count)
    again = recipe(
        bf16=True, tensor_model_parallel_size=1, recompute_granularity="full", recompute_method="uniform",
        recompute_num_layers=2,
    )  # fmt: skip
    # In FP8 two layouts of each budget's weights (1, 0.75 and 0.5 of the parent's), and of a teacher's in FP8.
    asked = replace(made, megatron={**made.megatron, "fp8-format": "hybrid", "fp8-recipe": "blockwise"})
    copies = sum(budget.fraction for budget in made.family.budgets)
    assert gpu_memory(asked, ranks, 4)["fp8"] == round(2 * copies * count)
    taught = gpu_memory(replace(asked, teacher_precision="fp8"), ranks, 4)
    assert taught["fp8"] == round(2 * (copies + 1) * count)
    assert taught["total"] - found["total"] == taught["fp8"]
    assert "fp8" not in found
    # Five inputs are kept, and at most a Mamba and an MLP layer are there in full.
    assert gpu_memory(again, ranks, 4)["activations"] == 2 * 2048 * (5 * 128 + mamba + mlp)


def test_a_teacher_that_is_read_from_a_cache_takes_nothing() -> None:
    online = recipe()
    ranks = ranks_of(online.megatron, [])
    for mode, there in (("write", True), ("auto", True), ("read", False)):
        made = replace(online, teacher_cache=TeacherCache(folder="cache", top_k=8, mode=mode))
        found, plain = gpu_memory(made, ranks, 2), gpu_memory(online, ranks, 2)
        assert found["teacher"] == (plain["teacher"] if there else 0)
        assert plain["total"] - found["total"] == (0 if there else plain["teacher"])
        stages = [run_facts(each)["stages"][0] for each in (made, online)]
        work = [stage["flops_at_full_width"] for stage in stages]
        assert [stage["teacher_cache_bytes"] for stage in stages] == [stages[0]["tokens"] * (8 * 6 + 4), 0]
        # Three budgets at three passes' worth of a forward each, and the teacher at one.
        assert work[0] / work[1] == pytest.approx(1.0 if there else 9 / 10, rel=1e-6)


def test_pipelines_keep_microbatches_in_flight() -> None:
    """The fullest stage is the first, which has two microbatches in flight, or the last, which has the loss."""
    attention, mlp = 2 * 128 + 384, 2 * 128 + 768
    mamba = 2 * 128 + (512 + 64 + 8) + (256 + 64) + 2 * 256
    for pattern, microbatches, layers in (
        ("M-M*-M-M*|-", 2, 4 * mamba + 2 * attention + 3 * mlp),
        ("M|-M*-M-M*-", 1, 3 * mamba + 2 * attention + 4 * mlp),
    ):
        made = recipe(hybrid_layer_pattern=pattern, tensor_model_parallel_size=1, pipeline_model_parallel_size=2)
        found = gpu_memory(made, ranks_of(made.megatron, []), 2)
        assert found["activations"] == microbatches * 2 * 2048 * layers
        assert (found["loss"] > 0) == (microbatches == 1)


def test_selections_that_no_engine_loads_are_told_beforehand() -> None:
    made = recipe()
    assert unloadable(made) == []
    apart = replace(made, family=replace(made.family, heterogeneous=("ffn", "mamba_heads")))
    said = unloadable(apart)
    assert all("mamba_heads differ between layers: no engine loads that" in warning for warning in said)
    assert [warning.split(":")[0] for warning in said] == [f"budget {b.name}" for b in made.family.budgets[1:]]
    assert set(said) <= set(run_facts(apart)["warnings"])
    (narrow, *_) = unloadable(replace(made, family=replace(made.family, heterogeneous=("ffn",))))
    assert "exported as nemotron_h_puzzle" in narrow
    full = made.family.full
    layers = len(made.family.layers_with("mamba_heads"))
    given = tuple(replace(full, mamba_heads=sizes) for sizes in (8, 4, (8, *[4] * (layers - 1))))
    kinds = [warning.split(":")[0] for warning in unloadable(replace(made, selections=given))]
    assert kinds == [f"budget {made.family.budgets[2].name}"]


def test_what_fp8_would_not_take_is_told() -> None:
    told = [warning.split(":")[0] for warning in run_facts(recipe())["warnings"] if "FP8" in warning]
    assert told == ["FP8 would refuse hidden", "FP8 would refuse mamba_heads"]
    raw = shipped("nemotron_nano_v2_12b_to_9b_6b")
    raw["megatron"].update({"fp8-format": "hybrid", "fp8-recipe": "blockwise", "transformer-impl": "local"})
    raw["elastic"]["axes"]["mamba_heads"] = [128]
    told = [warning for warning in run_facts(parse_recipe(raw))["warnings"] if "FP8" in warning]
    # 2832 rows of the input projection on one of 8 ranks are 22 blocks and 16 rows.
    assert "mamba_heads: a rank's last blocks of FP8 are smaller" in told[0]
    assert "rows of in_proj (z, x, B, C, dt) 2832 at 128 on a rank, no multiples of 128: with TP 1 all fit" in told[0]
    assert told[1:] == ["FP8 on the local backend is a reference in torch: it saves neither time nor memory"]


def test_layouts_that_do_not_fit() -> None:
    uneven = recipe(pipeline_model_parallel_size=4)
    assert "10 layers do not divide over 4 stages" in layout_faults(uneven, ranks_of(uneven.megatron, []), 8)[0]
    three = recipe(hybrid_layer_pattern="M-M|*-M|-M*-", pipeline_model_parallel_size=2)
    assert "3 segments are no multiple of the 2" in layout_faults(three, ranks_of(three.megatron, []), 4)[0]
    with pytest.raises(RecipeError, match="3 segments"):
        run_facts(three, 4)
    raw = shipped("nemotron_3_nano_30b_a3b_to_23b_12b")
    made = parse_recipe(raw)
    assert layout_faults(made, ranks_of(raw["megatron"], []), 64) == []
    (fault,) = layout_faults(made, ranks_of(raw["megatron"], []), 12)
    assert "EP x expert TP x PP = 8 x 1 x 1 does not divide the 12 GPU(s)" in fault


@pytest.mark.parametrize(
    ("name", "gpus", "tokens"),
    [
        ("nemotron_nano_v2_12b_to_9b_6b", 64, 110e9),
        ("nemotron_nano_v2_12b_to_9b_6b", 512, 110e9),
        ("nemotron_3_nano_30b_a3b_to_23b_12b", 64, 160e9),
        ("nemotron_3_nano_30b_a3b_to_23b_12b", 512, 160e9),
        ("nemotron_nano_v2_9b_to_4b", 64, 213e9),
    ],
)
def test_shipped_recipes_fit_their_gpus(name: str, gpus: int, tokens: float) -> None:
    made = parse_recipe(shipped(name), world_size=gpus, source=name)
    facts = run_facts(made, gpus)
    assert facts["memory_per_gpu"]["total"] < 72 * 2**30
    assert not any("more than an H100's" in warning for warning in facts["warnings"])
    assert facts["run"]["tokens"] == pytest.approx(tokens, rel=0.001)
    assert sum(stage["tokens"] for stage in facts["stages"]) == facts["run"]["tokens"]
    # On one tensor-parallel rank a GPU they would not fit.
    flags = {**made.megatron, "tensor-model-parallel-size": 1, "expert-model-parallel-size": 1}
    flags.pop("use-distributed-optimizer")
    alone = gpu_memory(made, ranks_of(flags, []), gpus)
    assert alone["total"] > 80 * 2**30


def test_what_will_not_fit_is_told() -> None:
    raw = shipped("nemotron_nano_v2_12b_to_9b_6b")
    raw["megatron"]["context-parallel-size"] = 1
    raw["elastic"]["stages"][1]["micro_batch_size"] = 4
    facts = run_facts(parse_recipe(raw, world_size=64), 64)
    assert any("more than an H100's 80 GiB" in warning for warning in facts["warnings"])
