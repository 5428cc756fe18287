"""A plain model whose layers of one kind differ in size: what a heterogeneous selection is cut into.

Megatron's flags give one size for all layers. Here every layer is built with a copy of the config that has its own.
"""

import copy
from dataclasses import replace
from typing import Any

from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer

from megatron_elastic.layers.plain import LocalHybridStack, plain_stack_spec
from megatron_elastic.layout import ModelShape

CONFIG_FIELDS = {
    "ffn": "ffn_hidden_size",
    "mamba_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "attention_heads": "num_attention_heads",
    "experts": "num_moe_experts",
    "expert_ffn": "moe_ffn_hidden_size",
    "shared_expert_ffn": "moe_shared_expert_intermediate_size",
}
"""Axis -> the field of Megatron's config that holds its size."""


def layer_config(config: TransformerConfig, shape: ModelShape, number: int) -> TransformerConfig:
    """A copy of the config with the sizes of the layer `number` (from 0)."""
    own = copy.copy(config)
    for axis, size in shape.layer(number).items():
        if axis != "hidden":
            setattr(own, CONFIG_FIELDS[axis], size)
    return own


class _Sized:
    """Gives the class after it in the order of bases a config of its own."""

    def __init__(self, config: Any, *args: Any, shape: ModelShape, layer_number: int = 1, **kwargs: Any) -> None:
        own = layer_config(config, shape, layer_number - 1)
        super().__init__(own, *args, layer_number=layer_number, **kwargs)  # type: ignore[call-arg]


class SizedMambaLayer(_Sized, MambaLayer):
    """Core's Mamba layer at its own size."""


class SizedAttentionLayer(_Sized, TransformerLayer):
    """Core's attention layer at its own size."""


class SizedMLPLayer(_Sized, MLPLayer):
    """Core's MLP layer at its own size."""


class SizedMoELayer(_Sized, MoETransformerLayer):
    """Core's MoE layer at its own size."""


def sized_stack_spec(shape: ModelShape, plain: ModuleSpec = plain_stack_spec) -> ModuleSpec:
    """A plain stack for a shape whose layers differ."""
    layers, own = plain.submodules, {"shape": shape}
    return ModuleSpec(
        module=LocalHybridStack,
        params=plain.params,
        submodules=replace(
            layers,
            mamba_layer=ModuleSpec(module=SizedMambaLayer, params=own, submodules=layers.mamba_layer.submodules),
            attention_layer=ModuleSpec(
                module=SizedAttentionLayer, params=own, submodules=layers.attention_layer.submodules
            ),
            mlp_layer=ModuleSpec(module=SizedMLPLayer, params=own, submodules=layers.mlp_layer.submodules),
            moe_layer=ModuleSpec(module=SizedMoELayer, params=own, submodules=layers.moe_layer.submodules),
        ),
    )
