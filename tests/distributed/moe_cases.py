"""MoE layers: masked == sliced == extracted, every layout as one process, in fp64, and the faults that must show."""

import contextlib
import random
from collections.abc import Callable, Mapping
from typing import Any

import elastic_kit as kit
import moe_kit
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_elastic.axes import PER_LAYER_AXES
from megatron_elastic.budget import Selection
from megatron_elastic.cost_model import parameters
from megatron_elastic.family import Family
from megatron_elastic.layers import moe, moe_router
from megatron_elastic.layers.moe_role import MoeRole
from megatron_elastic.layout import Layout
from megatron_elastic.masks import one_hot

Outcome = dict[str, Any]
ROUTERS: dict[str, tuple[dict[str, Any], bool]] = {
    "sigmoid": (moe_kit.SIGMOID, False),
    "softmax": (moe_kit.SOFTMAX, True),
    "pre_softmax": (moe_kit.PRE_SOFTMAX, False),
    "balanced": (moe_kit.BALANCED, False),
    "grouped": ({**moe_kit.SOFTMAX, "moe_grouped_gemm": True}, True),
}
"""Router -> its settings, and whether the MLPs and experts of its model are gated."""

LAYOUTS = {
    "ep2": (1, 2, 1, 1),
    "tp2": (2, 1, 2, 1),
    "tp2_ep2": (2, 2, 1, 1),
    "cp2": (1, 1, 1, 2),
    "cp2_ep2": (1, 2, 1, 2),
}
"""Layout -> tensor-, expert-, expert tensor- and context-parallel size, on two ranks."""

RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def family_of(router: str) -> Family:
    """The family whose model has a router and its gates."""
    settings, gated = ROUTERS[router]
    return moe_kit.family(moe_kit.shape(gated=gated, expert_bias="moe_router_enable_expert_bias" in settings))


DRAWN = 3
"""Selections drawn at random, layer by layer where layers may differ."""


