"""masked == sliced == extracted, forward and gradients, in fp64, and the faults that must break it."""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import elastic_kit as kit
import fake_engine
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_elastic.backend import LOCAL, TRANSFORMER_ENGINE
from megatron_elastic.budget import Selection
from megatron_elastic.cost_model import parameters
from megatron_elastic.layers import norm as norm_layers
from megatron_elastic.layers import stack
from megatron_elastic.layout import Layout
from megatron_elastic.masks import one_hot
from megatron_elastic.sorting import random_orders

LAYOUT = kit.FAMILY.layout
CHOICES = kit.FAMILY.choices
LAYERS = len(kit.PATTERN)
Outcome = dict[str, Any]


def chosen_selections() -> dict[str, Selection]:
    """Every axis alone at its smallest, or differing between layers; all of them; and seeded random combinations."""
    found = {axis: kit.narrow(**{axis: CHOICES[axis][-1]}) for axis in kit.FAMILY.axes}
    found["smallest"] = kit.FAMILY.select({axis: CHOICES[axis][-1] for axis in kit.FAMILY.axes})
    varied: dict[str, int | tuple[int, ...]] = {"ffn": (24, 64, 40), "mamba_heads": (2, 6), "attention_heads": (6, 2)}
    found.update({f"varied {axis}": kit.narrow(**{axis: sizes}) for axis, sizes in varied.items()})
    found["varied"] = kit.narrow(**varied, hidden=24, mamba_head_dim=3, depth=5)
    draw = random.Random(17)
    for number in range(5):
        found[f"random{number}"] = random_selection(draw)
    return found


def random_selection(draw: random.Random) -> Selection:
    """Any sizes that the family's choices allow, without any layers (hard masks know the ranked ones alone)."""
    sizes: dict[str, int | tuple[int, ...]] = {}
    for axis in kit.FAMILY.axes:
        uses = tuple(draw.choice(CHOICES[axis]) for _ in range(kit.FAMILY.uses(axis)))
        sizes[axis] = uses if len(uses) > 1 else uses[0]
    return kit.FAMILY.select(sizes)


def whole_gradients(model: Any, layout: Layout) -> dict[str, Tensor]:
    """`.grad` of every parameter, whole (tensor-parallel shards joined)."""
    group = parallel_state.get_tensor_model_parallel_group()
    dimensions, found = layout.parameters(), {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        shards = [torch.empty_like(grad) for _ in range(group.size())]
        dist.all_gather(shards, grad.contiguous(), group=group)
        found[name] = kit.unshard(shards, dimensions[name])
    return found


def outcome(model: Any, layout: Layout, teacher_logits: Tensor, **how: Any) -> Outcome:
    """Logits, KL to the teacher and the gradient of every weight, through the model's logits."""
    batch = kit.batch()
    model.zero_grad(set_to_none=True)
    local = model(batch["tokens"], batch["position_ids"], None, **how)
    logits = gather_from_tensor_model_parallel_region(local)
    log_p, log_q = torch.log_softmax(teacher_logits, -1), torch.log_softmax(logits, -1)
    loss = ((log_p.exp() * (log_p - log_q)).sum(-1) * batch["loss_mask"]).sum()
    loss.backward()
    return {"logits": logits.detach(), "loss": loss.detach(), "grads": whole_gradients(model, layout)}


def fused(model: Any, **how: Any) -> Outcome:
    """The same through the KD loss inside the model's forward."""
    batch = kit.batch()
    where = batch["tokens"], batch["position_ids"]
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        target = model.teacher_target(model(*where, run_teacher=True))
    loss = model(*where, **how, teacher=target, loss_mask=batch["loss_mask"])
    loss.backward()
    return {"loss": loss.detach(), "grads": whole_gradients(model, LAYOUT)}


def extracted(
    selection: Selection,
    teacher_logits: Tensor,
    weights: dict[str, Tensor] | None = None,
    positions: str = "none",
    **other: Any,
) -> Outcome:
    """A stock model of the submodel's shape with the kept weights; gradients in their place in the parent's."""
    shape = selection.submodel(kit.SHAPE)
    small = kit.SubmodelLayout(shape, 8)
    weights = kit.full_weights(LAYOUT) if weights is None else weights
    model = kit.stock_model(shape, positions=positions, **other)
    share = parallel_state.get_tensor_model_parallel_world_size()
    if share == 1:  # equality 4: the formula is the built object's size
        assert sum(p.numel() for p in model.parameters()) == parameters(
            kit.SHAPE, selection.sizes, selection.gates(LAYERS)
        )
    kit.set_weights(model, small, kit.cut(weights, LAYOUT, selection))
    found = outcome(model, small, teacher_logits)
    found["grads"] = kit.scatter_back(found["grads"], LAYOUT, selection)
    return found


def distance(a: Outcome, b: Outcome) -> float:
    """Worst relative difference of logits, loss and gradients."""
    errors = [kit.worst(a["grads"], b["grads"])]
    if "logits" in a and "logits" in b:
        errors.append(float((a["logits"] - b["logits"]).abs().max() / b["logits"].abs().max()))
    errors.append(float((a["loss"] - b["loss"]).abs() / b["loss"].abs().clamp(min=1e-300)))
    return max(errors)


def teacher_logits_of(model: Any) -> Tensor:
    """The teacher's logits, whole."""
    batch = kit.batch()
    with torch.no_grad():
        return gather_from_tensor_model_parallel_region(model.teachers[0](batch["tokens"], batch["position_ids"], None))


def soft(selection: Selection) -> dict[str, Any]:
    """Keyword of the masked path at one-hot."""
    return {"probabilities": one_hot(selection, kit.FAMILY, torch.float64)}


def sorting(model: Any, teacher_logits: Tensor) -> dict[str, float]:
    """Equality 3: a parent in another order gives the same logits, and the same gradients in that order."""
    orders = random_orders(LAYOUT, 5)
    dimensions = LAYOUT.parameters()

    def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: kit.permuted(value, dimensions[name], orders.of(name)) for name, value in tensors.items()}

    weights = kit.full_weights(LAYOUT)
    before = outcome(model, LAYOUT, teacher_logits)
    before["grads"] = moved(before["grads"])
    kit.set_weights(model, LAYOUT, moved(weights))
    after = outcome(model, LAYOUT, teacher_logits)
    # The negative: one weight left in the parent's order.
    name = "decoder.layers.0.mixer.out_proj.weight"
    kit.set_weights(model, LAYOUT, {**moved(weights), name: weights[name]})
    wrong = outcome(model, LAYOUT, teacher_logits)
    kit.set_weights(model, LAYOUT, weights)
    return {"sorted": distance(after, before), "sorted_but_one": distance(wrong, before)}


