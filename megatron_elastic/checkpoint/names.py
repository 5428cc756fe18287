"""How Megatron names and keeps what is in a `torch_dist` checkpoint."""

import re
from dataclasses import dataclass

import torch

TRACKER = "latest_checkpointed_iteration.txt"
CHECKPOINT_VERSION = 3.0
"""Version of Megatron's own checkpoint content, which the loader asks for."""

INDEX = ".metadata"
"""Torch's file that says which part of which tensor lies where."""
CONFIG = "metadata.json"
"""Core's file that says what format this is; written when everything but the manifest is there."""
MANIFEST = "integrity.json"
"""Core's file of SHA-256 digests (`--verify-integrity`), written last."""

COMMON_STATE = "common_state/shard_0_1"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}

STATE_OF_A_RUN = ("optimizer", "opt_param_scheduler", "rng_state", "rerun_state_machine")
"""Common entries that say nothing without the optimizer's tensors."""

STORED_IN_PARTS = {
    "mixer.in_proj.weight": ("mixer.in_proj.weight", ("z", "x", "B", "C", "dt")),
    "mixer.conv1d_weight": ("mixer.conv1d.weight", ("x", "B", "C")),
    "mixer.conv1d_bias": ("mixer.conv1d.bias", ("x", "B", "C")),
}
"""What Megatron stores in parts along dimension 0: end of the stock name -> (end of the stored name, parts)."""

FUSED_NORMS = {
    "mixer.in_proj.layer_norm_weight": "norm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Norms that Transformer Engine fuses into a linear layer: end of the stored name -> end of the stock name."""

LINEAR = re.compile(r"(\.(in_proj|out_proj|linear_qkv|linear_proj|linear_fc1|linear_fc2)|^output_layer)\.weight$")
"""Weights of core's linear layers, which save an empty extra state beside them and ask for it when they load."""


_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")
_EXPERTS = ".experts.experts."
"""Routed experts: a module each in the model, one tensor `[experts, ...]` in a checkpoint."""


def expert_of(module: str) -> tuple[str, int | None]:
    """Stock name of a module's parameter, and which of its experts it is; None where it is no routed expert's."""
    found = _EXPERT.search(module)
    if found is None:
        return module, None
    return f"{module[: found.start()]}{_EXPERTS}{module[found.end() :]}", int(found[1])


def extra_states(stock: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Keys of the empty extra states that core saves beside a parameter: one for every expert of a routed one."""
    if not LINEAR.search(stock):
        return ()
    count = shape[0] if _EXPERTS in stock else 1
    return tuple(f"{stock.removesuffix('weight')}_extra_state/shard_{number}_{count}" for number in range(count))


def stored_names(stock: str) -> tuple[str, ...]:
    """Names that Megatron stores a parameter under, part after part; the stock name alone where it is stored whole."""
    for end, (stored, parts) in STORED_IN_PARTS.items():
        if stock.endswith(f".{end}"):
            return tuple(f"{stock.removesuffix(end)}{stored}.{part}" for part in parts)
    return (stock,)


def stock_name(stored: str) -> str:
    """The parameter that a stored tensor is, or is a part of."""
    parent, _, part = stored.rpartition(".")
    for end, (whole, parts) in STORED_IN_PARTS.items():
        if parent.endswith(f".{whole}") and part in parts:
            return f"{parent.removesuffix(whole)}{end}"
    fused = next((end for end in FUSED_NORMS if stored.endswith(f".{end}")), None)
    return stored if fused is None else f"{stored.removesuffix(fused)}{FUSED_NORMS[fused]}"


NOT_OF_THE_MODEL = re.compile(r"^((chained_\d+\.)?optimizer\.|rng_state|rerun_state)")
"""Stored names that belong to the optimizer or the run."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a whole tensor, whatever shards it is stored in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
