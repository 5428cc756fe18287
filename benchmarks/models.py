"""The model of the benchmarks: the family, stock and elastic models on this process's ranks, under core's DDP."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_elastic.budget import Budget, Selection
from megatron_elastic.cost_model import forward_flops_per_token
from megatron_elastic.family import Family
from megatron_elastic.layers.plain import plain_stack_spec
from megatron_elastic.layout import ModelShape
from megatron_elastic.model import ElasticHybridModel, ElasticModelBuilder, ElasticModelConfig

# The proportions of an 8B hybrid parent (Mamba 2x, MLP 5.25x, LM head 5 % of the FLOPs).
SHAPE = ModelShape(
    pattern="M-M-M*-M-", vocab=4096, hidden=1024, ffn=5376, attention_heads=16, query_groups=4, head_dim=64,
    mamba_heads=32, mamba_head_dim=64, mamba_groups=2, mamba_state=128,
)  # fmt: skip
LENGTH = 1024
SIZES: Mapping[float, Mapping[str, int]] = {
    1.0: {},
    0.75: {"hidden": 896, "ffn": 4544, "mamba_heads": 26, "attention_heads": 16},
    0.5: {"hidden": 768, "ffn": 3328, "mamba_heads": 20, "attention_heads": 12},
    0.25: {"hidden": 512, "ffn": 2304, "mamba_heads": 14, "attention_heads": 8},
}
"""Share of the parent's forward FLOPs -> what is narrowed for it."""


def family(shape: ModelShape = SHAPE) -> Family:
    """The family of all sizes of `SIZES`."""
    kept = {axis: {sizes[axis] for sizes in SIZES.values() if axis in sizes} for axis in SIZES[0.5]}
    choices = {axis: tuple(sorted({*sizes, shape.full[axis]}, reverse=True)) for axis, sizes in kept.items()}
    budgets = tuple(Budget(f"p{round(100 * share)}", share) for share in SIZES)
    return Family(shape=shape, ffn_blocks=8, choices=choices, budgets=budgets)


def selection(share: float, shape: ModelShape = SHAPE) -> Selection:
    """The submodel of one size."""
    return Selection.from_dict({**shape.full, **SIZES[share]})


def share_of_flops(chosen: Selection, shape: ModelShape = SHAPE, length: int = LENGTH) -> float:
    """Forward FLOPs of a submodel over the parent's, LM head and SSD included."""
    whole = forward_flops_per_token(shape, shape.full, length)
    return float(forward_flops_per_token(shape, chosen.sizes, length, chosen.gates(len(shape.pattern))) / whole)


def squared_relu(x: Tensor) -> Tensor:
    """The activation of the published parents."""
    return torch.relu(x).square()


def start(tp: int = 1, pp: int = 1) -> None:
    """Joins the ranks that the launcher's variables name (one process: by itself), and makes Megatron's groups."""
    if not torch.distributed.is_initialized():
        if torch.distributed.is_torchelastic_launched():
            torch.distributed.init_process_group("gloo")
        else:
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(tp, pp)
    model_parallel_cuda_manual_seed(7)


def config(shape: ModelShape, **other: Any) -> TransformerConfig:
    """Megatron's config of the parent in fp32."""
    full, pp = shape.full, parallel_state.get_pipeline_model_parallel_world_size()
    return TransformerConfig(
        **{
            "num_layers": len(shape.pattern), "hidden_size": shape.hidden, "ffn_hidden_size": full["ffn"],
            "num_attention_heads": full["attention_heads"], "num_query_groups": shape.query_groups,
            "kv_channels": shape.head_dim, "mamba_num_heads": full["mamba_heads"],
            "mamba_head_dim": full["mamba_head_dim"], "mamba_num_groups": shape.mamba_groups,
            "mamba_state_dim": shape.mamba_state, "is_hybrid_model": True, "normalization": "RMSNorm",
            "add_bias_linear": False, "activation_func": squared_relu, "hidden_dropout": 0.0,
            "attention_dropout": 0.0, "attention_softmax_in_fp32": False, "params_dtype": torch.float32,
            "pipeline_dtype": torch.float32, "gradient_accumulation_fusion": False, "masked_softmax_fusion": False,
            "bias_dropout_fusion": False, "persist_layer_norm": False, "calculate_per_token_loss": True,
            "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
            "pipeline_model_parallel_size": pp, "batch_p2p_comm": False, "overlap_p2p_comm": False,
            "deallocate_pipeline_outputs": pp > 1, **other,
        }
    )  # fmt: skip


