"""The plain (not elastic) hybrid model on core's local backend: no Transformer Engine, no mamba-ssm, any device.

`--spec megatron_elastic.layers.plain plain_stack_spec` gives it to Megatron's own training. Parameter and checkpoint
names are those of core's layers with separate norms. Linear layers are core's too, until a stack quantises them.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.mamba_context_parallel import MambaContextParallel
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

from megatron_elastic.errors import ElasticError
from megatron_elastic.layers.context_parallel import slices_of_rank, whole_sequence
from megatron_elastic.layers.linear import ElasticColumnParallelLinear, ElasticRowParallelLinear
from megatron_elastic.layers.packing import documents_of
from megatron_elastic.layers.plain_moe import moe_layer_spec
from megatron_elastic.ops.causal_conv import causal_conv1d_silu
from megatron_elastic.ops.gated_norm import gated_rms_norm
from megatron_elastic.ops.norm import rms_norm
from megatron_elastic.ops.ssd import ssd
from megatron_elastic.precision import Precision, Scaling

GATED_NORM_EPSILON = 1e-5
"""Epsilon of the gated norm: a constant in core's Mamba mixer, not `layernorm_epsilon`."""


SSD_CHUNK = 64
"""Tokens per chunk of the torch scan; core's 128 suits its kernels. It changes the result by rounding only."""


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32, or as it is in fp64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextlib.contextmanager
def without_mamba_kernels() -> Iterator[None]:
    """Lets core's `MambaMixer` be constructed without mamba-ssm.

    Its constructor refuses where the kernels are missing, although only its forward needs them. The module's flag is
    raised for the length of the constructor and put back.
    """
    before = mamba_mixer.HAVE_MAMBA_SSM
    mamba_mixer.HAVE_MAMBA_SSM = True
    try:
        yield
    finally:
        mamba_mixer.HAVE_MAMBA_SSM = before


