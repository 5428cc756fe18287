"""Megatron's arguments in a checkpoint: what they say of the model, and the few that a checkpoint made here needs."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_elastic.checkpoint.reading import read_common
from megatron_elastic.errors import CheckpointError

_OF_THE_MODEL = (
    *("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "group_query_attention"),
    *("kv_channels", "mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim"),
    *("hybrid_layer_pattern", "vocab_size", "make_vocab_size_divisible_by", "tokenizer_type", "tokenizer_model"),
    *("normalization", "position_embedding_type", "rotary_percent", "rotary_base", "squared_relu", "swiglu"),
    *("num_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_router_topk"),
    *("moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor"),
    *("moe_router_enable_expert_bias", "moe_router_dtype", "moe_router_num_groups", "moe_router_group_topk"),
    "untie_embeddings_and_output_weights",
)
"""Arguments that are flags under the same name."""


def model_flags(path: Path) -> dict[str, Any]:
    """Model flags of a checkpoint that Megatron itself wrote, from the arguments stored in it.

    Raises:
        CheckpointError: it has no arguments, or is no hybrid model.
    """
    stored = read_common(path).get("args")
    if not isinstance(stored, Namespace | Mapping):
        raise CheckpointError(f"{path}: neither a description nor Megatron's arguments inside: it cannot be built")
    args = vars(stored) if isinstance(stored, Namespace) else dict(stored)
    if not args.get("hybrid_layer_pattern"):
        raise CheckpointError(f"{path}: not a hybrid model (its arguments have no hybrid_layer_pattern)")
    flags = {name.replace("_", "-"): args[name] for name in _OF_THE_MODEL if args.get(name) is not None}
    flags["disable-bias-linear"] = not args.get("add_bias_linear", True)
    flags["norm-epsilon"] = args.get("layernorm_epsilon", 1e-5)
    # Already padded, for the layout it was trained on.
    flags.update({"vocab-size": args["padded_vocab_size"], "make-vocab-size-divisible-by": 1})
    return flags


def model_arguments(flags: Mapping[str, Any]) -> Namespace:
    """The arguments that Megatron asks a checkpoint for, and those that `model_flags` reads, of a run not begun.

    Args:
        flags: of a model whose vocabulary is not padded.
    """
    args = {flag.replace("-", "_"): value for flag, value in flags.items()}
    return Namespace(
        **{name: args.get(name) for name in _OF_THE_MODEL},
        num_layers=len(flags["hybrid-layer-pattern"]),
        padded_vocab_size=flags["vocab-size"],
        add_bias_linear=not flags["disable-bias-linear"],
        layernorm_epsilon=flags["norm-epsilon"],
        iteration=0,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
    )
