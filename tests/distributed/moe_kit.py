"""A small family with MoE layers on CPU ranks: experts are modules, expert-parallel ranks have some of them each.

Import it after the CPU adaptation.
"""

from collections.abc import Mapping
from typing import Any

import elastic_kit as kit
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_elastic.axes import Dimension
from megatron_elastic.budget import Budget
from megatron_elastic.checkpoint import expert_of
from megatron_elastic.family import Family
from megatron_elastic.layout import Layout, ModelShape, Size
from megatron_elastic.model import ElasticHybridModel, ElasticModelBuilder, ElasticModelConfig
from megatron_elastic.specs import plain_spec
from tests.distributed.groups import make_groups

EXPERT_BLOCKS = 2
CHOICES = {
    "hidden": (32, 24, 20),
    "ffn": (64, 48, 32),
    "mamba_heads": (8, 6, 4),
    "mamba_head_dim": (4,),
    "attention_heads": (8, 6, 4),
    "experts": (8, 6, 4),
    "expert_ffn": (24, 16, 8),
    "shared_expert_ffn": (32, 16),
    "depth": (5, 4),
}
BUDGETS = (Budget("p100", 1.0), Budget("p75", 0.75), Budget("p50", 0.5))

SIGMOID: dict[str, Any] = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_token_dispatcher_type": "alltoall",
}
SOFTMAX: dict[str, Any] = {"moe_router_score_function": "softmax", "moe_token_dispatcher_type": "allgather"}
PRE_SOFTMAX: dict[str, Any] = {**SOFTMAX, "moe_router_pre_softmax": True}
BALANCED: dict[str, Any] = {
    "moe_router_score_function": "sigmoid",
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
    "moe_aux_loss_coeff": [0.5, 0.25],
    "moe_z_loss_coeff": 0.05,
}

FLAGS: dict[str, Any] = {
    "hybrid-layer-pattern": "ME*E-", "vocab-size": 64, "make-vocab-size-divisible-by": 1, "hidden-size": 32,
    "ffn-hidden-size": 64, "num-attention-heads": 8, "group-query-attention": True, "num-query-groups": 2,
    "kv-channels": 4, "mamba-num-heads": 8, "mamba-head-dim": 4, "mamba-num-groups": 2, "mamba-state-dim": 6,
    "num-experts": 8, "moe-ffn-hidden-size": 24, "moe-shared-expert-intermediate-size": 32, "moe-router-topk": 2,
    "moe-router-score-function": "sigmoid", "moe-router-enable-expert-bias": True, "swiglu": True,
    "moe-router-topk-scaling-factor": 2.5, "moe-token-dispatcher-type": "alltoall", "normalization": "RMSNorm",
    "position-embedding-type": "none", "untie-embeddings-and-output-weights": True, "disable-bias-linear": True,
    "hidden-dropout": 0.0, "attention-dropout": 0.0, "calculate-per-token-loss": True,
}  # fmt: skip
"""A recipe's flags of the gated parent with a sigmoid router."""


def shape(*, gated: bool = False, expert_bias: bool = False) -> ModelShape:
    """The parent: two MoE layers with a shared expert among the others."""
    return ModelShape(
        pattern="ME*E-", vocab=64, hidden=32, ffn=64, attention_heads=8, query_groups=2, head_dim=4, mamba_heads=8,
        mamba_head_dim=4, mamba_groups=2, mamba_state=6, experts=8, expert_ffn=24, shared_expert_ffn=32, top_k=2,
        expert_bias=expert_bias, gated=gated,
    )  # fmt: skip


def family(of: ModelShape) -> Family:
    """What is narrowed."""
    return Family(
        shape=of,
        ffn_blocks=8,
        expert_blocks=EXPERT_BLOCKS,
        choices=CHOICES,
        heterogeneous=("experts", "expert_ffn"),
        depth_ranking=(3,),
        budgets=BUDGETS,
    )


def largest(size: Size) -> int:
    """The one number that a config has for all layers."""
    return max(size) if isinstance(size, tuple) else size


def layout_of_ranks(tp: int = 1, ep: int = 1, etp: int | None = None, cp: int = 1) -> None:
    """The parallel groups of a layout."""
    make_groups(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )


