"""A small plain hybrid model on CPU ranks, for tests. Import it after the CPU adaptation is installed."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_elastic.layers.plain import plain_stack_spec

PATTERN = "M-M*"
VOCABULARY = 64
SEQUENCE = 37


def config(*, dtype: torch.dtype = torch.float32, tensor_parallel: int = 1, **other: Any) -> TransformerConfig:
    """Two Mamba layers, one MLP, one attention layer; sizes that differ from each other."""
    return TransformerConfig(
        **{
            "num_layers": len(PATTERN),
            "hidden_size": 48,
            "ffn_hidden_size": 80,
            "num_attention_heads": 8,
            "num_query_groups": 2,
            "kv_channels": 4,
            "mamba_num_heads": 8,
            "mamba_head_dim": 6,
            "mamba_num_groups": 2,
            "mamba_state_dim": 10,
            "normalization": "RMSNorm",
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "attention_softmax_in_fp32": False,
            "params_dtype": dtype,
            "pipeline_dtype": dtype,
            "bf16": dtype is torch.bfloat16,
            "tensor_model_parallel_size": tensor_parallel,
            "sequence_parallel": False,
            "gradient_accumulation_fusion": False,
            "masked_softmax_fusion": False,
            "bias_dropout_fusion": False,
            **other,
        }
    )


def build(*, dtype: torch.dtype = torch.float32, tensor_parallel: int = 1, seed: int = 11, **other: Any) -> HybridModel:
    """The model on this rank; parallel groups are made anew."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
    model_parallel_cuda_manual_seed(seed)
    return HybridModel(
        config=config(dtype=dtype, tensor_parallel=tensor_parallel, **other),
        hybrid_stack_spec=plain_stack_spec,
        vocab_size=VOCABULARY,
        max_sequence_length=64,
        hybrid_layer_pattern=PATTERN,
        parallel_output=False,
    )


def batch(seed: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, positions `[2, SEQUENCE]` and the causal mask `[1, 1, SEQUENCE, SEQUENCE]` (true where hidden)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (2, SEQUENCE), generator=generator)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    return tokens, torch.arange(SEQUENCE).expand(2, -1), mask
