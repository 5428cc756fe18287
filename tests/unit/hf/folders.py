"""Small models in Hugging Face's format for tests: every number differs from every other."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_elastic.checkpoint import LazyTensor
from megatron_elastic.hf.config import read_config
from megatron_elastic.hf.names import RELEASED, parameters
from megatron_elastic.hf.tensors import read_folder, write_folder

DENSE: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "hybrid_override_pattern": "M-*M",
    "vocab_size": 20, "hidden_size": 12, "intermediate_size": 16, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 3, "mamba_num_heads": 8, "mamba_head_dim": 4, "n_groups": 2, "ssm_state_size": 3, "conv_kernel": 4,
    "layer_norm_epsilon": 1e-5, "mlp_hidden_act": "relu2", "torch_dtype": "float32", "max_position_embeddings": 77,
    "eos_token_id": 11, "time_step_limit": [0.0, float("inf")], "auto_map": {"AutoConfig": "evil.NemotronHConfig"},
}  # fmt: skip
MOE: dict[str, Any] = {
    **DENSE, "hybrid_override_pattern": "ME*E-", "n_routed_experts": 8, "moe_intermediate_size": 8,
    "moe_shared_expert_intermediate_size": 6, "num_experts_per_tok": 2, "routed_scaling_factor": 2.5,
    "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
CONFIGS = {"dense": DENSE, "moe": MOE}
FILES = {
    "tokenizer.json": b'{"model": {}}\n',
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b'{"eos_token": "</s>"}',
    "generation_config.json": b'{"eos_token_id": 11}',
    "chat_template.jinja": b"{{ messages }}\r\n",
    "LICENSE": b"do as you like",
}
CODE = "raise SystemExit('code that came with a model was run')\n"


def weights(config: dict[str, Any], first: str = RELEASED, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every tensor of a model, in released form."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for parameter in parameters(read_config(config).shape, first):
        for piece in parameter.pieces:
            kept = torch.float32 if piece.name.endswith("e_score_correction_bias") else dtype
            found[piece.name] = torch.randn(piece.shape, generator=generator).to(kept)
    return found


def save(folder: Path, tensors: dict[str, Tensor], shard_bytes: int = 6000) -> None:
    """Safetensors in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lazy = {k: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for k, t in tensors.items()}  # type: ignore[misc]
    write_folder(folder, lazy, shard_bytes)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> Path:
    """A released model: shards, configuration, tokenizer, and code that must never be run."""
    save(folder, weights(config) if tensors is None else tensors)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "evil.py").write_text(CODE)
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor in a folder."""
    return {name: entry.read() for name, entry in read_folder(folder).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether names, shapes, types and all bits agree."""
    return set(a) == set(b) and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k].view(-1), b[k].view(-1)) for k in a
    )