def split_pattern(pattern: str) -> str:
    """The pattern with a pipeline separator where there are two stages."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return pattern
    half = (len(pattern) + 1) // 2
    return f"{pattern[:half]}|{pattern[half:]}"


def wrapped(model: HybridModel) -> DistributedDataParallel:
    """The model under core's DDP: gradients are added up in `main_grad`, as in training."""
    return DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)


def stock_model(shape: ModelShape = SHAPE, length: int = LENGTH) -> DistributedDataParallel:
    """Core's own `HybridModel` of the parent on the local backend."""
    model = HybridModel(
        config=config(shape),
        hybrid_stack_spec=plain_stack_spec,
        vocab_size=shape.vocab,
        max_sequence_length=length,
        hybrid_layer_pattern=split_pattern(shape.pattern),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        position_embedding_type="none",
    )
    return wrapped(model)


def elastic_model(shape: ModelShape = SHAPE, length: int = LENGTH, teacher: bool = True) -> DistributedDataParallel:
    """The family's model with a frozen teacher of its own."""
    settings = ElasticModelConfig(
        transformer=config(shape),
        vocab_size=shape.vocab,
        hybrid_layer_pattern=split_pattern(shape.pattern),
        seq_length=length,
        position_embedding_type="none",
        family=family(shape),
    )
    builder, groups = ElasticModelBuilder(settings), ProcessGroupCollection.use_mpu_process_groups()
    model = builder.build_plain(groups)
    if teacher:
        frozen: ElasticHybridModel = builder.build_plain(groups)
        frozen.requires_grad_(False).eval()
        model.teachers = (frozen,)
    return wrapped(model)


def batch(shape: ModelShape = SHAPE, length: int = LENGTH, size: int = 1) -> dict[str, Tensor]:
    """Tokens, labels, positions and a loss mask of ones."""
    text = torch.randint(shape.vocab, (size, length + 1), generator=torch.Generator().manual_seed(5))
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "position_ids": torch.arange(length).expand(size, -1).contiguous(),
        "loss_mask": torch.ones(size, length),
    }


def plain_step(model: DistributedDataParallel, data: Mapping[str, Tensor]) -> Callable[[], None]:
    """Forward and backward of the stock model on its cross entropy."""

    def step() -> None:
        losses = model(data["tokens"], data["position_ids"], None, labels=data["labels"])
        (losses * data["loss_mask"]).sum().backward()

    return held(model, step)


def elastic_step(
    model: DistributedDataParallel,
    data: Mapping[str, Tensor],
    how: list[dict[str, Any]],
    *,
    teacher_for_each: bool = False,
) -> Callable[[], None]:
    """Forward and backward of every budget in `how` (narrow to full), and the teacher once or for each of them."""
    chunk: ElasticHybridModel = model.module
    where = data["tokens"], data["position_ids"]

    def step() -> None:
        target = None
        for chosen in how:
            if target is None or teacher_for_each:
                target = chunk.teacher_target(model(*where, run_teacher=True))
            model(*where, **chosen, teacher=target, loss_mask=data["loss_mask"]).backward()

    return held(model, step)


def held(model: DistributedDataParallel, step: Callable[[], None]) -> Callable[[], None]:
    """The step with gradients that stay on the rank: what data parallelism exchanges is no part of it."""

    def run() -> None:
        with model.no_sync():
            step()

    return run