def chosen(family: Family) -> dict[str, Selection]:
    """Every axis of a MoE layer alone at its smallest, a mixture, layers that differ, all at their smallest."""
    found = {
        axis: family.select({**family.full.sizes, axis: family.choices[axis][-1]})
        for axis in ("hidden", "experts", "expert_ffn", "shared_expert_ffn")
    }
    middle = {axis: choices[len(choices) // 2] for axis, choices in family.choices.items()}
    found["mixture"] = family.select({**middle, "depth": len(family.shape.pattern)})
    # The first MoE layer has fewer experts, with more neurons.
    found["uneven"] = family.select({**found["mixture"].sizes, "experts": (4, 6), "expert_ffn": (16, 8)})
    found["smallest"] = family.select({axis: choices[-1] for axis, choices in family.choices.items()})
    for seed in range(DRAWN):
        draw = random.Random(seed)
        found[f"drawn {seed}"] = family.select(
            {
                axis: tuple(draw.choice(choices) for _ in family.layers_with(axis))
                if axis in PER_LAYER_AXES
                else draw.choice(choices)
                for axis, choices in family.choices.items()
            }
        )
    return found


def batch_of(index: int) -> dict[str, Tensor]:
    """A batch whose tokens fill vector registers on every layout: core's scores are fp32, and torch's sigmoid rounds
    the few numbers that are left over otherwise than the others.
    """
    batch = kit.batch(index, length=32)
    group = parallel_state.get_context_parallel_group()
    found: dict[str, Tensor] = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    return found


def outcome(model: Any, layout: Layout | None, batches: tuple[int, ...] = (0,), **how: Any) -> Outcome:
    """Logits of the last batch, loss, and the gradient of every weight; `how` may have leaf probabilities."""
    model.zero_grad(set_to_none=True)
    total, logits = torch.zeros((), dtype=torch.float64), torch.zeros(())
    for index in batches:
        batch = batch_of(index)
        logits = gather_from_tensor_model_parallel_region(model(batch["tokens"], batch["position_ids"], None, **how))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        loss = (loss * batch["loss_mask"].flatten()).sum()
        loss.backward()
        total += loss.detach()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return {"logits": logits.detach(), "loss": total, "grads": moe_kit.gradients(model, layout)}


def error(a: Outcome, b: Outcome) -> float:
    """Worst relative error of two outcomes; of gradients that one of them has, for the ones that both have."""
    grads = {name: a["grads"][name] for name in b["grads"]}
    return max(
        kit.worst({"logits": a["logits"], "loss": a["loss"]}, {"logits": b["logits"], "loss": b["loss"]}),
        kit.worst(grads, b["grads"]),
    )


def extracted(family: Family, selection: Selection, settings: Mapping[str, Any]) -> Outcome:
    """A stock model of the submodel's shape with the kept weights; gradients in their place in the parent's."""
    weights = moe_kit.full_weights(family.layout)
    shape = selection.submodel(family.shape)
    model = moe_kit.stock_model(shape, **settings)
    # Equality 4: the formula is the built object's size.
    size = parameters(family.shape, selection.sizes, selection.gates(len(family.shape.pattern)))
    assert sum(p.numel() for p in model.parameters()) == size
    small = kit.cut(weights, family.layout, selection)
    moe_kit.set_weights(model, None, small)
    found = outcome(model, None)
    biases = {name: value for name, value in small.items() if name.endswith("expert_bias")}
    grads = kit.scatter_back({**found["grads"], **biases}, family.layout, selection)
    found["grads"] = {name: grad for name, grad in grads.items() if not name.endswith("expert_bias")}
    return found


def equalities(router: str) -> dict[str, float]:
    """On one process: full == stock, masked == sliced == extracted, and that selections differ."""
    settings, _ = ROUTERS[router]
    family = family_of(router)
    moe_kit.layout_of_ranks()
    model = moe_kit.elastic_model(family, **settings)
    moe_kit.set_weights(model, family.layout, moe_kit.full_weights(family.layout))
    stock = extracted(family, family.full, settings)
    one = one_hot(family.full, family)
    full = {"sliced": {"selection": family.full}, "masked": {"probabilities": one}, "plain": {}}
    errors = {f"full/{path}": error(outcome(model, family.layout, **how), stock) for path, how in full.items()}
    before = stock
    for name, selection in chosen(family).items():
        sliced = outcome(model, family.layout, selection=selection)
        masked = outcome(model, family.layout, probabilities=one_hot(selection, family))
        errors[f"{name}/masked_sliced"] = error(masked, sliced)
        errors[f"{name}/extracted_sliced"] = error(extracted(family, selection, settings), sliced)
        errors[f"{name}/differs"] = error(sliced, before)
        before = sliced
    return errors


def soft(family: Family) -> dict[str, Tensor]:
    """Probabilities between the choices, as leaves."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for axis in family.axes:
        logits = torch.randn(family.uses(axis), len(family.choices[axis]), generator=generator, dtype=torch.float64)
        found[axis] = torch.softmax(logits, -1)
    # Near the full choice: an expert that is half masked is hardly ever chosen, and then has no gradient.
    found["experts"] = torch.tensor([[0.85, 0.1, 0.05]] * family.uses("experts"), dtype=torch.float64)
    return {axis: each.requires_grad_() for axis, each in found.items()}


def batches_of_rank(sizes: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Both batches, but one for each rank where experts alone are split: it is data parallelism to other weights."""
    return (parallel_state.get_data_parallel_rank(),) if sizes == LAYOUTS["ep2"] else (0, 1)


def on_layout(router: str, sizes: tuple[int, int, int, int]) -> dict[str, Outcome]:
    """One slice and one soft selection on a layout, over two batches: each data-parallel rank takes its own."""
    settings, _ = ROUTERS[router]
    family = family_of(router)
    moe_kit.layout_of_ranks(*sizes)
    model = moe_kit.elastic_model(family, **settings)
    moe_kit.set_weights(model, family.layout, moe_kit.full_weights(family.layout))
    batches = batches_of_rank(sizes)
    selection = chosen(family)["mixture"]
    found = {"sliced": outcome(model, family.layout, batches, selection=selection)}
    found["drawn"] = outcome(model, family.layout, batches, selection=chosen(family)["drawn 1"])
    probabilities = soft(family)
    found["soft"] = outcome(model, family.layout, batches, probabilities=probabilities)
    for axis, leaf in probabilities.items():
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()
        if len(family.choices[axis]) > 1:
            dist.all_reduce(grad)
            found["soft"]["grads"][axis] = grad
    for one in found.values():
        one["logits"] = one["loss"]  # ranks see different batches
    return found


def layouts(router: str) -> dict[str, float]:
    """Losses and gradients, those of the router's probabilities included, on every layout and in one process."""
    # Both ranks are data parallel here, and each runs both batches: everything that is summed comes out twice.
    want = on_layout(router, (1, 1, 1, 1))
    for one in want.values():
        one["loss"] = one["logits"] = one["loss"] / 2
        one["grads"] = {name: grad / 2 for name, grad in one["grads"].items()}
    errors = {}
    for layout, sizes in LAYOUTS.items():
        got = on_layout(router, sizes)
        errors.update({f"{layout}/{path}": error(got[path], want[path]) for path in want})
    errors["differs"] = error(want["soft"], want["sliced"])
    return errors


def new_model(router: str, **config: Any) -> tuple[Any, Family]:
    """A family's model on one process, in training."""
    family = family_of(router)
    moe_kit.layout_of_ranks()
    model = moe_kit.elastic_model(family, **{**ROUTERS[router][0], **config})
    moe_kit.set_weights(model, family.layout, moe_kit.full_weights(family.layout))
    return model.train(), family


def counted(model: Any) -> Tensor:
    """Tokens that each expert of each MoE layer has counted, `[layers, E]`."""
    return torch.stack([m.local_tokens_per_expert.clone() for m in model.modules() if hasattr(m, "expert_bias")])


def recomputed() -> dict[str, float]:
    """Activations recomputed or kept: the same gradients, and tokens counted once."""
    errors = {}
    plain, family = new_model("sigmoid")
    hows: dict[str, Callable[[], dict[str, Any]]] = {
        "sliced": lambda: {"selection": chosen(family)["mixture"]},
        "soft": lambda: {"probabilities": soft(family)},
    }
    role = MoeRole(count_tokens=True, loss_weight=1.0)
    want = {path: outcome(plain, family.layout, **how(), moe=role) for path, how in hows.items()}
    tokens = counted(plain)
    for kind, config in {
        "full": RECOMPUTE,
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["moe", "layernorm", "mlp"]},
        "shared": {"recompute_granularity": "selective", "recompute_modules": ["shared_experts"]},
    }.items():
        model, _ = new_model("sigmoid", **config)
        errors.update(
            {
                f"{kind}/{path}": error(outcome(model, family.layout, **how(), moe=role), want[path])
                for path, how in hows.items()
            }
        )
        errors[f"{kind}/counted"] = float((counted(model) - tokens).abs().max())
    return errors


def counting() -> dict[str, float]:
    """Whose tokens move the experts' biases."""
    model, family = new_model("sigmoid")
    full, layers = {"selection": family.full}, 2
    batch = batch_of(0)
    tokens = batch["tokens"].numel() * family.shape.top_k * layers
    outcome(model, family.layout, **full, moe=MoeRole(count_tokens=False, loss_weight=1.0))
    with torch.no_grad():
        model(batch["tokens"], batch["position_ids"], None, **full, moe=MoeRole(count_tokens=True, loss_weight=1.0))
    silent = float(counted(model).sum())
    outcome(model, family.layout, **full, moe=MoeRole(count_tokens=True, loss_weight=1.0))
    once = float(counted(model).sum())
    narrow, _ = new_model("sigmoid")
    small = family.select({**family.full.sizes, "experts": family.choices["experts"][-1]})
    outcome(narrow, family.layout, selection=small, moe=MoeRole(count_tokens=True, loss_weight=1.0))
    cut = [number for number in range(8) if number not in (0, 1, 4, 5)]  # two blocks, the first two of each are kept
    return {
        "not asked": silent,
        "asked": once - tokens,
        "cut experts": float(counted(narrow)[:, cut].sum()),
        "kept experts": float(counted(narrow).sum()) - tokens,
    }


def weighted() -> dict[str, float]:
    """The balancing losses are linear in the role's weight, and count."""
    model, family = new_model("balanced")
    how = {"selection": chosen(family)["mixture"]}
    none, quarter, one = (
        outcome(model, family.layout, **how, moe=MoeRole(count_tokens=False, loss_weight=weight))["grads"]
        for weight in (0.0, 0.25, 1.0)
    )
    mixed = {name: 0.75 * none[name] + 0.25 * one[name] for name in none}
    return {"linear": kit.worst(quarter, mixed), "differs": kit.worst(one, none)}


def slope() -> dict[str, float]:
    """The gradient of a soft choice of experts against a difference of losses along one direction."""
    errors = {}
    for router in ("sigmoid", "softmax", "pre_softmax"):
        model, family = new_model(router)
        leaves = soft(family)
        outcome(model, family.layout, probabilities=leaves)
        direction, step = torch.tensor([[1.0, -2.0, 1.0]], dtype=torch.float64), 1e-4
        gradient = float((leaves["experts"].grad * direction).sum())

        def loss(by: Tensor, model: Any = model, family: Family = family, leaves: Any = leaves) -> float:
            moved = {**leaves, "experts": leaves["experts"] + by}
            moved = {axis: leaf.detach().requires_grad_() for axis, leaf in moved.items()}
            return float(outcome(model, family.layout, probabilities=moved)["loss"])

        # Both ranks have the same data, and the loss is their sum.
        slope = (loss(step * direction) - loss(-step * direction)) / (2 * step) / dist.get_world_size()
        errors[router] = abs(gradient - slope) / abs(slope)
        errors[f"{router}/size"] = abs(slope)
    return errors


def _without_mask(name: str) -> Callable[[Any], Any]:
    """A forward that leaves its mask out."""

    def forward(original: Any) -> Any:
        return lambda self, *args, mask=None, **kwargs: original(self, *args, **kwargs)

    forward.__name__ = name
    return forward


def faults() -> dict[str, float]:
    """Faults put into one path, each of which must make it differ from the other."""
    model, family = new_model("sigmoid")
    selection = chosen(family)["smallest"]
    sliced = outcome(model, family.layout, selection=selection)
    errors = {"none": error(outcome(model, family.layout, probabilities=one_hot(selection, family)), sliced)}
    for name, owner in {
        "router": moe_router.ElasticRouter,
        "experts": moe.ElasticExperts,
        "shared expert": moe.ElasticSharedExpert,
    }.items():
        right = owner.forward
        owner.forward = _without_mask(name)(right)  # type: ignore[method-assign,assignment]
        try:
            errors[name] = error(outcome(model, family.layout, probabilities=one_hot(selection, family)), sliced)
        finally:
            owner.forward = right  # type: ignore[method-assign]
    kept = moe_router._kept
    moe_router._kept = lambda bias, experts: None if bias is None else bias[: sum(b - a for a, b in experts)]
    try:
        errors["bias"] = error(outcome(model, family.layout, selection=selection), sliced)
    finally:
        moe_router._kept = kept
    # Cut as if the experts were one block: the first ones instead of the first of every block.
    one_block = Layout(family.shape, family.ffn_blocks, 1)
    weights = moe_kit.full_weights(family.layout)
    wrong = moe_kit.stock_model(selection.submodel(family.shape), **ROUTERS["sigmoid"][0])
    moe_kit.set_weights(wrong, None, kit.cut(weights, one_block, selection))
    logits = outcome(wrong, None)["logits"]
    errors["expert order"] = kit.worst({"logits": logits}, {"logits": sliced["logits"]})
    return errors


def _step(router: str, sizes: tuple[int, int, int, int]) -> Outcome:
    """Two microbatches of every data-parallel rank, a slice after the full model, through core's data parallelism.

    The last microbatch, in which gradients are reduced while others are made, leaves experts out.

    Args:
        router: of the model.
        sizes: of the layout, see `LAYOUTS`.
    """
    settings, family = ROUTERS[router][0], family_of(router)
    moe_kit.layout_of_ranks(*sizes)
    model = moe_kit.elastic_model(family, **settings).train()
    moe_kit.set_weights(model, family.layout, moe_kit.full_weights(family.layout))
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=False, overlap_grad_reduce=True), model
    )
    wrapped.zero_grad_buffer()
    ranks, mixture = batches_of_rank(sizes), chosen(family)["mixture"]
    runs = [(rank, family.full) for rank in ranks] + [(rank, mixture) for rank in ranks]
    for number, (rank, selection) in enumerate(runs):
        batch = batch_of(rank)
        role = MoeRole(count_tokens=selection == family.full, loss_weight=1.0)
        with contextlib.nullcontext() if number == len(runs) - 1 else wrapped.no_sync():
            local = wrapped(batch["tokens"], batch["position_ids"], None, selection=selection, moe=role)
            logits = gather_from_tensor_model_parallel_region(local)
            labels = batch["labels"].flatten()
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").backward()
    finalize_model_grads([wrapped])
    biases = [m.expert_bias for m in model.modules() if getattr(m, "expert_bias", None) is not None]
    grads = moe_kit.reduced_gradients(model, family.layout)
    if biases:
        grads["biases"] = torch.stack(biases).double()
    return {"grads": grads, "loss": torch.ones(1), "logits": torch.ones(1)}


