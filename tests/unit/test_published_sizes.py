"""The cost formula against published models, `transformers`' own modules and modelopt's count."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_elastic.budget import Selection
from megatron_elastic.config import load_recipe
from megatron_elastic.cost_model import parameters
from megatron_elastic.hf.config import read_config
from megatron_elastic.layout import ModelShape
from megatron_elastic.planning import propose, restricted
from tests.unit import published

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
# Total and active parameters as modelopt 0.47.0's `mcore_param_count` gives them, and as published, in billions.
SIZES = {
    "nemotron_nano_v2_12b": (12_310_001_152, 12_310_001_152, 12.31, 12.31),
    "nemotron_nano_v2_9b": (8_888_227_328, 8_888_227_328, 8.89, 8.89),
    "nemotron_3_nano_4b": (3_973_556_832, 3_973_556_832, 3.97, 3.97),
    "nemotron_3_nano_30b_a3b": (31_577_937_344, 3_580_073_408, 31.58, 3.58),
}


def counts(shape: ModelShape) -> tuple[int, int]:
    return parameters(shape, shape.full), parameters(shape, shape.full, active=True)


def modelopt_counts(shape: ModelShape) -> tuple[int, int]:
    stats = pytest.importorskip("modelopt.torch.nas.plugins.megatron_model_stats")
    config = SimpleNamespace(
        hidden_size=shape.hidden, num_layers=len(shape.pattern), ffn_hidden_size=shape.ffn or 1,
        num_attention_heads=shape.attention_heads or 1, num_query_groups=shape.query_groups, kv_channels=shape.head_dim,
        num_moe_experts=shape.experts or None, moe_router_topk=shape.top_k, moe_ffn_hidden_size=shape.expert_ffn,
        moe_shared_expert_intermediate_size=shape.shared_expert_ffn or None, mamba_num_heads=shape.mamba_heads,
        mamba_head_dim=shape.mamba_head_dim, mamba_num_groups=shape.mamba_groups, mamba_state_dim=shape.mamba_state,
        gated_linear_unit=shape.gated, add_bias_linear=False, normalization="RMSNorm",
    )  # fmt: skip
    total, active = stats.mcore_param_count(config, shape.vocab, hybrid_layer_pattern=shape.pattern)
    return total, active


@pytest.mark.parametrize("name", published.NAMES)
def test_published_sizes(name: str) -> None:
    total, active, billions, active_billions = SIZES[name]
    assert counts(published.shape(name)) == (total, active)
    assert (round(total / 1e9, 2), round(active / 1e9, 2)) == (billions, active_billions)


@pytest.mark.parametrize("name", published.NAMES)
def test_configurations_are_read_as_they_are(name: str) -> None:
    assert read_config(published.DATA / name).shape == published.shape(name)


@pytest.mark.parametrize("name", published.NAMES)
def test_modelopt_counts_the_same(name: str) -> None:
    """Where nvidia-modelopt is installed; its numbers for the published models stand in `SIZES` for everybody else."""
    assert modelopt_counts(published.shape(name)) == SIZES[name][:2]


def small_shapes() -> st.SearchStrategy[ModelShape]:
    """Parents that `transformers`' NemotronH can hold: squared ReLU, one shared expert."""
    return st.builds(
        lambda pattern, hidden, heads, head_dim, channels, states, ffn, experts, shared: ModelShape(
            pattern=pattern, vocab=16, hidden=4 * hidden, ffn=ffn, attention_heads=2 * heads, query_groups=2,
            head_dim=head_dim, mamba_heads=2 * heads, mamba_head_dim=channels, mamba_groups=2, mamba_state=states,
            experts=experts, expert_ffn=ffn + 1, shared_expert_ffn=shared, top_k=2, expert_bias=True,
        ),
        st.text("M*-E", min_size=1, max_size=6), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4),
        st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(2, 5), st.integers(1, 9),
    )  # fmt: skip


@settings(max_examples=25)
@given(shape=small_shapes())
def test_modelopt_counts_any_shape_the_same(shape: ModelShape) -> None:
    assert modelopt_counts(shape) == counts(shape)


