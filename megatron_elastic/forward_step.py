"""The forward step: one microbatch in its role, the joint multi-budget KD loss, and the router's place around it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from megatron_elastic.batch import rank_batch
from megatron_elastic.budget import Selection
from megatron_elastic.config import Recipe, Stage
from megatron_elastic.distillation.roles import LIVE_TEACHER, OF_KIND
from megatron_elastic.distillation.stage_cache import StageCache
from megatron_elastic.layers.linear import TeacherTarget, TopKTarget
from megatron_elastic.layers.moe_role import MoeRole
from megatron_elastic.layers.quantized_once import weights_changed
from megatron_elastic.loss_checks import check_loss
from megatron_elastic.loss_log import LossLog
from megatron_elastic.metrics import StepLog
from megatron_elastic.model import ElasticHybridModel, FamilyState


class _ZeroLoss(torch.autograd.Function):
    """Zero, with a zero gradient: the teacher's turn adds nothing, not even `0 * infinity`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.like = output.shape, output.dtype, output.device
        return torch.zeros((), dtype=torch.float32, device=output.device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:  # type: ignore[override]
        shape, dtype, device = ctx.like
        return torch.zeros(shape, dtype=dtype, device=device)


Loss = tuple[Tensor, Tensor, dict[str, Tensor]]
SAMPLED = "kd of drawn budgets"
"""Megatron's key in sampled mode: a key a budget would be 0 / 0 where the budget is not drawn."""


class JointStep:
    """Megatron's `forward_step_func` for elastic distillation.

    The gradient of a step is that of `sum_b w_b * mean_t KL(teacher || budget b)` (or another loss of the recipe) plus
    the router's weighted penalty. Joint: each student returns its summed loss times `w_b * K`, and core divides by all
    budgets' tokens, `K` times the base tokens. Sampled: the budgets come as often as they weigh, each with its summed
    KL as it is, and the gradient is that one in the mean over the draws (the penalty, which needs no text, is exact).

    Where a budget's teacher is trainable, the teacher's turn runs the full budget as it is, without a gradient; and the
    full budget's own turn learns from the text: `ce_weight` times the cross entropy in place of a KL that is zero.

    With a teacher cache the turn of the frozen teacher stays, though a stage that reads runs nothing in it: Megatron's
    counts of samples, its learning rate among them, are the same either way, and a run may be stopped while it writes
    and go on reading.
    """

    def __init__(
        self, recipe: Recipe, state: FamilyState, stage: Stage, log: StepLog, cache: StageCache | None = None
    ) -> None:
        """Args:
        recipe: checked recipe.
        state: the family's state, saved with the model.
        stage: for the budgets' weights and the kind of teacher.
        log: where router and accounting go.
        cache: of the frozen teacher.
        """
        self.recipe, self.state, self.stage, self.log, self.cache = recipe, state, stage, log, cache
        budgets = recipe.family.budgets
        self.teachers = [OF_KIND[kind] for kind in stage.teachers([budget.name for budget in budgets])]
        self.names = [f"{'ce' if self._from_text(number) else 'kd'} {b.name}" for number, b in enumerate(budgets)]
        self.sampled = recipe.budget_mode == "sampled"
        self.losses = LossLog(self.names, log.interval)
        self._targets: dict[int, TeacherTarget | TopKTarget] = {}
        self._provisional: tuple[int, tuple[Selection, ...]] = (-1, ())
        self._iteration = -1

    def _from_text(self, budget: int) -> bool:
        """Whether a budget learns from the text itself."""
        return self.teachers[budget] == LIVE_TEACHER and self.recipe.family.budgets[budget].fraction >= 1.0

    def attach(self, config: Any) -> None:
        """Registers the gradient hook in a transformer config, and the router's step after the backbone's."""
        config.finalize_model_grads_func = self.finalize
        register_optimizer_step_post_hook(self._after_step)

    def finalize(self, model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        """Core's finalize, then the router's gradient: reduced and stored, overwritten where the step is rerun."""
        finalize_model_grads(model, num_tokens, **kwargs)
        for chunk in model:
            weights_changed(chunk)  # no forward lies between here and the optimizer's step
        self.losses.finish()
        trainer, world = self.state.trainer, torch.distributed.group.WORLD
        if trainer is not None and not self.state.metadata.selections:
            if num_tokens is None:
                raise ValueError("calculate_per_token_loss is required: core passed no token count")
            assert world is not None
            interval = trainer.router.config.check_interval
            if interval and self._iteration % interval == 0:
                # Every rank is here: a collective at the start of a step would wait for stages that wait for this one.
                trainer.check_replicas(self._iteration, world)
            trainer.reduce(num_tokens, world)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Runs when an optimizer has stepped: the backbone's commits the iteration, and only then the router steps."""
        trainer = self.state.trainer
        if trainer is not None and optimizer is trainer.optimizer:
            return
        done = self._iteration + 1
        if trainer is not None and trainer.commit() and done >= trainer.router.config.iterations:
            self._decide(done)
        self.state.update(iteration=done)
        if self.cache is not None:
            self.cache.commit()
        means = self.losses.committed(done)
        if self.sampled:
            self.log.write(means, done)

    def _decide(self, step: int) -> None:
        assert self.state.trainer is not None
        self.state.update(selections=self.state.trainer.router.decide(step))
        self.log.decided(step, self.state.metadata)

    def _begin(self, iteration: int) -> None:
        if iteration != self._iteration:
            self._iteration = iteration
            self.log.step(iteration, self.state)

    def _submodel(self, budget: int, training: bool) -> dict[str, Any]:
        """How the model runs a budget now: sliced where its selection is decided or judged, masked while it learns."""
        decided = self.state.metadata.selections
        if decided:
            return {"selection": decided[budget]}
        trainer = self.state.trainer
        assert trainer is not None, "neither a selection nor a router"
        if training:
            return {"probabilities": trainer.leaves(self._iteration, budget)}
        if self._provisional[0] != self._iteration:
            self._provisional = self._iteration, trainer.router.decide(self._iteration)
        return {"selection": self._provisional[1][budget]}

    def __call__(self, data_iterator: Any, model: Any) -> tuple[Tensor, Callable[[Tensor], Loss]]:
        """One microbatch.

        Returns:
            The model's output, and the function that makes (loss, tokens, metrics) of it on the last stage.
        """
        self._begin(get_args().curr_iteration)
        batch = next(data_iterator)
        budget = int(batch["budget"][0])  # a host tensor of the loader: no device is waited for
        chunk: ElasticHybridModel = unwrap_model(model)
        device = next(chunk.parameters()).device
        local, documents = rank_batch(
            batch, ("tokens", "position_ids", "loss_mask", "labels"), device, chunk.pg_collection.cp
        )
        training = chunk.training
        tokens, positions, mask = local["tokens"], local["position_ids"], local["loss_mask"].float()
        if budget in OF_KIND.values():
            live, cached = budget == LIVE_TEACHER, self.cache is not None and self.cache.reads
            hidden = model(
                tokens, positions, run_teacher=True, live_teacher=live, cached_teacher=cached, documents=documents
            )
            if chunk.post_process:
                self._targets[budget] = self._target(chunk, hidden, batch, live)
            return hidden, partial(self._teacher_loss, training=training)
        from_text = self._from_text(budget)
        output = model(
            tokens,
            positions,
            **self._submodel(budget, training),
            teacher=self._targets[self.teachers[budget]] if chunk.post_process and not from_text else None,
            labels=local["labels"] if chunk.post_process and (from_text or self.recipe.loss.ce_weight) else None,
            loss_mask=mask,
            temperature=self.recipe.temperature,
            loss=self.recipe.loss,
            documents=documents,
            moe=self._moe_role(budget) if training else None,
        )

        def loss(summed: Tensor) -> Loss:
            count = mask.sum()
            check_loss(summed, count, self.recipe.family.budgets[budget].name)
            measured = torch.stack([summed.detach().float().clamp(min=0.0), count])
            if training:
                self.losses.add(budget, measured)
            factor = self.stage.ce_weight if from_text else 1.0
            if self.sampled and training:
                return summed * factor, count.to(torch.int), {SAMPLED: measured}
            metrics = self._metrics(summed.device)
            metrics[self.names[budget]] = measured
            scaled = summed * (self.stage.weights[budget] * len(self.names) * factor)
            return scaled, count.to(torch.int), metrics

        return output, loss

    def _target(
        self, chunk: ElasticHybridModel, hidden: Tensor, batch: dict[str, Tensor], live: bool
    ) -> TeacherTarget | TopKTarget:
        """What the budgets of a batch are compared with."""
        if self.cache is None:
            return chunk.teacher_target(hidden, live)
        if self.cache.reads:
            return self.cache.read(batch, hidden.device, training=chunk.training)
        target = chunk.top_k_target(hidden, self.cache.settings.top_k, self.recipe.temperature)
        return self.cache.write(batch, target, training=chunk.training)

    def _moe_role(self, budget: int) -> MoeRole:
        """Only the full budget's tokens move the experts' biases; auxiliary losses weigh as the budget's loss does."""
        full = self.recipe.family.budgets[budget].fraction >= 1.0
        weight = 1.0 if self.sampled else self.stage.weights[budget] * len(self.names)
        return MoeRole(count_tokens=full, loss_weight=weight)

    def _metrics(self, device: torch.device) -> dict[str, Tensor]:
        """Every microbatch returns every budget's key: Megatron reads the keys of the first one only."""
        return {name: torch.zeros(2, device=device) for name in self.names}

    def _teacher_loss(self, output: Tensor, training: bool) -> Loss:
        zero = torch.zeros((), dtype=torch.int, device=output.device)
        sampled = {SAMPLED: torch.zeros(2, device=output.device)}
        metrics = sampled if self.sampled and training else self._metrics(output.device)
        return _ZeroLoss.apply(output), zero, metrics  # type: ignore[no-untyped-call]
