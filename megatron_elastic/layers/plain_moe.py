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


def moe_layer_spec(
    norm: Any,
    column: Any = ElasticColumnParallelLinear,
    row: Any = ElasticRowParallelLinear,
    experts: Any = SequentialMLP,
) -> ModuleSpec:
    """Core's MoE layer (`E`) on these classes: of a norm, of the shared expert's linears, and of the routed experts."""
    local = MLPSubmodules(linear_fc1=ElasticColumnParallelLinear, linear_fc2=ElasticRowParallelLinear)
    shared = MLPSubmodules(linear_fc1=column, linear_fc2=row)
    submodules = MoESubmodules(
        experts=partial(experts, submodules=local), shared_experts=partial(SharedExpertMLP, submodules=shared)
    )
    return ModuleSpec(
        module=MoETransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=norm, mlp=partial(MoELayer, submodules=submodules), mlp_bda=get_bias_dropout_add
        ),
    )