def equalities(tp: int) -> dict[str, float]:
    """Errors of equalities 1 and 2 on a layout."""
    kit.layout_of_ranks(tp)
    model = kit.elastic_model()
    target = teacher_logits_of(model)
    found: dict[str, float] = {}
    stock = kit.stock_model(kit.SHAPE)
    kit.set_weights(stock, LAYOUT, kit.full_weights(LAYOUT))
    plain = outcome(stock, LAYOUT, target)
    for path, how in {"plain": {}, "sliced": {"selection": kit.FAMILY.full}, "masked": soft(kit.FAMILY.full)}.items():
        found[f"full/{path}"] = distance(outcome(model, LAYOUT, target, **how), plain)
    found.update(sorting(model, target))
    previous: Outcome | None = None
    for name, selection in chosen_selections().items():
        masked = outcome(model, LAYOUT, target, **soft(selection))
        sliced = outcome(model, LAYOUT, target, selection=selection)
        found[f"{name}/masked_sliced"] = distance(masked, sliced)
        found[f"{name}/extracted_sliced"] = distance(extracted(selection, target), sliced)
        found[f"{name}/fused_sliced"] = distance(fused(model, selection=selection), sliced)
        found[f"{name}/fused_masked"] = distance(fused(model, **soft(selection)), masked)
        if previous is not None:
            found[f"{name}/differs"] = float((sliced["logits"] - previous["logits"]).abs().max())
        previous = sliced
    return found


def rotary() -> dict[str, float]:
    """The same paths on a parent with rotary position embeddings."""
    kit.layout_of_ranks()
    model, plain = kit.elastic_model(positions="rope"), kit.elastic_model()
    target, selection = teacher_logits_of(model), chosen_selections()["smallest"]
    sliced = outcome(model, LAYOUT, target, selection=selection)
    return {
        "masked_sliced": distance(outcome(model, LAYOUT, target, **soft(selection)), sliced),
        "extracted_sliced": distance(extracted(selection, target, positions="rope"), sliced),
        "without_positions": distance(outcome(plain, LAYOUT, target, selection=selection), sliced),
    }


def _with_fault(
    break_it: Callable[[Any], Callable[[], None]],
    how: Callable[[Selection], dict[str, Any]],
    which: str = "smallest",
) -> float:
    """Distance between a path with a fault and the extracted model."""
    kit.layout_of_ranks()
    model = kit.elastic_model()
    target = teacher_logits_of(model)
    selection = chosen_selections()[which]
    want = extracted(selection, target)
    mend = break_it(model)
    try:
        return distance(outcome(model, LAYOUT, target, **how(selection)), want)
    finally:
        mend()


