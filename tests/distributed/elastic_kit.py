"""A small elastic family on CPU ranks with weights that depend on names only. Import it after the CPU adaptation."""

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_elastic.axes import Dimension
from megatron_elastic.budget import Budget, Selection
from megatron_elastic.family import Family
from megatron_elastic.layout import LAYER, Layout, ModelShape, layer_number
from megatron_elastic.model import ElasticHybridModel, ElasticModelBuilder, ElasticModelConfig
from megatron_elastic.specs import plain_spec
from tests.distributed.groups import make_groups

PATTERN = "M-*M-*-"
SHAPE = ModelShape(
    pattern=PATTERN, vocab=64, hidden=32, ffn=64, attention_heads=8, query_groups=2, head_dim=4,
    mamba_heads=8, mamba_head_dim=4, mamba_groups=2, mamba_state=6,
)  # fmt: skip
FAMILY = Family(
    shape=SHAPE,
    ffn_blocks=8,
    choices={
        "hidden": (32, 28, 24, 20, 16),
        "ffn": (64, 48, 40, 32, 24),
        "mamba_heads": (8, 6, 4, 2),
        "mamba_head_dim": (4, 3, 2),
        "attention_heads": (8, 6, 4, 2),
        "depth": (7, 6, 5, 4),
    },
    heterogeneous=("ffn", "mamba_heads", "attention_heads"),
    # With two pipeline stages both leave layers out.
    depth_ranking=(4, 3, 5),
    budgets=(Budget("p100", 1.0), Budget("p75", 0.75), Budget("p50", 0.5)),
)


def narrow(**sizes: int | tuple[int, ...]) -> Selection:
    """The whole parent but for some sizes; `depth` leaves out the least important layers."""
    return FAMILY.select({**SHAPE.full, **sizes})


SELECTIONS = (
    FAMILY.full,
    narrow(hidden=28, ffn=(48, 64, 40), mamba_heads=6, mamba_head_dim=3, attention_heads=6, depth=6),
    narrow(hidden=20, ffn=32, mamba_heads=(4, 6), mamba_head_dim=2, attention_heads=(4, 2), depth=5),
)


class SubmodelLayout(Layout):
    """Dimensions of the parameters of a submodel, whose layers may differ."""

    def parameters(self) -> dict[str, tuple[Dimension, ...]]:
        """Each layer's as if all layers were like it."""
        found = dict(self.outside_layers())
        for number, kind in enumerate(self.shape.pattern):
            alike = Layout(replace(self.shape, **self.shape.layer(number)), 8)
            found.update({f"{LAYER}{number}.{name}": each for name, each in alike.of_kind(kind).items()})
        return found


def squared_relu(x: Tensor) -> Tensor:
    """The activation of the published parents."""
    return torch.relu(x).square()


def config(shape: ModelShape = SHAPE, *, dtype: torch.dtype = torch.float64, **other: Any) -> TransformerConfig:
    """Megatron's config of a shape, on the layout that is initialised; the largest sizes where layers differ."""
    # Core's config wants sizes of layers that the pattern does not have, too.
    sizes = {axis: getattr(shape, axis) or getattr(SHAPE, axis) for axis in SHAPE.full}
    sizes = {axis: max(size) if isinstance(size, tuple) else size for axis, size in sizes.items()}
    tp = parallel_state.get_tensor_model_parallel_world_size()
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    return TransformerConfig(
        **{
            "num_layers": len(shape.pattern), "hidden_size": shape.hidden, "ffn_hidden_size": sizes["ffn"],
            "num_attention_heads": sizes["attention_heads"], "num_query_groups": shape.query_groups,
            "kv_channels": shape.head_dim,
            "mamba_num_heads": sizes["mamba_heads"], "mamba_head_dim": sizes["mamba_head_dim"],
            "mamba_num_groups": shape.mamba_groups, "mamba_state_dim": shape.mamba_state, "is_hybrid_model": True,
            "normalization": "RMSNorm", "add_bias_linear": False, "activation_func": squared_relu,
            "hidden_dropout": 0.0, "attention_dropout": 0.0, "attention_softmax_in_fp32": False, "params_dtype": dtype,
            "pipeline_dtype": dtype, "bf16": dtype is torch.bfloat16, "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "context_parallel_size": parallel_state.get_context_parallel_world_size(),
            "use_cpu_initialization": True, "gradient_accumulation_fusion": False,
            "masked_softmax_fusion": False, "bias_dropout_fusion": False, "persist_layer_norm": False,
            "calculate_per_token_loss": True, "batch_p2p_comm": False, "overlap_p2p_comm": False,
            "deallocate_pipeline_outputs": pp > 1, **other,
        }
    )  # fmt: skip