def config(of: ModelShape, **other: Any) -> TransformerConfig:
    """Megatron's config of a shape, on the layout that is initialised."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    gate = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu} if of.gated else {}
    return kit.config(
        of,
        num_moe_experts=largest(of.experts),
        moe_ffn_hidden_size=largest(of.expert_ffn),
        moe_shared_expert_intermediate_size=of.shared_expert_ffn,
        moe_router_topk=of.top_k,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
        sequence_parallel=tp > 1,
        bias_activation_fusion=False,
        **gate,
        **other,
    )


def stock_model(of: ModelShape, backend: str = "local", **other: Any) -> HybridModel:
    """Core's own `HybridModel` of a shape, with core's layers, each at its own size where they differ."""
    model = HybridModel(
        config=config(of, **other),
        hybrid_stack_spec=plain_spec(backend, of),
        vocab_size=of.vocab,
        max_sequence_length=64,
        hybrid_layer_pattern=of.pattern,
        parallel_output=True,
        position_embedding_type="none",
    )
    return model.double()


def elastic_model(of: Family, backend: str = "local", **other: Any) -> ElasticHybridModel:
    """The family's model on this rank."""
    settings = ElasticModelConfig(
        transformer=config(of.shape, **other),
        vocab_size=of.shape.vocab,
        hybrid_layer_pattern=of.shape.pattern,
        seq_length=64,
        position_embedding_type="none",
        family=of,
        backend=backend,
    )
    model = ElasticModelBuilder(settings).build_plain(ProcessGroupCollection.use_mpu_process_groups())
    return model.double()


def full_weights(layout: Layout) -> dict[str, Tensor]:
    """Every parameter and the experts' biases, which core keeps in fp32."""
    found = kit.full_weights(layout)
    return {name: t.float().double() if name.endswith("expert_bias") else t for name, t in found.items()}


def _groups() -> dict[str, Any]:
    return {
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "ep": parallel_state.get_expert_model_parallel_group(),
        "etp": parallel_state.get_expert_tensor_parallel_group(),
    }


def _part(tensor: Tensor, dimensions: tuple[Dimension, ...]) -> Tensor:
    """This rank's part of a whole parameter."""
    groups = _groups()
    for number, dimension in enumerate(dimensions):
        if dimension.sharded:
            group = groups[dimension.sharded]
            parts = tensor.split(dimension.part_sizes(), number)
            tensor = torch.cat([part.chunk(group.size(), number)[group.rank()] for part in parts], number)
    return tensor


def _whole(part: Tensor, dimensions: tuple[Dimension, ...]) -> Tensor:
    """The whole parameter from every rank's part."""
    groups = _groups()
    for number, dimension in enumerate(dimensions):
        if dimension.sharded:
            group = groups[dimension.sharded]
            shards = [torch.empty_like(part) for _ in range(group.size())]
            dist.all_gather(shards, part.contiguous(), group=group)
            sizes = [size // group.size() for size in dimension.part_sizes()]
            split = [one.split(sizes, number) for one in shards]
            part = torch.cat([torch.cat(parts, number) for parts in zip(*split, strict=True)], number)
    return part


def states(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of this rank, live."""
    found = model.state_dict(keep_vars=True)
    return {name: each for name, each in found.items() if isinstance(each, Tensor)}


@torch.no_grad()
def set_weights(model: torch.nn.Module, layout: Layout | None, weights: Mapping[str, Tensor]) -> None:
    """Gives every parameter and bias of this rank its part of the whole weights; without a layout, all of it."""
    dimensions = {} if layout is None else layout.parameters()
    for name, state in states(model).items():
        stock, expert = expert_of(name)
        value = _part(weights[stock], dimensions.get(stock, ()))
        state.copy_(value if expert is None else value[expert])


def gradients(model: torch.nn.Module, layout: Layout | None) -> dict[str, Tensor]:
    """`.grad` of every weight, whole, of the sum of all ranks' losses: what core's finalize makes of them.

    Without a layout every rank has all of each weight.
    """
    dimensions = {} if layout is None else layout.parameters()
    tp = parallel_state.get_tensor_model_parallel_group()
    dp = parallel_state.get_data_parallel_group(with_context_parallel=True)
    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        stock, expert = expert_of(name)
        if expert is not None:
            found.setdefault(stock, []).append(grad)
            continue
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(grad, group=tp)
        dist.all_reduce(grad, group=dp)
        found[stock] = _whole(grad, dimensions.get(stock, ()))
    for stock, grads in found.items():
        if isinstance(grads, list):
            stacked = torch.stack(grads)
            dist.all_reduce(stacked, group=parallel_state.get_expert_data_parallel_group())
            found[stock] = _whole(stacked, dimensions.get(stock, ()))
    return found


def reduced_gradients(model: torch.nn.Module, layout: Layout) -> dict[str, Tensor]:
    """`main_grad` of every weight, whole, after data parallelism and core's finalize have reduced it."""
    dimensions, found, experts = layout.parameters(), {}, {}
    for name, parameter in model.named_parameters():
        stock, expert = expert_of(name)
        if expert is None:
            found[stock] = _whole(parameter.main_grad.clone(), dimensions[stock])
        else:
            experts.setdefault(stock, []).append(parameter.main_grad.clone())
    return {**found, **{stock: _whole(torch.stack(each), dimensions[stock]) for stock, each in experts.items()}}
