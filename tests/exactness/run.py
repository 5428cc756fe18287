"""One layout and mode through core's schedule, DDP and optimizer with the product's forward step; and its errors."""

from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training import global_vars
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from megatron_elastic.curriculum import FORWARD_KL
from megatron_elastic.forward_step import JointStep
from megatron_elastic.metadata import Metadata
from megatron_elastic.model import FamilyState
from megatron_elastic.router import RouterConfig, RouterTrainer
from tests.distributed import elastic_kit as kit
from tests.exactness import model as small
from tests.exactness import sizes
from tests.exactness.layouts import Layout, quantities


class SilentLog:
    """A `StepLog` that says nothing."""

    interval = 1 << 30

    def step(self, *_: Any) -> None:
        """Nothing."""

    write = decided = step


def count_runs(chunks: list[Any]) -> Counter[str]:
    """Counts how often parts of layers that every student runs do so from now on, replays too: `mlp`, `layernorm`."""
    found: Counter[str] = Counter()

    def count(what: str) -> Callable[..., None]:
        return lambda *_: found.update([what])

    for chunk in chunks:
        for layer in chunk.decoder.layers:
            left_out = any(layer.layer_number - 1 in selection.skipped for selection in sizes.SELECTIONS)
            if hasattr(layer, "pre_mlp_layernorm") and hasattr(layer.mlp, "linear_fc1") and not left_out:
                layer.pre_mlp_layernorm.register_forward_hook(count("layernorm"))
                layer.mlp.register_forward_hook(count("mlp"))
    return found


def make_faulty(chunks: list[Any]) -> None:
    """The inserted fault: the last rank holds slightly other weights than it should."""
    if dist.get_rank() == dist.get_world_size() - 1:
        with torch.no_grad():
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.mul_(1.2)


def run(mode: str, layout: Layout, *, faulty: bool = False) -> dict[str, Any]:
    """Makes all steps; returns every quantity that this rank has, whole.

    Args:
        mode: of `layouts.MODES`.
        layout: its ranks are the world.
        faulty: inserts the fault: on the last rank other weights and another router.
    """
    small.groups(layout)
    dtype = torch.float32 if layout.distributed_optimizer else torch.float64
    chunks = small.build(layout, dtype)
    last = dist.get_rank() == dist.get_world_size() - 1
    router = small.new_router(seed=100 if faulty and last else sizes.ROUTER.seed)
    soft = mode.endswith("soft")
    trainer = RouterTrainer(router, sizes.WEIGHTS)
    if faulty:
        make_faulty(chunks)
    description = Metadata.of_family(sizes.FAMILY, {}, selections=() if soft else sizes.SELECTIONS)
    state = FamilyState(description, trainer)
    recipe: Any = SimpleNamespace(family=sizes.FAMILY, temperature=1.0, loss=FORWARD_KL, budget_mode=mode.split()[0])
    log: Any = SilentLog()
    step = JointStep(recipe, state, sizes.STAGE, log)
    if faulty:
        router.config = RouterConfig(**{**vars(router.config), "check_interval": 0})
    config = chunks[0].config
    config.finalize_model_grads_func = step.finalize
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=False,
        overlap_grad_reduce=layout.overlap,
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_param_gather=layout.overlap and layout.distributed_optimizer,
        # Several buckets a chunk, as a large model has; where they are reduced on the way, several a layer.
        bucket_size=500 if layout.overlap else 5000,
        average_in_collective=False,
    )
    wrapped = [DistributedDataParallel(config, ddp, chunk, disable_bucketing=n > 0) for n, chunk in enumerate(chunks)]
    if layout.overlap:
        config.no_sync_func = [one.no_sync for one in wrapped] if layout.vp > 1 else wrapped[0].no_sync
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=sizes.ADAM["lr"], adam_beta1=sizes.ADAM["betas"][0], adam_beta2=sizes.ADAM["betas"][1],
            adam_eps=sizes.ADAM["eps"], weight_decay=0.0, clip_grad=0.0, params_dtype=dtype,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_param_gather=layout.overlap and layout.distributed_optimizer,
        ),
        wrapped,
    )  # fmt: skip
    hook, runs = register_optimizer_step_post_hook(step._after_step), count_runs(chunks)
    try:
        found = steps(mode, layout, step, wrapped, optimizer)
    finally:
        hook.remove()
    check_recompute(runs, mode, layout)
    return found


def check_recompute(runs: Counter[str], mode: str, layout: Layout) -> None:
    """What a layout recomputes has run twice as often as there are students' microbatches, and nothing else has.

    Equal results alone would not show it: recompute that is not done gives them too.
    """
    students = small.roles(mode, layout.micro).count - 1
    once = students * sizes.SAMPLES * sizes.STEPS // (layout.dp * layout.micro)
    modules = layout.config.get("recompute_modules", ())
    whole = layout.config.get("recompute_granularity") == "full"
    for what, replayed in (("mlp", "mlp" in modules), ("layernorm", "layernorm" in modules)):
        if runs[what]:  # this rank has the layer
            assert runs[what] == once * (2 if whole or replayed else 1), (what, runs, once)


