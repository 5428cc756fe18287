"""FP8 on the local backend, in fp64: a slice is the model that is cut out of it, and its copies are never stale.

In fp64 what differs by the order of sums falls on the same FP8 number but for one time in some 1e9: the stock model's
own attention can be compared with. Sums inside a product are fp32, of the same numbers in the same order.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import elastic_kit as kit
import moe_cases
import moe_kit
import torch
import torch.distributed as dist
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_elastic.budget import Budget, Selection
from megatron_elastic.family import Family
from megatron_elastic.layers import fp8_weight
from megatron_elastic.layers.plain import LOCAL_PARTS, plain_stack
from megatron_elastic.layers.quantized_once import weights_changed
from megatron_elastic.layout import Layout, ModelShape
from megatron_elastic.masks import one_hot
from megatron_elastic.model import ElasticHybridModel, ElasticModelBuilder, ElasticModelConfig
from megatron_elastic.ops.fp8 import Quantised, quantise_weight
from megatron_elastic.precision import Precision, Scaling

Outcome = dict[str, Any]
SHAPE = ModelShape(
    pattern="ME*-M", vocab=64, hidden=160, ffn=320, attention_heads=8, query_groups=2, head_dim=16, mamba_heads=8,
    mamba_head_dim=16, mamba_groups=2, mamba_state=8, experts=4, expert_ffn=48, shared_expert_ffn=64, top_k=2,
)  # fmt: skip
FAMILY = Family(
    shape=SHAPE,
    ffn_blocks=8,
    expert_blocks=2,
    choices={
        "hidden": (160, 136, 96), "ffn": (320, 192), "mamba_heads": (8, 4), "mamba_head_dim": (16, 12),
        "attention_heads": (8, 4), "experts": (4, 2), "expert_ffn": (48, 32), "shared_expert_ffn": (64, 32),
        "depth": (5, 4),
    },
    depth_ranking=(3,),
    budgets=(Budget("p100", 1.0), Budget("p50", 0.5)),
)  # fmt: skip
FULL = FAMILY.full
MIDDLE = FAMILY.select({**SHAPE.full, "hidden": 136, "ffn": 192, "mamba_head_dim": 12, "expert_ffn": 32})
SMALLEST = FAMILY.select({axis: choices[-1] for axis, choices in FAMILY.choices.items()})
SETTINGS: dict[str, Any] = {"moe_router_score_function": "softmax", "moe_token_dispatcher_type": "alltoall"}
TENSORWISE = Precision(Scaling("hybrid", "tensorwise"))
PRECISIONS = {
    "tensorwise": TENSORWISE,
    "blockwise": Precision(Scaling("e4m3", "blockwise")),
    "ends": replace(TENSORWISE, first=1, last=1),
}


OUTLIER = 2.0**14
"""What entries that a slice cuts are multiplied by, in one model: as many powers of two as e4m3 has below its largest
number with all its bits. A scale that is shared with them leaves the others fewer bits."""


def parents_weights(outliers: bool = False) -> dict[str, Tensor]:
    """The parent's weights; with outliers among the neurons that the smallest slice cuts."""
    weights = moe_kit.full_weights(FAMILY.layout)
    if outliers:
        name = "decoder.layers.1.mlp.shared_experts.linear_fc1.weight"
        weights[name][SHAPE.shared_expert_ffn // FAMILY.ffn_blocks - 1, 0] *= OUTLIER
    return weights


def elastic(
    precision: Precision | None, family: Family = FAMILY, *, outliers: bool = False, **other: Any
) -> ElasticHybridModel:
    """The family's model with weights that depend on names."""
    settings = ElasticModelConfig(
        transformer=moe_kit.config(family.shape, **SETTINGS, **other),
        vocab_size=family.shape.vocab,
        hybrid_layer_pattern=family.shape.pattern,
        seq_length=64,
        position_embedding_type="none",
        family=family,
        precision=precision,
    )
    model = ElasticModelBuilder(settings).build_plain(ProcessGroupCollection.use_mpu_process_groups()).double()
    if family is FAMILY:
        moe_kit.set_weights(model, FAMILY.layout, parents_weights(outliers))
    return model


def stock(precision: Precision | None, shape: ModelShape) -> Any:
    """Core's `HybridModel` of a shape, with core's layers."""
    model = HybridModel(
        config=moe_kit.config(shape, **SETTINGS),
        hybrid_stack_spec=plain_stack(LOCAL_PARTS, precision),
        vocab_size=shape.vocab,
        max_sequence_length=64,
        hybrid_layer_pattern=shape.pattern,
        parallel_output=True,
        position_embedding_type="none",
    )
    return model.double()


def cut(build: Callable[[ModelShape], Any], selection: Selection) -> Outcome:
    """A model of the submodel's shape with the kept weights; gradients in their place in the parent's."""
    shape = selection.submodel(SHAPE)
    small = Layout(shape, FAMILY.ffn_blocks, FAMILY.expert_blocks)
    model = build(shape)
    moe_kit.set_weights(model, small, kit.cut(moe_kit.full_weights(FAMILY.layout), FAMILY.layout, selection))
    found = moe_cases.outcome(model, small)
    found["grads"] = kit.scatter_back(found["grads"], FAMILY.layout, selection)
    return found


def whole(precision: Precision | None) -> Callable[[ModelShape], Any]:
    """Builds the elastic model of a submodel's shape, of which nothing is sliced."""

    def build(shape: ModelShape) -> Any:
        return elastic(precision, replace(FAMILY, shape=shape, choices={}, depth_ranking=()))

    return build


def sliced(model: Any, selection: Selection) -> Outcome:
    """A slice of the family's model."""
    return moe_cases.outcome(model, FAMILY.layout, selection=selection)


def same_bits(a: Outcome, b: Outcome) -> float:
    """1 where logits, loss and every gradient are equal bit for bit."""
    pairs = [(a["logits"], b["logits"]), (a["loss"], b["loss"]), *((g, b["grads"][n]) for n, g in a["grads"].items())]
    return float(all(torch.equal(one, other) for one, other in pairs))


def norm_distance(a: Outcome, b: Outcome) -> float:
    """Relative distance of the logits."""
    return float((a["logits"] - b["logits"]).norm() / b["logits"].norm())


def linears(model: Any) -> dict[str, Any]:
    """The linear layers that are quantised, by name."""
    return {name: module for name, module in model.named_modules() if getattr(module, "fp8", None) is not None}


@contextlib.contextmanager
def parents_scale(model: Any) -> Iterator[None]:
    """The fault: a slice is cut out of the parent's quantised weight, with the parent's scales."""
    right = fp8_weight.QuantisedWeight.of
    weights = {id(linear.fp8): linear.weight for linear in linears(model).values()}

    def wrong(self: Any, kept: Tensor, segments: Any) -> Quantised:
        parent = quantise_weight(weights[id(self)], self.scaling)
        scales = (parent.dequantised() / parent.data.float()).nan_to_num(1.0)
        parts = [parent.data.float(), scales]
        for dimension, ranges in enumerate(segments or ()):
            if ranges is not None:
                index = torch.tensor([i for start, stop in ranges for i in range(start, stop)], dtype=torch.long)
                parts = [part.index_select(dimension, index) for part in parts]
        return Quantised(parts[0].to(parent.data.dtype), parts[1], (1, 1))

    fp8_weight.QuantisedWeight.of = wrong
    try:
        yield
    finally:
        fp8_weight.QuantisedWeight.of = right


@contextlib.contextmanager
def counted() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the weights that are quantised meanwhile."""
    shapes: list[tuple[int, ...]] = []
    right = fp8_weight.quantise_weight

    def counting(weight: Tensor, scaling: Scaling) -> Quantised:
        shapes.append(tuple(weight.shape))
        return right(weight, scaling)

    fp8_weight.quantise_weight = counting
    try:
        yield shapes
    finally:
        fp8_weight.quantise_weight = right


def equalities(precision: Precision, **selections: Selection) -> dict[str, float]:
    """Of a family on this layout: a slice, what is cut out of it, and what a fault makes."""
    model, plain = elastic(precision), elastic(None)
    found: dict[str, float] = {}
    for name, selection in selections.items():
        got = sliced(model, selection)
        found[f"{name}/own layers"] = same_bits(cut(whole(precision), selection), got)
        found[f"{name}/stock layers"] = moe_cases.error(cut(lambda shape: stock(precision, shape), selection), got)
        found[f"{name}/unquantised"] = norm_distance(got, sliced(plain, selection))
    return found


def scales() -> dict[str, float]:
    """What a slice would be with the parent's scales, and what masks make of it, which have no others."""
    found: dict[str, float] = {}
    soft = one_hot(SMALLEST, FAMILY, torch.float64)
    for name, outliers in (("tensorwise", False), ("blockwise", False), ("blockwise", True)):
        model = elastic(PRECISIONS[name], outliers=outliers)
        got = sliced(model, SMALLEST)
        case = f"{name}, outliers" if outliers else name
        masked = moe_cases.outcome(model, FAMILY.layout, probabilities=soft)
        found[f"{case}/masked"] = norm_distance(masked, got)
        with parents_scale(model):
            found[f"{case}/parent's"] = norm_distance(sliced(model, SMALLEST), got)
    with parents_scale(model):
        wrong = sliced(model, FULL)
    found["all kept"] = norm_distance(wrong, sliced(model, FULL))
    return found


def kept_copies() -> dict[str, float]:
    """How often weights are quantised in a step, and that a copy of before a step is not used after it."""
    model = elastic(TENSORWISE)
    quantised = linears(model)

    budgets = SMALLEST, FULL

    def step(microbatches: int) -> Counter[tuple[int, ...]]:
        with counted() as shapes:
            for _ in range(microbatches):
                for selection in budgets:
                    sliced(model, selection)
        return Counter(shapes)

    untold = step(2)
    weights_changed(model)
    once = step(2)
    again = step(1)
    weights_changed(model)
    anew = step(1)
    # Experts and layers that a slice cuts have nothing to quantise.
    cut_away = sum(
        1 for selection in budgets for name in quantised
        if _layer(name) in selection.skipped or (".local_experts." in name and not _kept_expert(name, selection))
    )  # fmt: skip
    want = len(budgets) * len(quantised) - cut_away
    # A step of the optimizer.
    before = sliced(model, SMALLEST)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    stale = sliced(model, SMALLEST)
    weights_changed(model)
    after = sliced(model, SMALLEST)
    fresh = elastic(TENSORWISE)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(1.25)
    right = sliced(fresh, SMALLEST)
    kept = [len(linear.fp8._made) for name, linear in quantised.items() if name.endswith("mixer.in_proj")]
    return {
        "untold": untold.total() / (2 * want),
        "once": once.total() / want,
        "again": float(again.total()),
        "anew": anew.total() / want,
        "stale": norm_distance(stale, right),
        "moved": norm_distance(before, right),
        "after a step": same_bits(after, right),
        "copies of other slices": float(max(kept) - 1),
        "a change of weights by itself": float(anew == once),
    }


def _layer(name: str) -> int:
    return int(name.split(".")[2])


def _kept_expert(name: str, selection: Selection) -> bool:
    number = int(name.split(".local_experts.")[1].split(".")[0])
    order = FAMILY.orders["experts"]
    width = order.size // order.blocks
    return number % width < order.per_block(selection.experts)


def ways_to_run() -> dict[str, float]:
    """Recompute, experts as one group, which layers are quantised, and the teacher's precision."""
    model = elastic(TENSORWISE)
    weights_changed(model)
    want = sliced(model, SMALLEST)
    again = elastic(TENSORWISE, **moe_cases.RECOMPUTE).train()
    weights_changed(again)
    grouped = elastic(TENSORWISE, moe_grouped_gemm=True)
    names = sorted({name.split(".", 3)[3] for name in linears(model)})
    ends = {_layer(name) for name in linears(elastic(PRECISIONS["ends"]))}
    builder_teacher = ElasticModelBuilder(
        ElasticModelConfig(
            transformer=moe_kit.config(SHAPE, **SETTINGS), vocab_size=64, hybrid_layer_pattern=SHAPE.pattern,
            seq_length=64, position_embedding_type="none", family=FAMILY, precision=TENSORWISE,
        )
    )  # fmt: skip
    groups = ProcessGroupCollection.use_mpu_process_groups()
    teachers = [builder_teacher.build_plain(groups, quantised=quantised) for quantised in (True, False)]
    return {
        "recompute": same_bits(sliced(again, SMALLEST), want),
        "grouped experts": same_bits(sliced(grouped, SMALLEST), want),
        "names": float(
            names
            == sorted(
                [f"mixer.{n}_proj" for n in ("in", "out")]
                + [f"self_attention.linear_{n}" for n in ("qkv", "proj")]
                + [f"mlp.linear_fc{n}" for n in (1, 2)]
                + [f"mlp.shared_experts.linear_fc{n}" for n in (1, 2)]
                + [f"mlp.experts.local_experts.{e}.linear_fc{n}" for e in range(4) for n in (1, 2)]
            )
        ),
        "ends": float(ends == {1, 2, 3}),
        "teacher in FP8": float(len(linears(teachers[0])) == len(linears(model))),
        "teacher in bf16": float(not linears(teachers[1])),
    }


def tensor_parallel() -> dict[str, float]:
    """On two ranks with sequence parallelism: each rank's shard has its own scale."""
    moe_kit.layout_of_ranks()
    alone = sliced(elastic(TENSORWISE), SMALLEST)
    moe_kit.layout_of_ranks(tp=2)
    model = elastic(TENSORWISE)
    got = sliced(model, SMALLEST)
    wrong = 0.0
    for linear in linears(model).values():
        scale = linear.fp8.of(linear.weight, "of this test").inverse_scale
        wrong = max(wrong, float((scale - linear.weight.detach().abs().max().float() / 448.0).abs() / scale))
    return {
        "own layers": same_bits(cut(whole(TENSORWISE), SMALLEST), got),
        "stock layers": moe_cases.error(cut(lambda shape: stock(TENSORWISE, shape), SMALLEST), got),
        "one process": norm_distance(got, alone),
        "scale of a shard": wrong,
    }


def run_all() -> dict[str, dict[str, list[float]]]:
    """Case -> numbers of every rank."""
    moe_kit.layout_of_ranks()
    results = {"tensorwise": equalities(TENSORWISE, middle=MIDDLE, smallest=SMALLEST)}
    results["blockwise"] = equalities(PRECISIONS["blockwise"], full=FULL, smallest=SMALLEST)
    results["ends"] = equalities(PRECISIONS["ends"], smallest=SMALLEST)
    results.update(scales=scales(), copies=kept_copies(), ways=ways_to_run(), tp2=tensor_parallel())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, results)
    return {case: {k: [one[case][k] for one in everyone] for k in found} for case, found in results.items()}
