"""MoE layers: masked == sliced == extracted, every layout as one process, in fp64, and the faults that must show."""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import elastic_kit as kit
import moe_kit
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_elastic import checkpoint, standalone
from megatron_elastic.budget import Selection
from megatron_elastic.cost_model import parameters
from megatron_elastic.extraction import cut
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


def batch_of(index: int) -> dict[str, Tensor]:
    """A batch whose tokens fill vector registers on every layout: core's scores are fp32, and torch's sigmoid rounds
    the few numbers that are left over otherwise than the others.
    """
    return kit.batch(index, length=32)


def outcome(model: Any, layout: Layout, batches: tuple[int, ...] = (0,), **how: Any) -> Outcome:
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
    generator = torch.Generator().manual_seed(5)
    found = {}
    for axis in family.axes:
        logits = torch.randn(family.uses(axis), len(family.choices[axis]), generator=generator, dtype=torch.float64)
        found[axis] = torch.softmax(logits, -1)
    # Near the full choice: an expert that is half masked is hardly ever chosen, and then has no gradient.
    found["experts"] = torch.tensor([[0.85, 0.1, 0.05]], dtype=torch.float64)
    return {axis: each.requires_grad_() for axis, each in found.items()}


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
    small = Layout(selection.submodel(family.shape), family.ffn_blocks, moe_kit.EXPERT_BLOCKS)
    moe_kit.set_weights(wrong, small, moe_kit.cut(weights, one_block, selection))
    logits = outcome(wrong, small)["logits"]
    errors["expert order"] = kit.worst({"logits": logits}, {"logits": sliced["logits"]})
    return errors


def _load(folder: Path, model: Any) -> None:
    """Core's own loading: all that the model asks for is there, and nothing else but the description."""
    state, strict = {"model": model.sharded_state_dict()}, StrictHandling.RETURN_ALL
    found, missing, unexpected = dist_checkpointing.load(state, str(folder), strict=strict)
    assert set(missing) <= {"elastic.metadata"}, missing
    assert not unexpected, unexpected
    model.load_state_dict(found["model"])


def _wrong(model: Any, layout: Layout, weights: Mapping[str, Tensor]) -> float:
    """How many of this rank's tensors are not, bit for bit, their part of the whole weights."""
    got = {name: state.detach().clone() for name, state in moe_kit.states(model).items()}
    moe_kit.set_weights(model, layout, weights)
    return float(sum(not torch.equal(got[name], state) for name, state in moe_kit.states(model).items()))


def checkpoints() -> dict[str, float]:
    """Saved by core on EP 2, read and cut by the package, loaded on every layout: wrong tensors of each step."""
    family, settings = moe_kit.family(moe_kit.shape(gated=True, expert_bias=True)), moe_kit.SIGMOID
    layout, weights = family.layout, moe_kit.full_weights(family.layout)
    names: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    root = Path(names[0])
    saved, selection = root / "family" / "iter_0000001", chosen(family)["mixture"]
    moe_kit.layout_of_ranks(1, 2, 1)
    model = moe_kit.elastic_model(family, **settings)
    moe_kit.set_weights(model, layout, weights)
    if dist.get_rank() == 0:
        saved.mkdir(parents=True)
    dist.barrier()
    state = {"model": model.sharded_state_dict(), "args": {"hidden_size": 32}, "iteration": 1}
    dist_checkpointing.save(state, str(saved), async_strategy="mcore", verify_integrity=True)
    small_weights = moe_kit.cut(weights, layout, selection)
    errors = {}
    if dist.get_rank() == 0:
        stored = checkpoint.parameters(saved)
        errors["read"] = float(
            len(set(stored) ^ set(weights))
            + sum(not torch.equal(checkpoint.read_parameter(saved, name), weights[name]) for name in stored)
        )
        arguments = {"shape": family.shape, "ffn_blocks": family.ffn_blocks, "expert_blocks": moe_kit.EXPERT_BLOCKS}
        cut(saved, root / "small", selection=selection, flags={}, **arguments)  # type: ignore[arg-type]
    dist.barrier()
    small, shape = checkpoint.find_checkpoint(root / "small"), selection.submodel(family.shape)
    small_layout = Layout(shape, family.ffn_blocks, moe_kit.EXPERT_BLOCKS)
    for name, sizes in {"alone": (1, 1, 1), **LAYOUTS}.items():
        moe_kit.layout_of_ranks(*sizes)
        whole = moe_kit.elastic_model(family, **settings)
        _load(saved, whole)
        errors[f"{name}/parent"] = _wrong(whole, layout, weights)
        cut_out = moe_kit.stock_model(shape, **settings)
        _load(small, cut_out)
        errors[f"{name}/extracted"] = _wrong(cut_out, small_layout, small_weights)
    moe_kit.layout_of_ranks()
    for folder, model, own, values in (
        (saved, moe_kit.elastic_model(family, **settings), layout, weights),
        (small, moe_kit.stock_model(shape, **settings), small_layout, small_weights),
    ):
        standalone.load_weights(model, folder)
        errors[f"{folder.parent.name}/standalone"] = _wrong(model, own, values)
    # The negative: another parent's weights are not these.
    errors["differs"] = _wrong(model, small_layout, moe_kit.cut(kit.full_weights(layout, 0.1), layout, selection))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(root)
    return errors


def run_all() -> dict[str, dict[str, float]]:
    """Case -> errors; the worst over ranks."""
    results = {f"equalities/{router}": equalities(router) for router in ROUTERS}
    results.update({f"layouts/{router}": layouts(router) for router in ("sigmoid", "softmax", "balanced")})
    for case in (recomputed, counting, weighted, slope, faults, checkpoints):
        results[case.__name__] = case()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, results)
    return {
        case: {key: max((one[case][key] for one in everyone if key in one[case]), key=abs) for key in errors}
        for case, errors in results.items()
    }