def steps() -> dict[str, float]:
    """Gradients and moved biases after core's data parallelism with overlap, on every layout and in one process."""
    errors = {}
    for router in ("sigmoid", "balanced", "grouped"):
        want = _step(router, (1, 1, 1, 1))
        for name, grad in want["grads"].items():
            if name != "biases":  # both ranks ran everything, and their gradients are summed
                want["grads"][name] = grad / 2
        for layout, sizes in LAYOUTS.items():
            errors[f"{router}/{layout}"] = error(_step(router, sizes), want)
        if "biases" in want["grads"]:
            weights = moe_kit.full_weights(family_of(router).layout)
            before = torch.stack([each for name, each in weights.items() if name.endswith("expert_bias")])
            errors[f"{router}/moved"] = float((want["grads"]["biases"] - before).abs().min())
    return errors


def run_all() -> dict[str, dict[str, float]]:
    """Case -> errors; the worst over ranks."""
    import moe_checkpoints  # which asks this module for its layouts

    results = {f"equalities/{router}": equalities(router) for router in ROUTERS}
    results.update({f"layouts/{router}": layouts(router) for router in ("sigmoid", "softmax")})
    for case in (recomputed, counting, weighted, slope, faults, steps, moe_checkpoints.checkpoints):
        results[case.__name__] = case()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, results)
    return {
        case: {key: max((one[case][key] for one in everyone if key in one[case]), key=abs) for key in errors}
        for case, errors in results.items()
    }
