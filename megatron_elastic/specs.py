"""The elastic hybrid layer spec: what Megatron's hybrid model builder is given instead of its own."""

from functools import partial

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

from megatron_elastic.family import Family
from megatron_elastic.layers.attention import ElasticAttentionLayer, ElasticSelfAttention, NoCoreAttention
from megatron_elastic.layers.linear import ElasticColumnParallelLinear, ElasticRowParallelLinear
from megatron_elastic.layers.mamba import ElasticMambaLayer, ElasticMambaMixer
from megatron_elastic.layers.mlp import ElasticMLP, ElasticMLPLayer
from megatron_elastic.layers.moe import ElasticExperts, ElasticMoE, ElasticMoELayer, ElasticSharedExpert
from megatron_elastic.layers.moe_router import ElasticRouter
from megatron_elastic.layers.norm import ElasticGatedNorm, ElasticRMSNorm
from megatron_elastic.layers.stack import ElasticStack
from megatron_elastic.precision import Precision


def elastic_stack_spec(family: Family, precision: Precision | None = None) -> ModuleSpec:
    """The spec of an elastic stack for one family: elastic layers of every kind on the local backend.

    Args:
        family: what is narrowed.
        precision: FP8 of the linear layers.
    """
    mamba = ModuleSpec(
        module=ElasticMambaLayer,
        submodules=MambaLayerSubmodules(
            norm=ElasticRMSNorm,
            mixer=ModuleSpec(
                module=ElasticMambaMixer,
                params={"gated_norm": ElasticGatedNorm},
                submodules=MambaMixerSubmodules(in_proj=ElasticColumnParallelLinear, out_proj=ElasticRowParallelLinear),
            ),
            mamba_bda=IdentityFuncOp,
        ),
    )
    attention = ModuleSpec(
        module=ElasticAttentionLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ElasticRMSNorm,
            self_attention=ModuleSpec(
                module=ElasticSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ElasticColumnParallelLinear,
                    core_attention=NoCoreAttention,
                    linear_proj=ElasticRowParallelLinear,
                ),
            ),
        ),
    )
    linears = MLPSubmodules(linear_fc1=ElasticColumnParallelLinear, linear_fc2=ElasticRowParallelLinear)
    mlp = ModuleSpec(
        module=ElasticMLPLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=ElasticRMSNorm,
            mlp=partial(ElasticMLP.as_mlp_submodule, submodules=linears),
        ),
    )
    experts = MoESubmodules(
        router=ElasticRouter,
        experts=partial(ElasticExperts, submodules=linears),
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
