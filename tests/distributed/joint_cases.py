"""Cases of `cases_body.py`: needs the CPU adaptation and a process group."""

from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import elastic_kit as kit
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training import global_vars
from torch import Tensor

from megatron_elastic.curriculum import FORWARD_KL, DistillationLoss, Stage
from megatron_elastic.distillation.roles import LIVE_TEACHER, OF_KIND, JointRoles
from megatron_elastic.forward_step import JointStep
from megatron_elastic.metadata import Metadata
from megatron_elastic.model import FamilyState
from megatron_elastic.ops.divergence import divergence_ref
from megatron_elastic.router import Router, RouterConfig, RouterTrainer

WEIGHTS = (0.5, 0.3, 0.2)
BASE_MICROBATCHES = 2
ROUTER = RouterConfig(iterations=20, width=16, std=0.5, clip=1e9, warmup=1, penalty=0.7, seed=3)
STEP = 4
STAGE = Stage(iterations=20, sequence_length=24, global_batch_size=4, micro_batch_size=2, weights=WEIGHTS)
MIXED = replace(STAGE, teacher={"p100": "trainable", "p75": "trainable"}, ce_weight=0.5)
"""The full budget learns from the text and teaches one other; the third follows the frozen teacher."""
MIXTURE = DistillationLoss(kind="jsd", beta=0.3, ce_weight=0.4)


class SilentLog:
    """A `StepLog` that says nothing."""

    interval = 1000

    def step(self, *_: Any) -> None:
        """Nothing."""

    def decided(self, *_: Any) -> None:
        """Nothing."""


def new_router() -> Router:
    """The same initial router everywhere."""
    return Router(ROUTER, kit.FAMILY)


def teachers(stage: Stage) -> list[int]:
    """The teacher of each budget."""
    return [OF_KIND[kind] for kind in stage.teachers([budget.name for budget in kit.FAMILY.budgets])]


def reference(
    mode: str, stage: Stage = STAGE, loss: DistillationLoss = FORWARD_KL, temperature: float = 1.0
) -> dict[str, Any]:
    """A plain loop over base microbatches and budgets on one process: no schedule, no DDP, router inside the graph."""
    kit.layout_of_ranks()
    model = kit.elastic_model()
    router = new_router()
    tokens = sum(kit.batch(i)["loss_mask"].sum() for i in range(BASE_MICROBATCHES))
    total: Any = 0.0
    losses = torch.zeros(len(WEIGHTS), dtype=torch.float64)
    soft = [
        {axis: router.probabilities(budget, axis, STEP) for axis in kit.FAMILY.axes} for budget in range(len(WEIGHTS))
    ]
    for index in range(BASE_MICROBATCHES):
        batch = kit.batch(index)
        where = batch["tokens"], batch["position_ids"]
        with torch.no_grad():
            targets = {
                kind: model.teacher_target(model(*where, run_teacher=True, live_teacher=kind == LIVE_TEACHER),
                                           kind == LIVE_TEACHER)
                for kind in set(teachers(stage))
            }  # fmt: skip
        for budget, weight in enumerate(WEIGHTS):
            how = {"selection": kit.SELECTIONS[budget]} if mode == "sliced" else {"probabilities": soft[budget]}
            kind = teachers(stage)[budget]
            if budget == 0 and kind == LIVE_TEACHER:
                logits = model(*where, **how).flatten(0, 1)
                each = torch.nn.functional.cross_entropy(logits, batch["labels"].flatten(), reduction="none")
                summed, factor = (each * batch["loss_mask"].flatten()).sum(), stage.ce_weight
            elif loss == FORWARD_KL and temperature == 1.0:
                summed, factor = model(*where, **how, teacher=targets[kind], loss_mask=batch["loss_mask"]), 1.0
            else:
                summed, factor = unfused(model(*where, **how), targets[kind], batch, loss, temperature), 1.0
            losses[budget] += summed.detach()
            total = total + weight * factor * summed / tokens
    if mode == "soft":
        for budget, weight in enumerate(WEIGHTS):
            total = total + weight * ROUTER.penalty * router.penalty(budget, soft[budget])
    total.backward()
    # Core multiplies by 1 / tokens as it comes out in fp32: the one rounding that is not the maths' own.
    counted = (tokens * len(WEIGHTS)).to(torch.int)
    rounding = float(counted) * float(torch.reciprocal(counted))
    return {
        "grads": {name: parameter.grad * rounding for name, parameter in model.named_parameters()},
        "router": {name: p.grad for name, p in router.named_parameters() if p.grad is not None},
        "losses": losses / tokens,
    }