def _gated_norm_over_the_whole_group(model: Any) -> Callable[[], None]:
    """The gated norm divides by the parent's channels instead of the kept ones."""
    right = norm_layers.gated_rms_norm

    def wrong(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, mask: Tensor | None = None) -> Tensor:
        return right(y if mask is None else y * mask, z, weight, groups, eps)

    norm_layers.gated_rms_norm = wrong
    return lambda: setattr(norm_layers, "gated_rms_norm", right)


def _unmasked_residual(model: Any) -> Callable[[], None]:
    """One layer adds to channels that the submodel does not have."""
    layer = model.decoder.layers[1]
    layer.forward = lambda x, **k: (
        x + layer.mlp(layer.pre_mlp_layernorm(x, width=k["masks"].hidden.sum()), mask=k["masks"].axes["ffn"])
    )
    return lambda: layer.__dict__.pop("forward")


def _skipped_layer_is_added(model: Any) -> Callable[[], None]:
    """A layer that depth leaves out adds to the residual stream all the same."""
    tables = model.decoder.mask_tables
    right = tables.of_layer

    def wrong(mixed: Any, number: int) -> Any:
        found = right(mixed, number)
        return dataclasses.replace(found, residual=found.hidden)

    tables.of_layer = wrong
    return lambda: tables.__dict__.pop("of_layer")


def _other_layer_is_skipped(model: Any) -> Callable[[], None]:
    """A slice leaves out the neighbour of the layer that it should."""
    plans = model.decoder.plans
    selection = chosen_selections()["smallest"]
    plan = plans.of(selection)
    layers = list(plan.layers)
    layers[1], layers[4] = (dataclasses.replace(layers[n], skipped=s) for n, s in ((1, True), (4, False)))
    plans._made[selection] = dataclasses.replace(plan, layers=tuple(layers))
    return lambda: plans._made.__setitem__(selection, plan)


def _channels_as_one_axis(model: Any) -> Callable[[], None]:
    """The channels of Mamba heads are cut as a plain prefix of each group, not inside every head."""
    plan = model.decoder.plans.of(chosen_selections()["mamba_head_dim"]).layers[0]
    right = plan.segments["mixer.out_proj.weight"]
    group, kept = 16, sum(stop - start for start, stop in right[1]) // 2
    plan.segments["mixer.out_proj.weight"] = (right[0], tuple((g * group, g * group + kept) for g in range(2)))
    return lambda: plan.segments.__setitem__("mixer.out_proj.weight", right)


def _first_layers_sizes(model: Any) -> Callable[[], None]:
    """All layers are masked as the first of their kind."""
    tables = model.decoder.mask_tables
    right = tables.of_layer
    tables.of_layer = lambda mixed, number: right([mask[:1] for mask in mixed], number)
    return lambda: tables.__dict__.pop("of_layer")


def _final_norm_over_full_width(model: Any) -> Callable[[], None]:
    """The final norm divides by the parent's width."""
    norm = model.decoder.final_norm
    right = norm.forward
    norm.forward = lambda x, width=None, segments=None: right(x, segments=segments)
    return lambda: norm.__dict__.pop("forward")


def _other_columns(model: Any, name: str) -> Callable[[], None]:
    """A sliced weight takes the last entries instead of the first."""
    plan = model.decoder.plans.of(chosen_selections()["smallest"])
    plan = next(each for each in (plan, *plan.layers) if name in each.segments)
    right = plan.segments[name]
    size = kit.SHAPE.hidden
    moved = tuple(
        ((size - kept[0][1], size),) if kept is not None and kept[0] == (0, plan.hidden) else kept for kept in right
    )
    plan.segments[name] = moved
    return lambda: plan.segments.__setitem__(name, right)


def _plain_prefix_of_heads(model: Any) -> Callable[[], None]:
    """Mamba heads are cut as a plain prefix over the groups."""
    plan = model.decoder.plans.of(chosen_selections()["smallest"]).layers[0]
    right = plan.segments["mixer.A_log"]
    kept = sum(stop - start for start, stop in right[0])
    plan.segments["mixer.A_log"] = (((0, kept),),)
    return lambda: plan.segments.__setitem__("mixer.A_log", right)