def layout_of_ranks(tp: int = 1, pp: int = 1, cp: int = 1) -> None:
    """The parallel groups of a layout."""
    make_groups(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp)


def split_pattern(pattern: str) -> str:
    """The pattern with a pipeline separator where there are two stages."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return pattern
    half = (len(pattern) + 1) // 2
    return f"{pattern[:half]}|{pattern[half:]}"


def full_weights(layout: Layout, jitter: float = 0.0) -> dict[str, Tensor]:
    """Every parameter, fp64, as a function of its name; `jitter` makes another parent (a teacher that differs)."""
    found = {}
    for name, dimensions in layout.parameters().items():
        size = [dimension.size for dimension in dimensions]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        positive = any(key in name for key in ("norm", "A_log", "dt_bias", "mixer.D"))
        value = torch.randn(size, generator=generator, dtype=torch.float64)
        value = torch.sigmoid(value) * 0.5 + 0.75 if positive else value * 0.3
        found[name] = value + jitter * torch.randn(size, generator=generator, dtype=torch.float64)
    return found


def shard(tensor: Tensor, dimensions: tuple[Dimension, ...], rank: int, world: int) -> Tensor:
    """A rank's part of a whole parameter."""
    for number, dimension in enumerate(dimensions):
        if dimension.sharded:
            parts = tensor.split(dimension.part_sizes(), number)
            tensor = torch.cat([part.chunk(world, number)[rank] for part in parts], number)
    return tensor