class LocalRMSNorm(torch.nn.Module):
    """RMSNorm over the hidden dimension, with the signature that Megatron's layers build a norm with.

    Its weight is replicated over tensor parallel ranks; with sequence parallelism each holds a part of its gradient,
    which core sums because of the attribute `sequence_parallel`.

    Raises:
        ElasticError: for another normalization, or one centred at zero.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """Builds a weight of ones `[hidden_size]`; `eps` is added to the mean square."""
        super().__init__()
        if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
            raise ElasticError(
                f"normalization {config.normalization!r} (zero-centred: {config.layernorm_zero_centered_gamma}) has no "
                "local layer: use --normalization RMSNorm without --apply-layernorm-1p"
            )
        self.eps = eps
        weight: Any = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        weight.sequence_parallel = config.sequence_parallel
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised `x` `[s, b, h]`, same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


class GatedNorm(torch.nn.Module):
    """RMSNorm of `y * silu(z)` inside each SSM group, over the channels of this tensor parallel rank."""

    def __init__(self, config: TransformerConfig, width: int, groups: int, tp_group: Any) -> None:
        """Builds a weight of ones.

        Args:
            config: for the dtype of the weight.
            width: channels on this rank.
            groups: SSM groups on this rank.
            tp_group: the tensor parallel group that the channels are sharded over.
        """
        super().__init__()
        self.groups = groups
        self.eps = GATED_NORM_EPSILON
        self.tp_group = tp_group
        weight: Any = torch.nn.Parameter(
            torch.ones(width, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        weight.tensor_model_parallel = True
        weight.partition_dim = 0
        self.weight = weight

    def forward(self, y: torch.Tensor, z: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Gated and normalised `y` `[..., d]`; `z` `[..., d]`, `mask` `[d]`."""
        return gated_rms_norm(y, z, self.weight, self.groups, self.eps, mask=mask)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The weight, sharded along its channels."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class LocalMambaMixer(MambaMixer):
    """Core's Mamba-2 mixer, with this package's torch operations for the scan; on whole sequences, not for decoding."""

    def __init__(self, *args: Any, gated_norm: type[GatedNorm] = GatedNorm, **kwargs: Any) -> None:
        """Takes what core's mixer takes, and `gated_norm`, the class of the norm after the scan.

        Raises:
            ElasticError: for options of core's mixer that have no local form.
        """
        with without_mamba_kernels():
            # Without core's own norm, which is a stand-in where the kernels are missing.
            super().__init__(*args, **kwargs, rmsnorm=False)
        if not self.use_mem_eff_path or self.D_has_hdim:
            raise ElasticError(
                "the local Mamba mixer has one path and one D per head: leave --disable-mamba-mem-eff-path and "
                "D_has_hdim off"
            )
        self.rmsnorm = True
        self.ssd_chunk = SSD_CHUNK
        self.norm = gated_norm(self.config, self.d_inner_local_tp, self.ngroups_local_tp, self.tp_group)

    def forward(
        self, hidden_states: torch.Tensor, inference_context: Any = None, *, packed_seq_params: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The mixer on whole sequences, `[s, b, h]` -> the same shape; core's forward without its inference branches.

        Args:
            hidden_states: normalised input of this rank's tokens.
            inference_context: refused.
            packed_seq_params: from `packed_documents`, or None. Core would have `MambaContextParallel` cut every
                document by itself, which needs Transformer Engine.

        Raises:
            ElasticError: in inference mode, or for other packed sequences.
        """
        if inference_context is not None:
            raise ElasticError(
                "the local Mamba mixer has no inference cache: run it on whole sequences, outside inference mode"
            )
        documents, cp = documents_of(packed_seq_params), self.cp
        zxBCdt, _ = self.in_proj(hidden_states)
        y, z = self.scan(cp.pre_conv_ssm(zxBCdt), cp, documents)
        return self.out_proj(self.norm(cp.post_conv_ssm(y), cp.post_conv_ssm(z)).contiguous())

    def scan(
        self, zxBCdt: torch.Tensor, cp: MambaContextParallel, documents: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Convolution and state space scan, before the gate.

        Args:
            zxBCdt: output of `in_proj` on the whole sequence, `[s, b, 2 * d + 2 * groups * state + heads]`, with this
                rank's heads.
            cp: how many heads and groups those are, and this rank's part of the parameters.
            documents: number of each token's document, `[b, s]`, or None.

        Returns:
            y and the gate z, both `[s, b, d]`.
        """
        states = cp.ngroups_local_tpcp * self.d_state
        width = cp.d_inner_local_tpcp
        z, xBC, dt = zxBCdt.transpose(0, 1).split([width, width + 2 * states, cp.nheads_local_tpcp], dim=-1)
        xBC = causal_conv1d_silu(xBC, cp.get_conv1d_weight(), cp.get_conv1d_bias(), documents)
        x, B, C = xBC.split([width, states, states], dim=-1)
        dt_bias, A_log, D = map(at_least_fp32, (cp.get_dt_bias(), cp.get_A_log(), cp.get_D()))
        y = ssd(
            x.unflatten(-1, (cp.nheads_local_tpcp, -1)),
            torch.nn.functional.softplus(at_least_fp32(dt) + dt_bias),
            -torch.exp(A_log),
            B.unflatten(-1, (cp.ngroups_local_tpcp, -1)),
            C.unflatten(-1, (cp.ngroups_local_tpcp, -1)),
            D,
            self.ssd_chunk,
            documents,
        )
        return y.flatten(-2).transpose(0, 1), z.transpose(0, 1)


class LocalCoreAttention(DotProductAttention):
    """Core's attention from scores, with context parallelism and documents, which core leaves to Transformer Engine.

    Keys and values are gathered, and each query sees those of its document that are not later in the whole sequence, or
    what a given mask leaves: core's batches cut its rows as they cut the tokens, and keep its columns whole.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        """Takes what core's module takes."""
        seen = copy.copy(config)
        seen.context_parallel_size = 1  # core's constructor refuses another size; its forward takes any mask
        seen.masked_softmax_fusion = False  # its kernel for causal attention would not look at the mask
        super().__init__(seen, *args, **kwargs)
        self.config = config

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Query, key and value `[s / CP, b, heads or groups, d]` -> `[s / CP, b, heads * d]`.

        Raises:
            ElasticError: for packed sequences that are not from `packed_documents`.
        """
        group, documents = self.pg_collection.cp, documents_of(packed_seq_params)
        key, value = whole_sequence(key, group), whole_sequence(value, group)
        if attention_mask is None and (group.size() > 1 or documents is not None):
            keys, numbers = torch.arange(key.size(0), device=key.device), slices_of_rank(group)
            slices = keys.chunk(len(numbers) * group.size())
            queries = torch.cat([slices[number] for number in numbers])
            attention_mask = (keys > queries[:, None])[None, None]
            if documents is not None:
                attention_mask = attention_mask | (documents[:, queries, None] != documents[:, None])[:, None]
        return super().forward(query, key, value, attention_mask, *args, **kwargs)


def quantise_linears(layer: torch.nn.Module, scaling: Scaling) -> None:
    """The linears of a layer run in FP8 from now on; a router, a convolution and a scan are none."""
    for module in layer.modules():
        if isinstance(module, ElasticColumnParallelLinear | ElasticRowParallelLinear):
            module.quantise(scaling)


class LocalHybridStack(HybridStack):
    """Core's `HybridStack` with a local final norm and FP8, for which core hard-codes Transformer Engine's."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        post_process: bool = True,
        post_layer_norm: bool = True,
        precision: Precision | None = None,
        **kwargs: Any,
    ) -> None:
        """Takes what `HybridStack` takes, and `precision`, the FP8 of its linear layers."""
        super().__init__(config, submodules, post_process=post_process, post_layer_norm=False, **kwargs)
        for layer in self.layers:
            scaling = None if precision is None else precision.of_layer(layer.layer_number - 1, config.num_layers)
            if scaling is not None:
                quantise_linears(layer, scaling)
        self.post_layer_norm = post_layer_norm
        if post_process and post_layer_norm:
            self.final_norm = LocalRMSNorm(config, config.hidden_size, config.layernorm_epsilon)


