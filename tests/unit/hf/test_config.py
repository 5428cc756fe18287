"""`config.json` of nemotron_h: read by every name, written for every reader, all faults in one message."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from megatron_elastic import cost_model
from megatron_elastic.errors import HFError
from megatron_elastic.flags import model_shape
from megatron_elastic.hf.config import export_warnings, make_config, read_config
from megatron_elastic.layout import ModelShape
from tests.unit.hf.folders import CONFIGS, DENSE, MOE

NANO_30B: dict[str, Any] = {
    "model_type": "nemotron_h", "hidden_size": 2688, "vocab_size": 131072, "num_hidden_layers": 52,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", "num_attention_heads": 32,
    "num_key_value_heads": 2, "head_dim": 128, "mamba_num_heads": 64, "mamba_head_dim": 64, "n_groups": 8,
    "ssm_state_size": 128, "conv_kernel": 4, "n_routed_experts": 128, "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712, "num_experts_per_tok": 6, "routed_scaling_factor": 2.5,
}  # fmt: skip
TODAY = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
OLDER = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


def without(config: dict[str, Any], *fields: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in fields}


def faults(config: dict[str, Any]) -> list[str]:
    with pytest.raises(HFError) as caught:
        read_config(config)
    return caught.value.faults


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("names", [TODAY, OLDER], ids=["today", "older"])
def test_layers_go_by_any_of_their_names(config: dict[str, Any], names: dict[str, str]) -> None:
    by_pattern = read_config(config)
    types = [names[kind] for kind in config["hybrid_override_pattern"]]
    named = read_config({**without(config, "hybrid_override_pattern"), "layers_block_type": types})
    assert named.shape == by_pattern.shape
    assert named.flags == by_pattern.flags
    other = read_config({**without(config, "hybrid_override_pattern"), "layers_block_type": types[::-1]})
    assert other.shape != by_pattern.shape


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_flags_describe_the_shape(config: dict[str, Any]) -> None:
    found: list[str] = []
    model = read_config(config)
    assert model_shape(model.flags, found) == model.shape
    assert not found


def test_the_published_size_comes_out() -> None:
    shape = read_config(NANO_30B).shape
    assert cost_model.parameters(shape, shape.full) == 31_577_937_344
    assert cost_model.parameters(shape, shape.full, active=True) == 3_580_073_408


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_written_is_read_back(config: dict[str, Any]) -> None:
    model = read_config(config)
    made = make_config(model.shape, model.flags, model.raw, "float32")
    again = read_config(made)
    assert (again.shape, again.flags) == (model.shape, model.flags)
    # What is no size is the source's; code that came with it is not asked for.
    assert made["max_position_embeddings"] == 77
    assert made["eos_token_id"] == 11
    assert "auto_map" not in made
    # Every reader's names at once.
    assert made["hybrid_override_pattern"] == config["hybrid_override_pattern"]
    assert made["layers_block_type"] == [OLDER[kind] for kind in config["hybrid_override_pattern"]]
    assert made["num_hidden_layers"] == len(config["hybrid_override_pattern"])


def puzzle(**sizes: Any) -> ModelShape:
    return replace(read_config({**MOE, "hybrid_override_pattern": "ME*E-M-*"}).shape, **sizes)


@pytest.mark.parametrize(
    ("sizes", "warned"),
    [
        ({"experts": (8, 4)}, "vLLM"),
        ({"expert_ffn": (8, 2), "ffn": (16, 8)}, "vLLM"),
        ({"mamba_heads": (8, 4)}, "no engine"),
        ({"attention_heads": (8, 4)}, "no engine"),
    ],
)
def test_layers_that_differ_are_blocks(sizes: dict[str, Any], warned: str) -> None:
    shape = puzzle(**sizes)
    flags = read_config(MOE).flags
    made = make_config(shape, flags, MOE, "float32")
    assert made["model_type"] == "nemotron_h_puzzle"
    assert made["architectures"] == ["NemotronHPuzzleForCausalLM"]
    assert [block["block_type"] for block in made["block_configs"]] == made["layers_block_type"]
    assert read_config(made).shape == shape
    assert any(warned in warning for warning in export_warnings(shape))
    assert not export_warnings(puzzle())
    assert "block_configs" not in make_config(puzzle(), flags, made, "float32")


def test_a_model_of_this_package_alone_is_described() -> None:
    shape = read_config(DENSE).shape
    made = make_config(shape, read_config(DENSE).flags, {}, "bfloat16", 512)
    assert read_config(made).shape == shape
    assert (made["dtype"], made["max_position_embeddings"], made["eos_token_id"]) == ("bfloat16", 512, None)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"vocab_size": None}, "vocab_size: required"),
        ({"hidden_size": "12"}, "hidden_size: '12' must be a whole number"),
        ({"mamba_num_heads": 7}, "mamba_heads 7 must be a multiple of mamba_groups 2"),
        ({"use_bias": True}, "use_bias True"),
        ({"tie_word_embeddings": True}, "tied embeddings"),
        ({"conv_kernel": 3}, "conv_kernel 3"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06"),
        ({"time_step_limit": [0.001, 0.1]}, "time_step_limit"),
        ({"mlp_hidden_act": "silu"}, "squared ReLU"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, 4 layers are named"),
        ({"layers_block_type": ["mamba"] * 4}, "named differently"),
        ({"layers_block_type": ["mamba", "mlp", "rnn", "mamba"]}, "['rnn'] are no layer types"),
        ({"hybrid_override_pattern": "M-*X"}, "its letters must be of"),
        ({"num_nextn_predict_layers": 1}, "multi-token prediction"),
        ({"quantization_config": {"bits": 8}}, "quantised"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
    ],
)
def test_a_fault_is_told(changed: dict[str, Any], told: str) -> None:
    assert any(told in fault for fault in faults({**DENSE, **changed}))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob False with num_experts_per_tok 2"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob True with num_experts_per_tok 1"),
        ({"num_experts_per_tok": 9}, "top_k 9"),
        ({"n_group": 2}, "n_group 2"),
        ({"moe_latent_size": 4}, "latent space"),
        ({"n_routed_experts": None}, "n_routed_experts: required"),
    ],
)
def test_a_fault_of_experts_is_told(changed: dict[str, Any], told: str) -> None:
    assert any(told in fault for fault in faults({**MOE, **changed}))


def test_all_faults_are_told_at_once() -> None:
    found = faults({**MOE, "use_bias": True, "vocab_size": 0, "n_group": 4, "head_dim": None})
    assert len(found) == 4


def test_it_needs_no_torch() -> None:
    code = (
        "import sys, megatron_elastic.hf.config; print({'torch', 'transformers', 'megatron.core'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