def _extracted_in_another_order() -> float:
    """The cut takes other neurons of one layer's first linear than the family runs."""
    kit.layout_of_ranks()
    model = kit.elastic_model()
    target = teacher_logits_of(model)
    selection = chosen_selections()["smallest"]
    weights = kit.full_weights(LAYOUT)
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    wrong = extracted(selection, target, {**weights, name: weights[name].flip(0)})
    return distance(wrong, outcome(model, LAYOUT, target, selection=selection))


def faults() -> dict[str, float]:
    """Error that each inserted fault makes."""
    sliced: Callable[[Selection], dict[str, Any]] = lambda s: {"selection": s}  # noqa: E731
    return {
        "gated norm": _with_fault(_gated_norm_over_the_whole_group, soft),
        "residual stream": _with_fault(_unmasked_residual, soft),
        "final norm": _with_fault(_final_norm_over_full_width, soft),
        "LM head": _with_fault(lambda m: _other_columns(m, "output_layer.weight"), sliced),
        "FFN": _with_fault(lambda m: _other_columns(m, "mlp.linear_fc1.weight"), sliced),
        "QKV": _with_fault(lambda m: _other_columns(m, "self_attention.linear_qkv.weight"), sliced),
        "SSM groups": _with_fault(_plain_prefix_of_heads, sliced),
        "depth, masked": _with_fault(_skipped_layer_is_added, soft),
        "depth, sliced": _with_fault(_other_layer_is_skipped, sliced),
        "head channels": _with_fault(_channels_as_one_axis, sliced, "mamba_head_dim"),
        "layers that differ": _with_fault(_first_layers_sizes, soft, "varied"),
        "extraction": _extracted_in_another_order(),
        "none": _with_fault(lambda m: lambda: None, sliced),
    }


def reports(model: Any, selection: Selection) -> tuple[list[str], list[str]]:
    """The order in which a slice calls the modules that own weights, and the order in which gradients come."""
    called: list[str] = []
    reported: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
        if list(module.parameters(recurse=False))
    ]
    hooks += [
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: reported.append(name))
        for name, parameter in model.named_parameters()
    ]
    outcome(model, LAYOUT, teacher_logits_of(model), selection=selection)
    for hook in hooks:
        hook.remove()
    return called, reported


def orders() -> dict[str, float]:
    """1 where a slice that leaves layers out reports in the order of one that runs them, as DDP's buckets ask."""
    kit.layout_of_ranks()
    model = kit.elastic_model()
    want, fewer = reports(model, kit.FAMILY.full), kit.narrow(depth=4)
    right = reports(model, fewer)
    layer = model.decoder.layers[5]
    plain = [name for name, _ in layer.named_parameters(prefix="decoder.layers.5")]
    stack._skip, mend = (lambda layer, plan, x: x), stack._skip
    try:
        silent = reports(model, fewer)
    finally:
        stack._skip = mend
    return {
        "calls": float(right[0] == want[0] and len(set(want[0])) == len(want[0])),
        "gradients": float(right[1] == want[1] and len(want[1]) == len(LAYOUT.parameters())),
        "layers that say nothing": float(silent[0] == want[0] or silent[1] == want[1]),
        "order of the parameters": float([n for n in want[1] if n in plain] == plain[::-1]),
    }


def engine() -> dict[str, float]:
    """Transformer Engine's backend (its stand-in) as the local one on two tensor-parallel ranks, with and without SP.

    Gradients of replicated weights are compared as each rank has them, before core sums them over ranks.
    """
    kit.layout_of_ranks(2)
    found: dict[str, float] = {}
    selection = chosen_selections()["varied"]
    with fake_engine.installed() as state:
        for name, other in {"tp2": {}, "tp2_sp": {"sequence_parallel": True}}.items():
            models = [kit.elastic_model(backend=each, **other) for each in (TRANSFORMER_ENGINE, LOCAL)]
            target = teacher_logits_of(models[1])
            for path, how in {"sliced": {"selection": selection}, "masked": soft(selection)}.items():
                ours, local = (outcome(model, LAYOUT, target, **how) for model in models)
                found[f"{name}/{path}"] = distance(ours, local)
            found[f"{name}/differs"] = distance(outcome(models[0], LAYOUT, target, selection=kit.FAMILY.full), ours)
        found["calls"] = float(len(state.calls))
    return found


def run_all() -> dict[str, dict[str, float]]:
    """Case -> errors; the worst over ranks."""
    results = {"tp1": equalities(1), "tp2": equalities(2), "faults": faults(), "rope": rotary(), "orders": orders()}
    results["engine"] = engine()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, results)
    return {case: {k: max(one[case][k] for one in everyone) for k in errors} for case, errors in results.items()}
