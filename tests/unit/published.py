"""The models whose sizes are published, as configurations in Hugging Face's format under `tests/data`."""

import json
from pathlib import Path
from typing import Any

from megatron_elastic.layout import ModelShape

DATA = Path(__file__).resolve().parents[1] / "data"
NAMES = ("nemotron_nano_v2_12b", "nemotron_nano_v2_9b", "nemotron_3_nano_4b", "nemotron_3_nano_30b_a3b")


def config(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / name / "config.json").read_text())
    return found


def shape(name: str) -> ModelShape:
    """Key by key, so that the package's own reader is compared with it."""
    raw = config(name)
    moe = "E" in raw["hybrid_override_pattern"]
    return ModelShape(
        pattern=raw["hybrid_override_pattern"],
        vocab=raw["vocab_size"],
        hidden=raw["hidden_size"],
        ffn=0 if moe else raw["intermediate_size"],
        attention_heads=raw["num_attention_heads"],
        query_groups=raw["num_key_value_heads"],
        head_dim=raw["head_dim"],
        mamba_heads=raw["mamba_num_heads"],
        mamba_head_dim=raw["mamba_head_dim"],
        mamba_groups=raw["n_groups"],
        mamba_state=raw["ssm_state_size"],
        conv_kernel=raw["conv_kernel"],
        experts=raw["n_routed_experts"] if moe else 0,
        expert_ffn=raw["moe_intermediate_size"] if moe else 0,
        shared_expert_ffn=raw["moe_shared_expert_intermediate_size"] if moe else 0,
        top_k=raw["num_experts_per_tok"] if moe else 0,
        expert_bias=moe,
    )