def transformers_count(raw: dict[str, Any]) -> int:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**raw))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def built() -> list[tuple[int, int]]:
    """Parameters of each published model as `transformers` builds it, and of one with fewer heads.

    In a process of its own: on the meta device they take no memory, but where a test has installed the CPU adaptation
    the meta device is not what it was.
    """
    script = (
        "import json, sys\n"
        "from tests.unit.test_published_sizes import transformers_count\n"
        "print(json.dumps([[transformers_count(raw) for raw in pair] for pair in json.load(sys.stdin)]))"
    )
    raws = [published.config(name) for name in published.NAMES]
    pairs = [[raw, {**raw, "mamba_num_heads": raw["mamba_num_heads"] - 8}] for raw in raws]
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(pairs), capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[tuple[int, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", published.NAMES)
def test_transformers_has_as_many_parameters(name: str, built: list[tuple[int, int]]) -> None:
    shape = published.shape(name)
    count, narrower = built[list(published.NAMES).index(name)]
    assert count == parameters(shape, shape.full)
    assert narrower != parameters(shape, shape.full)


@settings(max_examples=12)
@given(shape=small_shapes())
def test_transformers_has_as_many_parameters_at_any_size(shape: ModelShape) -> None:
    raw = {
        **published.config("nemotron_3_nano_30b_a3b"),
        "hybrid_override_pattern": shape.pattern, "num_hidden_layers": len(shape.pattern), "vocab_size": shape.vocab,
        "hidden_size": shape.hidden, "intermediate_size": shape.ffn, "num_attention_heads": shape.attention_heads,
        "num_key_value_heads": shape.query_groups, "head_dim": shape.head_dim, "mamba_num_heads": shape.mamba_heads,
        "mamba_head_dim": shape.mamba_head_dim, "n_groups": shape.mamba_groups, "ssm_state_size": shape.mamba_state,
        "n_routed_experts": shape.experts, "moe_intermediate_size": shape.expert_ffn, "num_experts_per_tok": 2,
        "moe_shared_expert_intermediate_size": shape.shared_expert_ffn,
    }  # fmt: skip
    assert transformers_count(raw) == parameters(shape, shape.full)


def test_the_published_4b_is_a_selection_of_the_9b() -> None:
    large, small = published.shape("nemotron_nano_v2_9b"), published.shape("nemotron_3_nano_4b")
    family = load_recipe(RECIPES / "nemotron_nano_v2_9b_to_4b.yaml").family
    assert family.shape == large
    kept = {"hidden": 3136, "ffn": 12544, "mamba_heads": 96, "mamba_head_dim": 80, "attention_heads": 40, "depth": 42}
    selection = family.select(kept)
    assert selection.submodel(large) == small
    assert family.selection_cost(selection) == SIZES["nemotron_3_nano_4b"][0]
    # Its four attention layers are all kept.
    assert len(selection.skipped) == 56 - 42
    assert all(large.pattern[number] != "*" for number in selection.skipped)
    # `plan --target 3.97e9` lists it, and with its depth held nothing is more balanced.
    found = propose(family, 3.97e9, count=5, tolerance=0.005)
    assert selection in found
    assert propose(restricted(family, {"depth": 42}), 3.97e9, tolerance=0.005) == [selection]
    wider = family.select({**kept, "depth": 44})
    assert wider not in found
    assert wider.submodel(large) != small


def test_nothing_near_without_depth() -> None:
    family = load_recipe(RECIPES / "nemotron_nano_v2_9b_to_4b.yaml").family
    whole = propose(restricted(family, {"depth": 56}), 3.97e9, count=5)
    assert all(each.submodel(family.shape).pattern != published.shape("nemotron_3_nano_4b").pattern for each in whole)


def test_depths_that_nobody_ranked_are_left_out() -> None:
    family = replace(load_recipe(RECIPES / "nemotron_nano_v2_9b_to_4b.yaml").family, depth_ranking=())
    assert {each.skipped for each in propose(family, 3.97e9, count=10, tolerance=0.005)} == {()}


def test_the_9b_is_a_selection_of_the_12b_in_sizes_and_depth() -> None:
    large, small = published.shape("nemotron_nano_v2_12b"), published.shape("nemotron_nano_v2_9b")
    # Every published layer has its place: the first of its kind that follows the one before.
    kept, start = [], 0
    for kind in small.pattern:
        kept.append(large.pattern.index(kind, start))
        start = kept[-1] + 1
    skipped = tuple(number for number in range(len(large.pattern)) if number not in kept)
    selection = Selection(
        hidden=4480, ffn=15680, mamba_heads=128, mamba_head_dim=80, attention_heads=40, skipped=skipped
    )
    assert selection.submodel(large) == small
    assert [large.pattern[number] for number in skipped].count("*") == 2