def unfused(
    logits: Tensor, target: Any, batch: dict[str, Tensor], loss: DistillationLoss, temperature: float
) -> Tensor:
    """A loss of the recipe, by its definition, from the logits `[b, s, V]` of the model."""
    teacher = (target.hidden @ target.weight.t()).transpose(0, 1)
    divergence = divergence_ref((logits / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1), loss)
    text = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    return ((temperature**2 * divergence + loss.ce_weight * text) * batch["loss_mask"]).sum()


def roles(size: int, stage: Stage) -> list[dict[str, Tensor]]:
    """What the loader hands out: each base microbatch once a role."""
    kinds = JointRoles(len(WEIGHTS), sorted(set(teachers(stage)), reverse=True))
    return [
        {**kit.batch(index), "budget": torch.full((size,), kinds.budget(role, index))}
        for index in range(BASE_MICROBATCHES)
        for role in range(kinds.count)
    ]


def gathered(model: Any) -> dict[str, Tensor]:
    """Every weight's `main_grad`, whole, on every rank."""
    tp_group = parallel_state.get_tensor_model_parallel_group()
    dimensions = kit.FAMILY.layout.parameters()
    found = {}
    for name, parameter in model.named_parameters():
        whole = kit.global_name(model, name)
        shards = [torch.empty_like(parameter.main_grad) for _ in range(tp_group.size())]
        dist.all_gather(shards, parameter.main_grad.contiguous(), group=tp_group)
        found[whole] = kit.unshard(shards, dimensions[whole])
    stages: list[Any] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(stages, found, group=parallel_state.get_pipeline_model_parallel_group())
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def keep_masks_on_the_stack(model: Any) -> None:
    """The fault that an explicit selection rules out: a replay reads the masks of the last forward, not its own."""
    stack = model.decoder
    right, mix = stack._run, stack.mask_tables.forward
    last: list[Any] = []

    def mixed(probabilities: Any) -> Any:
        masks = mix(probabilities)
        last[:] = [mask.detach() for mask in masks]  # a graph captured here could not be walked twice
        return masks

    def wrong(numbers: Any, plan: Any, moe: Any, x: Tensor, rotary: Any, documents: Any, *masks: Tensor) -> Tensor:
        return right(numbers, plan, moe, x, rotary, documents, *(mask.to(x.dtype) for mask in (last if masks else ())))

    stack.mask_tables.forward, stack._run = mixed, wrong


def joint(
    mode: str,
    tp: int,
    pp: int,
    *,
    ambient: bool = False,
    stage: Stage = STAGE,
    loss: DistillationLoss = FORWARD_KL,
    temperature: float = 1.0,
    **config: Any,
) -> dict[str, Any]:
    """One step of `JointStep` through core's schedule and DDP."""
    kit.layout_of_ranks(tp, pp)
    model = kit.elastic_model(**config)
    if ambient:
        keep_masks_on_the_stack(model)
    trainer = RouterTrainer(new_router(), WEIGHTS) if mode == "soft" else None
    state = FamilyState(
        Metadata.of_family(kit.FAMILY, {}, selections=kit.SELECTIONS if mode == "sliced" else ()), trainer
    )
    model.states = (state,)
    recipe = SimpleNamespace(family=kit.FAMILY, temperature=temperature, loss=loss, budget_mode="joint")
    step = JointStep(recipe, state, stage, SilentLog())  # type: ignore[arg-type]
    model.config.finalize_model_grads_func = step.finalize
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=False, overlap_grad_reduce=False), model
    )
    wrapped.zero_grad_buffer()
    global_vars._GLOBAL_ARGS = Namespace(
        curr_iteration=STEP, check_for_nan_in_loss_and_grad=False, check_for_spiky_loss=False
    )
    reduced = run_schedule(step, wrapped)
    found: dict[str, Any] = {"grads": gathered(model)}
    if trainer is not None:
        step._after_step(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))
        found["router"] = {n: p.grad for n, p in trainer.router.named_parameters() if p.grad is not None}
    if reduced:  # the last stage
        found["losses"] = per_budget(step, reduced)
    # Evaluation goes through the same roles; the teacher is in no mode of the student's.
    wrapped.train()
    assert not model.teachers[0].training
    wrapped.eval()
    with torch.no_grad():
        judged = run_schedule(step, wrapped, forward_only=True)
    if judged and mode == "sliced":
        found["evaluated"] = per_budget(step, judged)
    return found


