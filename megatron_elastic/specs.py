"""The hybrid layer specs of both backends: what Megatron's hybrid model builder is given instead of its own."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityFuncOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_elastic.backend import TRANSFORMER_ENGINE
from megatron_elastic.family import Family
from megatron_elastic.layers.attention import ElasticAttentionLayer, ElasticSelfAttention, NoCoreAttention
from megatron_elastic.layers.linear import ElasticColumnParallelLinear, ElasticRowParallelLinear
from megatron_elastic.layers.mamba import ElasticMambaLayer, ElasticMambaMixer
from megatron_elastic.layers.mlp import ElasticMLP, ElasticMLPLayer
from megatron_elastic.layers.moe import ElasticExperts, ElasticMoE, ElasticMoELayer, ElasticSharedExpert
from megatron_elastic.layers.moe_router import ElasticRouter
from megatron_elastic.layers.norm import ElasticGatedNorm, ElasticRMSNorm
from megatron_elastic.layers.plain import LOCAL_PARTS, PlainParts, plain_stack
from megatron_elastic.layers.sized import sized_stack_spec
from megatron_elastic.layers.stack import ElasticStack
from megatron_elastic.layers.te_attention import TECoreAttention, TEElasticSelfAttention
from megatron_elastic.layers.te_experts import TEElasticExperts
from megatron_elastic.layers.te_linear import TEElasticColumnParallelLinear, TEElasticRowParallelLinear
from megatron_elastic.layout import ModelShape
from megatron_elastic.precision import Precision


@dataclass(frozen=True)
class ElasticParts:
    """The classes in which the backends differ. Norms, the mixer's scan, routers and the LM head are the same.

    Attributes:
        column, row: linears.
        attention: the self-attention of a layer.
        experts: the routed experts of a rank; whatever they run on, they own local linears.
    """

    column: Any
    row: Any
    attention: Any
    experts: Any


LOCAL_ELASTIC = ElasticParts(
    ElasticColumnParallelLinear, ElasticRowParallelLinear, ElasticSelfAttention, ElasticExperts
)
ENGINE_ELASTIC = ElasticParts(
    TEElasticColumnParallelLinear, TEElasticRowParallelLinear, TEElasticSelfAttention, TEElasticExperts
)
ENGINE_PARTS = PlainParts(
    TEElasticColumnParallelLinear, TEElasticRowParallelLinear, TECoreAttention, TEElasticExperts
)
"""A plain layer's linears are elastic ones that are never sliced: what a slice is compared with runs the same way."""


def plain_spec(
    backend: str, shape: ModelShape | None = None, precision: Precision | None = None
) -> ModuleSpec:
    """The spec of a plain stack.

    Args:
        backend: one of `backend.BACKENDS`.
        shape: of a model whose layers may differ; None where they do not.
        precision: FP8 of the local backend; Transformer Engine's is in Megatron's config.
    """
    plain = plain_stack(*((ENGINE_PARTS,) if backend == TRANSFORMER_ENGINE else (LOCAL_PARTS, precision)))
    return plain if shape is None or shape.uniform else sized_stack_spec(shape, plain)


def elastic_stack_spec(family: Family, backend: str, precision: Precision | None = None) -> ModuleSpec:
    """The spec of an elastic stack for one family: elastic layers of every kind.

    Args:
        family: what is narrowed.
        backend: one of `backend.BACKENDS`.
        precision: FP8 of the local backend; Transformer Engine's is in Megatron's config.
    """
    parts = ENGINE_ELASTIC if backend == TRANSFORMER_ENGINE else LOCAL_ELASTIC
    mamba = ModuleSpec(
        module=ElasticMambaLayer,
        submodules=MambaLayerSubmodules(
            norm=ElasticRMSNorm,
            mixer=ModuleSpec(
                module=ElasticMambaMixer,
                params={"gated_norm": ElasticGatedNorm},
                submodules=MambaMixerSubmodules(in_proj=parts.column, out_proj=parts.row),
            ),
            mamba_bda=IdentityFuncOp,
        ),
    )
    attention = ModuleSpec(
        module=ElasticAttentionLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ElasticRMSNorm,
            self_attention=ModuleSpec(
                module=parts.attention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.column, core_attention=NoCoreAttention, linear_proj=parts.row
                ),
            ),
        ),
    )
    linears = MLPSubmodules(linear_fc1=parts.column, linear_fc2=parts.row)
    local = MLPSubmodules(linear_fc1=ElasticColumnParallelLinear, linear_fc2=ElasticRowParallelLinear)
    mlp = ModuleSpec(
        module=ElasticMLPLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=ElasticRMSNorm,
            mlp=partial(ElasticMLP.as_mlp_submodule, submodules=linears),
        ),
    )
    experts = MoESubmodules(
        router=ElasticRouter,
        experts=partial(parts.experts, submodules=local),
        shared_experts=partial(ElasticSharedExpert, submodules=linears),
    )
    moe = ModuleSpec(
        module=ElasticMoELayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=ElasticRMSNorm, mlp=partial(ElasticMoE, submodules=experts)
        ),
    )
    layers = HybridStackSubmodules(mamba_layer=mamba, attention_layer=attention, mlp_layer=mlp, moe_layer=moe)
    return ModuleSpec(module=ElasticStack, params={"family": family, "precision": precision}, submodules=layers)