@dataclass(frozen=True)
class PlainParts:
    """The classes that a plain layer is made of.

    Attributes:
        column, row: linears.
        attention: from scores on.
        experts: the routed experts of a rank; whatever they run on, they own local linears.
    """

    column: Any = ElasticColumnParallelLinear
    row: Any = ElasticRowParallelLinear
    attention: Any = LocalCoreAttention
    experts: Any = SequentialMLP


LOCAL_PARTS = PlainParts()


def mamba_layer_spec(parts: PlainParts = LOCAL_PARTS) -> ModuleSpec:
    """Core's Mamba layer (`M`) on these parts."""
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=LocalRMSNorm,
            mixer=ModuleSpec(
                module=LocalMambaMixer, submodules=MambaMixerSubmodules(in_proj=parts.column, out_proj=parts.row)
            ),
            mamba_bda=get_bias_dropout_add,
        ),
    )


def attention_layer_spec(parts: PlainParts = LOCAL_PARTS) -> ModuleSpec:
    """Core's causal attention layer (`*`) on these parts."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=LocalRMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.column, core_attention=parts.attention, linear_proj=parts.row
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
        ),
    )


def mlp_layer_spec(parts: PlainParts = LOCAL_PARTS) -> ModuleSpec:
    """Core's MLP layer (`-`) on these parts."""
    linears = MLPSubmodules(linear_fc1=parts.column, linear_fc2=parts.row)
    return ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=LocalRMSNorm,
            mlp=partial(MLP.as_mlp_submodule, submodules=linears),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def plain_stack(parts: PlainParts, precision: Precision | None = None) -> ModuleSpec:
    """The whole stack on these parts; `precision` is the FP8 of local linears."""
    return ModuleSpec(
        module=LocalHybridStack,
        params={"precision": precision},
        submodules=HybridStackSubmodules(
            mamba_layer=mamba_layer_spec(parts),
            attention_layer=attention_layer_spec(parts),
            mlp_layer=mlp_layer_spec(parts),
            moe_layer=moe_layer_spec(LocalRMSNorm, parts.column, parts.row, parts.experts),
        ),
    )


plain_stack_spec = plain_stack(LOCAL_PARTS)
"""The whole stack on the local backend. An object, not a function: `--spec` takes the attribute as it is."""