def run_schedule(step: JointStep, wrapped: Any, *, forward_only: bool = False) -> list[dict[str, Tensor]]:
    """All microbatches through core's schedule; what the last stage reports of each."""
    batches = roles(2, step.stage)
    reported: list[dict[str, Tensor]] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=wrapped,
        num_microbatches=len(batches),
        seq_length=24,
        micro_batch_size=2,
        forward_only=forward_only,
    )
    return reported


def per_budget(step: JointStep, reported: list[dict[str, Tensor]]) -> Tensor:
    """Mean loss of each budget, from metrics that have the same keys in every microbatch."""
    keys = [sorted(entry) for entry in reported]
    assert all(entry == keys[0] for entry in keys), "every microbatch returns the same keys"
    sums = {key: torch.stack([entry[key] for entry in reported]).double().sum(0) for key in keys[0]}
    return torch.stack([sums[name][0] / sums[name][1] for name in step.names])


def compare(got: dict[str, Any], want: dict[str, Any]) -> dict[str, float]:
    """Worst relative error of each quantity that this rank has."""
    errors = {"grads": kit.worst(got["grads"], want["grads"])}
    if "router" in got:
        errors["router"] = kit.worst(got["router"], want["router"])
    for name in {"losses", "evaluated"} & set(got):
        errors[name] = float(((got[name] - want["losses"]).abs() / want["losses"].abs()).max())
    return errors


def run_all() -> dict[str, dict[str, float]]:
    """layout/mode -> quantity -> worst error over the ranks."""
    results: dict[str, dict[str, float]] = {}
    for mode in ("soft", "sliced"):
        want = reference(mode)
        cases: list[tuple[str, int, int, dict[str, Any]]] = [
            ("tp2", 2, 1, {}),
            ("tp2_sp", 2, 1, {"sequence_parallel": True}),
            ("pp2", 1, 2, {}),
            ("pp2_recompute", 1, 2, {
                "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1
            }),
        ]  # fmt: skip
        for name, tp, pp, config in cases:
            results[f"{name}/{mode}"] = compare(joint(mode, tp, pp, **config), want)
        if mode == "soft":
            results["ambient/soft"] = compare(joint(mode, 1, 2, ambient=True, **cases[-1][-1]), want)
        for name, tp, pp in (("tp2", 2, 1), ("pp2", 1, 2)):
            followed = joint(mode, tp, pp, stage=MIXED)
            results[f"{name}_mixed_teachers/{mode}"] = compare(followed, reference(mode, MIXED))
            results[f"one_teacher/{mode}"] = {"grads": kit.worst(followed["grads"], want["grads"])}
        chosen: dict[str, Any] = {"loss": MIXTURE, "temperature": 2.0}
        learnt = joint(mode, 2, 1, sequence_parallel=True, **chosen)
        results[f"tp2_sp_mixture/{mode}"] = compare(learnt, reference(mode, **chosen))
        results[f"forward_kl/{mode}"] = {"grads": kit.worst(learnt["grads"], want["grads"])}
        # The negative of all of them: the other mode's gradients, from other selections, are not these.
        other = reference("sliced" if mode == "soft" else "soft")
        results[f"other/{mode}"] = {"grads": kit.worst(other["grads"], want["grads"])}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, results)
    merged: dict[str, dict[str, float]] = {}
    for one in everyone:
        for case, errors in one.items():
            for key, value in errors.items():
                merged.setdefault(case, {})[key] = max(value, merged.get(case, {}).get(key, 0.0))
    return merged