def steps(mode: str, layout: Layout, step: JointStep, wrapped: list[Any], optimizer: Any) -> dict[str, Any]:
    """All optimizer steps."""
    trainer, found = step.state.trainer, dict[str, Any]()
    assert trainer is not None
    for number in range(sizes.FIRST, sizes.FIRST + sizes.STEPS):
        global_vars._GLOBAL_ARGS = Namespace(
            curr_iteration=number,
            seq_length=sizes.LENGTH,
            check_for_nan_in_loss_and_grad=False,
            check_for_spiky_loss=False,
        )
        for one in wrapped:
            one.zero_grad_buffer()
        optimizer.zero_grad()
        batches = list(small.microbatches(mode, layout, number))
        iterators: Any = [iter(batches) for _ in wrapped]
        reported = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if layout.vp > 1 else iterators[0],
            model=wrapped if layout.vp > 1 else wrapped[0],
            num_microbatches=len(batches),
            seq_length=sizes.LENGTH,
            micro_batch_size=layout.micro,
            forward_only=False,
        )
        when = "" if number == sizes.FIRST else " after 5 steps"
        found[f"losses{when}"] = losses(step, reported)
        if number == sizes.FIRST:
            found["weight gradients"] = whole(wrapped, gradients(wrapped, layout))
        # What the router's step will see, before it is made.
        if number == sizes.FIRST:
            router = trainer.router
            axes, budgets = sizes.FAMILY.axes, range(len(sizes.WEIGHTS))
            made = [{axis: router.probabilities(b, axis, number) for axis in axes} for b in budgets]
            found["penalty"] = torch.stack([router.penalty(b, p) for b, p in enumerate(made)]).detach()
            found["selections"] = small.chosen(router, number)
        optimizer.step()
        if number == sizes.FIRST and mode.endswith("soft"):
            found["router gradients"] = router_gradients(trainer)
    for one in wrapped:
        if one.ddp_config.overlap_param_gather:
            one.start_param_sync(force_sync=True)
    values = [{name: p.detach() for name, p in one.module.named_parameters()} for one in wrapped]
    found["weights after 5 steps"] = whole(wrapped, values)
    found["router after 5 steps"] = {n: p.detach().clone() for n, p in trainer.router.named_parameters()}
    found["selections after 5 steps"] = small.chosen(trainer.router, sizes.FIRST + sizes.STEPS)
    return found


def router_gradients(trainer: RouterTrainer) -> dict[str, Tensor]:
    """The gradients that the router's step used."""
    return {n: p.grad.clone() for n, p in trainer.router.named_parameters()}


def losses(step: JointStep, reported: list[dict[str, Tensor]]) -> Tensor | None:
    """Mean loss of each budget that ran in the step; None before the last stage."""
    if not reported:
        return None
    if step.sampled:
        sums = step.losses._made
        assert sums is not None
        sums = sums.clone()
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return (sums[:, 0] / sums[:, 1])[sums[:, 1] > 0]
    keys = [sorted(entry) for entry in reported]
    assert all(entry == keys[0] for entry in keys), "every microbatch returns the same keys"
    sums = torch.stack([torch.stack([entry[name] for name in step.names]) for entry in reported]).double().sum(0)
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return sums[:, 0] / sums[:, 1]


def gradients(wrapped: list[Any], layout: Layout) -> list[dict[str, Tensor]]:
    """`main_grad` of every parameter of each chunk; shards of the distributed optimizer are joined first."""
    for one in wrapped if layout.distributed_optimizer else ():
        for buffer in one.buffers:
            for bucket in buffer.buckets:
                group = buffer.data_parallel_group
                shards = list(bucket.grad_data.chunk(group.size()))
                own = shards[group.rank()].clone()
                dist.all_gather(shards, own, group=group)
    return [{name: p.main_grad.clone() for name, p in one.module.named_parameters()} for one in wrapped]


def whole(wrapped: list[Any], local: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of every parameter, joined over tensor- and pipeline-parallel ranks."""
    tp_group = parallel_state.get_tensor_model_parallel_group()
    dimensions, found = sizes.FAMILY.layout.parameters(), dict[str, Tensor]()
    for one, tensors in zip(wrapped, local, strict=True):
        for name, tensor in tensors.items():
            full = kit.global_name(one.module, name)
            shards = [torch.empty_like(tensor) for _ in range(tp_group.size())]
            dist.all_gather(shards, tensor.contiguous(), group=tp_group)
            found[full] = kit.unshard(shards, dimensions[full])
    stages: list[Any] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(stages, found, group=parallel_state.get_pipeline_model_parallel_group())
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def error(got: Any, want: Any) -> float:
    """max|a - b| / max|b| of the worst tensor."""
    if isinstance(want, dict):
        assert set(got) == set(want), set(got) ^ set(want)
        return max(error(got[name], want[name]) for name in want)
    if got.shape != want.shape:
        return float("inf")
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-300))


def errors(mode: str, layout: Layout, want: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Quantity -> `worst_error` and `fault_error`, over the ranks that have it."""
    found: dict[str, dict[str, float]] = {}
    for key, faulty in (("worst_error", False), ("fault_error", True)):
        got = run(mode, layout, faulty=faulty)
        mine = {q: error(got[q], want[q]) for q in quantities(mode) if got.get(q) is not None}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        for quantity in quantities(mode):
            found.setdefault(quantity, {})[key] = max(one[quantity] for one in everyone if quantity in one)
    return found
