"""The small family of the table of exactness, its data, and one process's plain loop. Needs the CPU adaptation."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_elastic.distillation.roles import JointRoles, RoleDataset, Roles, SampledRoles
from megatron_elastic.model import ElasticHybridModel, ElasticModelBuilder, ElasticModelConfig
from megatron_elastic.router import Router, RouterConfig
from tests.distributed import elastic_kit as kit
from tests.distributed.groups import make_groups
from tests.exactness.layouts import Layout
from tests.exactness.sizes import (
    ADAM,
    FAMILY,
    FIRST,
    LENGTH,
    ROUTER,
    SAMPLES,
    SEED,
    SELECTIONS,
    SEPARATORS,
    SHAPE,
    STEPS,
    WEIGHTS,
)


def roles(mode: str, micro: int) -> Roles:
    """Joint or drawn."""
    if mode.startswith("joint"):
        return JointRoles(len(WEIGHTS))
    return SampledRoles(WEIGHTS, seed=SEED, together=micro)


class Text(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sample `i` is a function of `i`."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in kit.batch(index, size=1, length=LENGTH).items()}


def microbatches(mode: str, layout: Layout, step: int) -> Iterator[dict[str, Tensor]]:
    """What Megatron's sampler and loader hand this data-parallel rank in one step."""
    dp, rank = layout.dp, parallel_state.get_data_parallel_rank()
    dataset = RoleDataset(Text(), roles=roles(mode, layout.micro), group=layout.micro * dp, samples=SAMPLES * STEPS)
    count = SAMPLES * dataset.roles.count // dp
    for number in range(count // layout.micro):
        start = (step - FIRST) * SAMPLES * dataset.roles.count + (number * dp + rank) * layout.micro
        yield torch.utils.data.default_collate([dataset[start + i] for i in range(layout.micro)])


def new_router(seed: int = ROUTER.seed) -> Router:
    """The same initial router everywhere, in fp64 as the model it is compared in."""
    config = RouterConfig(**{**vars(ROUTER), "seed": seed})
    return Router(config, FAMILY).double()


def groups(layout: Layout) -> None:
    """Megatron's parallel groups of a layout."""
    make_groups(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
        context_parallel_size=layout.cp,
    )


def build(layout: Layout, dtype: torch.dtype) -> list[ElasticHybridModel]:
    """This rank's model chunks, each with its teacher, whose weights differ (equal ones would hide faults)."""
    virtual = {"virtual_pipeline_model_parallel_size": layout.vp} if layout.vp > 1 else {}
    settings = ElasticModelConfig(
        transformer=kit.config(
            SHAPE, dtype=dtype, context_parallel_size=layout.cp, **virtual, **layout.config
        ),
        vocab_size=SHAPE.vocab,
        hybrid_layer_pattern=SEPARATORS[layout.pp, layout.vp],
        seq_length=LENGTH,
        position_embedding_type="none",
        family=FAMILY,
    )  # fmt: skip
    groups, builder, chunks = ProcessGroupCollection.use_mpu_process_groups(), ElasticModelBuilder(settings), []
    for number in range(layout.vp):
        first = parallel_state.get_pipeline_model_parallel_rank() == 0 and number == 0
        last = parallel_state.get_pipeline_model_parallel_rank() == layout.pp - 1 and number == layout.vp - 1
        stage = number if layout.vp > 1 else None
        model, teacher = (builder.build_plain(groups, first, last, stage) for _ in range(2))
        for one, jitter in ((model, 0.0), (teacher, 0.05)):
            kit.keep_fp64(one, dtype)
            kit.set_weights(one, FAMILY.layout, kit.full_weights(FAMILY.layout, jitter))
        teacher.requires_grad_(False).eval()
        model.teachers = (teacher,)
        chunks.append(model)
    return chunks


def reference(mode: str, micro: int, dtype: torch.dtype) -> dict[str, Any]:
    """A plain loop on one process: no schedule, no DDP, no leaf copies, torch's own optimizers."""
    groups(Layout(torch.distributed.get_world_size()))
    (model,) = build(Layout(1), dtype)
    router, soft = new_router(), mode.endswith("soft")
    adam = torch.optim.AdamW(model.parameters(), **ADAM)
    router_adam = torch.optim.AdamW(router.parameters(), lr=ROUTER.learning_rate, weight_decay=0.0)
    deal, found = roles(mode, micro), dict[str, Any]()
    for step in range(FIRST, FIRST + STEPS):
        adam.zero_grad()
        router_adam.zero_grad()
        made = [{axis: router.probabilities(b, axis, step) for axis in FAMILY.axes} for b in range(len(WEIGHTS))]
        sums, counted = torch.zeros(len(WEIGHTS), 2, dtype=torch.float64), torch.zeros((), dtype=torch.int)
        for start in range((step - FIRST) * SAMPLES, (step - FIRST + 1) * SAMPLES, micro):
            batch = torch.utils.data.default_collate([Text()[start + i] for i in range(micro)])
            where, mask = (batch["tokens"], batch["position_ids"]), batch["loss_mask"].float()
            with torch.no_grad():
                target = model.teacher_target(model(*where, run_teacher=True))
            for role in range(1, deal.count):
                budget = deal.budget(role, start)
                how = {"probabilities": made[budget]} if soft else {"selection": SELECTIONS[budget]}
                summed = model(*where, **how, teacher=target, loss_mask=mask)
                share = WEIGHTS[budget] * len(WEIGHTS) if mode.startswith("joint") else 1.0
                (summed * share).backward(retain_graph=soft)
                sums[budget] += torch.stack([summed.detach().float(), mask.sum()])
                counted += mask.sum().to(torch.int)
        # Core multiplies by 1 / tokens as it comes out in fp32: the one rounding that is not the maths' own.
        for parameter in model.parameters():
            if parameter.grad is None:  # of a layer that no drawn slice has: core's optimizer steps it with zeros
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad *= torch.reciprocal(counted)
        penalties = [router.penalty(budget, made[budget]) for budget in range(len(WEIGHTS))]
        if soft:
            for parameter in router.parameters():
                if parameter.grad is not None:  # in a step where no budget with a choice was drawn
                    parameter.grad /= counted
            sum(w * ROUTER.penalty * p for w, p in zip(WEIGHTS, penalties, strict=True)).backward()
        assert sums[-1, 1] or step > FIRST, "the first step runs the budget that has choices: choose another SEED"
        when = "" if step == FIRST else " after 5 steps"
        found[f"losses{when}"] = (sums[:, 0] / sums[:, 1])[sums[:, 1] > 0]
        if step == FIRST:
            found["weight gradients"] = {name: p.grad.clone() for name, p in model.named_parameters()}
            found["penalty"] = torch.stack(penalties).detach()
            found["selections"] = chosen(router, step)
        adam.step()
        if soft:
            torch.nn.utils.clip_grad_norm_(router.parameters(), ROUTER.clip)
            found.setdefault("router gradients", {n: p.grad.clone() for n, p in router.named_parameters()})
            router_adam.param_groups[0]["lr"] = ROUTER.learning_rate_at(step)
            router_adam.step()
    found["weights after 5 steps"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    found["router after 5 steps"] = {name: p.detach().clone() for name, p in router.named_parameters()}
    found["selections after 5 steps"] = chosen(router, FIRST + STEPS)
    return found


def chosen(router: Router, step: int) -> Tensor:
    """What the router would decide now: every size of every layer, and which are kept, `[budgets, numbers]`."""
    layers = len(SHAPE.pattern)
    return torch.tensor(
        [
            [*(size for number in range(layers) for size in s.layer(SHAPE.pattern, number).values()), *s.gates(layers)]
            for s in router.decide(step)
        ]
    )
