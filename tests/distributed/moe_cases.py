"""MoE layers: masked == sliced == extracted, every layout as one process, in fp64, and the faults that must show."""

from collections.abc import Callable, Mapping
from typing import Any

import elastic_kit as kit
import moe_kit
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

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
}
"""Router -> its settings, and whether the MLPs and experts of its model are gated."""

LAYOUTS = {"ep2": (1, 2, 1), "tp2": (2, 1, 2), "tp2_ep2": (2, 2, 1)}
"""Layout -> tensor-, expert- and expert tensor-parallel size, on two ranks."""

RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def family_of(router: str) -> Family:
    """The family whose model has a router and its gates."""
    settings, gated = ROUTERS[router]
    return moe_kit.family(moe_kit.shape(gated=gated, expert_bias="moe_router_enable_expert_bias" in settings))


def chosen(family: Family) -> dict[str, Selection]:
    """Every axis of a MoE layer alone at its smallest, all axes at their smallest, and a mixture."""
    found = {
        axis: family.select({**family.full.sizes, axis: family.choices[axis][-1]})
        for axis in ("hidden", "experts", "expert_ffn", "shared_expert_ffn")
    }
    found["smallest"] = family.select({axis: choices[-1] for axis, choices in family.choices.items()})
    found["mixture"] = family.select({axis: choices[len(choices) // 2] for axis, choices in family.choices.items()})
    return found


def outcome(model: Any, layout: Layout, batches: tuple[int, ...] = (0,), **how: Any) -> Outcome:
    """Logits of the last batch, loss, and the gradient of every weight; `how` may have leaf probabilities."""
    model.zero_grad(set_to_none=True)
    total, logits = torch.zeros((), dtype=torch.float64), torch.zeros(())
    for index in batches:
        batch = kit.batch(index)
        logits = gather_from_tensor_model_parallel_region(model(batch["tokens"], batch["position_ids"], None, **how))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        loss = (loss * batch["loss_mask"].flatten()).sum()
        loss.backward()
        total += loss.detach()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return {"logits": logits.detach(), "loss": total, "grads": moe_kit.gradients(model, layout)}


def error(a: Outcome, b: Outcome) -> float:
    """Worst relative error of two outcomes; of gradients that one of them has, for the ones that both have."""
    grads = {name: a["grads"][name] for name in b["grads"]}
    return max(
        kit.worst({"logits": a["logits"], "loss": a["loss"]}, {"logits": b["logits"], "loss": b["loss"]}),
        kit.worst(grads, b["grads"]),
    )


def extracted(family: Family, selection: Selection, settings: Mapping[str, Any], weights: Any = None) -> Outcome:
    """A stock model of the submodel's shape with the kept weights; gradients in their place in the parent's."""
    weights = moe_kit.full_weights(family.layout) if weights is None else weights
    shape = selection.submodel(family.shape)
    small = Layout(shape, family.ffn_blocks, moe_kit.EXPERT_BLOCKS)
    model = moe_kit.stock_model(shape, **settings)
    if "moe_router_enable_expert_bias" not in settings:  # equality 4: the formula is the built object's size
        assert sum(p.numel() for p in model.parameters()) == parameters(family.shape, selection.sizes)
    moe_kit.set_weights(model, small, moe_kit.cut(weights, family.layout, selection))
    found = outcome(model, small)
    found["grads"] = moe_kit.scattered(found["grads"], family.layout, selection)
    return found


def equalities(router: str) -> dict[str, float]:
    """On one process: full == stock, masked == sliced == extracted, and that selections differ."""
    settings, _ = ROUTERS[router]
    family = family_of(router)
    moe_kit.layout_of_ranks()
    model = moe_kit.elastic_model(family, **settings)
    moe_kit.set_weights(model, family.layout, moe_kit.full_weights(family.layout))
    stock = extracted(family, family.full, settings)
    full = {"sliced": {"selection": family.full}, "masked": {"probabilities": one_hot(family.full, family)}, "plain": {}}
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
    generator = torch.Generator().manual_seed(5)
    found = {}
    for axis in family.axes:
        logits = torch.randn(family.uses(axis), len(family.choices[axis]), generator=generator, dtype=torch.float64)
        found[axis] = torch.softmax(logits, -1).requires_grad_()
    return found


def on_layout(router: str, tp: int, ep: int, etp: int, *, shared_data: bool) -> dict[str, Outcome]:
    """One slice and one soft selection on a layout, over two batches: each data-parallel rank takes its own."""
    settings, _ = ROUTERS[router]
    family = family_of(router)
    moe_kit.layout_of_ranks(tp, ep, etp)
    model = moe_kit.elastic_model(family, **settings)
    moe_kit.set_weights(model, family.layout, moe_kit.full_weights(family.layout))
    batches = (0, 1) if shared_data else (parallel_state.get_data_parallel_rank(),)
    selection = chosen(family)["mixture"]
    found = {"sliced": outcome(model, family.layout, batches, selection=selection)}
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
    family, (settings, _) = family_of(router), ROUTERS[router]
    moe_kit.layout_of_ranks()
    alone = moe_kit.elastic_model(family, **settings)
    moe_kit.set_weights(alone, family.layout, moe_kit.full_weights(family.layout))
    # Both ranks are data parallel here, and each runs both batches: everything that is summed comes out twice.
    want = on_layout(router, 1, 1, 1, shared_data=True)
    for one in want.values():
        one["loss"] = one["logits"] = one["loss"] / 2
        one["grads"] = {name: grad / 2 for name, grad in one["grads"].items()}
    errors = {}
    for layout, sizes in LAYOUTS.items():
        got = on_layout(router, *sizes, shared_data=sizes[0] == 2)
        errors.update({f"{layout}/{path}": error(got[path], want[path]) for path in want})
    errors["differs"] = error(want["soft"], want["sliced"])
    return errors
