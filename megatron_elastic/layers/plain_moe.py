"""The plain (not elastic) mixture-of-experts layer on core's local backend."""

from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayerSubmodules

from megatron_elastic.layers.linear import ElasticColumnParallelLinear, ElasticRowParallelLinear


def moe_layer_spec(norm: Any) -> ModuleSpec:
    """Core's MoE layer (`E`) on local modules with the given norm, its experts one after the other."""
    linears = MLPSubmodules(linear_fc1=ElasticColumnParallelLinear, linear_fc2=ElasticRowParallelLinear)
    submodules = MoESubmodules(
        experts=partial(SequentialMLP, submodules=linears), shared_experts=partial(SharedExpertMLP, submodules=linears)
    )
    return ModuleSpec(
        module=MoETransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=norm, mlp=partial(MoELayer, submodules=submodules), mlp_bda=get_bias_dropout_add
        ),
    )