def unshard(shards: list[Tensor], dimensions: tuple[Dimension, ...]) -> Tensor:
    """The whole parameter from every rank's part."""
    for number, dimension in enumerate(dimensions):
        if dimension.sharded:
            sizes = [size // len(shards) for size in dimension.part_sizes()]
            split = [one.split(sizes, number) for one in shards]
            return torch.cat([torch.cat(parts, number) for parts in zip(*split, strict=True)], number)
    return shards[0]


def global_name(model: torch.nn.Module, name: str) -> str:
    """A stage's parameter name -> its name in the whole model."""
    words = name.split(".")
    if words[:2] == ["decoder", "layers"]:
        words[2] = str(model.decoder.layers[int(words[2])].layer_number - 1)
    return ".".join(words)


@torch.no_grad()
def set_weights(model: torch.nn.Module, layout: Layout, weights: Mapping[str, Tensor]) -> None:
    """Gives every parameter of this rank its part of the whole weights."""
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    dimensions = layout.parameters()
    for name, parameter in model.named_parameters():
        whole = global_name(model, name)
        value = shard(weights[whole], dimensions[whole], rank, tp)
        assert value.shape == parameter.shape, (name, value.shape, parameter.shape)
        parameter.copy_(value)


def elastic_model(
    *,
    dtype: torch.dtype = torch.float64,
    teacher_jitter: float = 0.05,
    family: Family = FAMILY,
    positions: str = "none",
    backend: str = "local",
    **other: Any,
) -> ElasticHybridModel:
    """The family's model on this rank with a frozen teacher that differs a little (equal ones would hide faults)."""
    settings = ElasticModelConfig(
        transformer=config(family.shape, dtype=dtype, **other),
        vocab_size=family.shape.vocab,
        hybrid_layer_pattern=split_pattern(family.shape.pattern),
        seq_length=64,
        position_embedding_type=positions,
        family=family,
        backend=backend,
    )
    builder = ElasticModelBuilder(settings)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model, teacher = builder.build_plain(groups), builder.build_plain(groups)
    keep_fp64(model, dtype)
    keep_fp64(teacher, dtype)
    set_weights(model, family.layout, full_weights(family.layout))
    set_weights(teacher, family.layout, full_weights(family.layout, teacher_jitter))
    teacher.requires_grad_(False)
    teacher.eval()
    model.teachers = (teacher,)
    return model


def keep_fp64(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Core keeps A_log and D in fp32 whatever the parameters' type; in an fp64 proof they are fp64 too."""
    if dtype is torch.float64:
        model.double()


def stock_model(
    shape: ModelShape,
    *,
    dtype: torch.dtype = torch.float64,
    positions: str = "none",
    backend: str = "local",
    **other: Any,
) -> HybridModel:
    """Core's own `HybridModel` of a shape, with core's layers, each at its own size where they differ."""
    model = HybridModel(
        config=config(shape, dtype=dtype, **other),
        hybrid_stack_spec=plain_spec(backend, shape),
        vocab_size=shape.vocab,
        max_sequence_length=64,
        hybrid_layer_pattern=split_pattern(shape.pattern),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        position_embedding_type=positions,
    )
    keep_fp64(model, dtype)
    return model


def kept_entries(layout: Layout, name: str, selection: Selection) -> list[Tensor]:
    """Entries of each dimension of a parent's parameter that a selection keeps."""
    number = layer_number(name)
    sizes = {"hidden": selection.hidden} if number is None else selection.layer(layout.shape.pattern, number)
    segments = [dimension.segments(sizes, layout.shape.full) for dimension in layout.parameters()[name]]
    return [torch.cat([torch.arange(start, stop) for start, stop in kept]) for kept in segments]


def submodel_names(layout: Layout, selection: Selection) -> dict[str, str]:
    """Name of a parent's parameter -> its name in the submodel: layers are numbered anew, skipped ones have none."""
    left = [number for number in range(len(layout.shape.pattern)) if number not in selection.skipped]
    found = {}
    for name in layout.parameters():
        number = layer_number(name)
        if number is None:
            found[name] = name
        elif number in left:
            found[name] = name.replace(f"{LAYER}{number}.", f"{LAYER}{left.index(number)}.")
    return found


def cut(weights: Mapping[str, Tensor], layout: Layout, selection: Selection) -> dict[str, Tensor]:
    """Index-select reference of the slice: independent of the sliced path's own code."""
    found = {}
    for name, own in submodel_names(layout, selection).items():
        found[own] = weights[name]
        for number, index in enumerate(kept_entries(layout, name, selection)):
            found[own] = found[own].index_select(number, index)
    return found


def permuted(tensor: Tensor, dimensions: tuple[Dimension, ...], orders: Mapping[str, Tensor]) -> Tensor:
    """A parameter in the given orders: every dimension that has a sorted axis is permuted."""
    for number, dimension in enumerate(dimensions):
        rows = dimension.permutation(orders)
        if rows is not None:
            tensor = tensor.index_select(number, rows)
    return tensor


def scatter_back(parts: Mapping[str, Tensor], layout: Layout, selection: Selection) -> dict[str, Tensor]:
    """A submodel's tensors in their place in the parent's, which are zero elsewhere."""
    names, found = submodel_names(layout, selection), {}
    for name, dimensions in layout.parameters().items():
        found[name] = torch.zeros([dimension.size for dimension in dimensions], dtype=torch.float64)
        if name in names:
            grid = torch.meshgrid(*kept_entries(layout, name, selection), indexing="ij")
            found[name][grid] = parts[names[name]]
    return found


def batch(index: int = 0, *, size: int = 2, length: int = 24) -> dict[str, Tensor]:
    """Tokens, labels, positions and a loss mask with holes."""
    generator = torch.Generator().manual_seed(900 + index)
    text = torch.randint(SHAPE.vocab, (size, length + 1), generator=generator)
    mask = (torch.rand(size, length, generator=generator) > 0.2).double()
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "position_ids": torch.arange(length).expand(size, -1).contiguous(),
        "loss_mask": mask,
    }


def worst(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """max|a - b| / max|b| of the worst tensor."""
    assert set(a) == set(b), set(a) ^ set(b)
    return max(float((a[k] - b[k]).abs().max() / b[k].abs().max().clamp(min=1e-300)) for k in b)
