"""What a run says besides Megatron's own log: the router over steps, its decision, the accounting in base samples."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from megatron.training import get_tensorboard_writer, get_wandb_writer

from megatron_elastic.config import Recipe
from megatron_elastic.cost_model import forward_flops_per_token
from megatron_elastic.metadata import Metadata


def joint_flops_per_token(
    recipe: Recipe, metadata: Metadata, sequence_length: int, weights: Sequence[float] = ()
) -> float:
    """Floating point operations of one step for one base token: teacher forward, students forward and back.

    While the router learns every student runs at full width. The teacher's LM head counts once a student.

    Args:
        recipe: with its budget mode.
        metadata: with the selections, once they are decided.
        sequence_length: tokens.
        weights: of the budgets, where one is drawn: the mean over the draws.
    """
    shape, budgets = recipe.family.shape, len(recipe.family.budgets)
    full = forward_flops_per_token(shape, shape.full, sequence_length)
    kept = metadata.selections or (recipe.family.full,) * budgets
    layers = len(shape.pattern)
    students = [forward_flops_per_token(shape, s.sizes, sequence_length, s.gates(layers)) for s in kept]
    if recipe.budget_mode == "sampled":
        return full + 3 * sum(share * flops for share, flops in zip(weights, students, strict=True))
    return full + (budgets - 1) * 2 * shape.vocab * shape.hidden + 3 * sum(students)


class StepLog:
    """Writes to the console of rank 0, and to TensorBoard and wandb where Megatron made writers (the last rank)."""

    def __init__(self, recipe: Recipe, stage: int, interval: int) -> None:
        self.recipe, self.stage, self.interval = recipe, stage, max(1, interval)
        self._since: tuple[int, float] | None = None
        self._described = False

    def _say(self, text: str) -> None:
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            print(text, flush=True)

    def _base_samples(self, iteration: int) -> int:
        stage = self.recipe.stages[self.stage - 1]
        inside = iteration - self.recipe.iterations_before(self.stage)
        return self.recipe.base_samples_before(self.stage) + inside * stage.global_batch_size

    def step(self, iteration: int, state: Any) -> None:
        """Called before each optimizer step with the iterations already made."""
        if not self._described:
            self._described = True
            self._describe(iteration, state.metadata)
        if iteration % self.interval:
            return
        self._router(iteration, state)
        stage = self.recipe.stages[self.stage - 1]
        text = f"elastic | stage {self.stage} | iteration {iteration} | base samples {self._base_samples(iteration)}"
        now = time.monotonic()
        if self._since is not None and iteration > self._since[0]:
            tokens = (iteration - self._since[0]) * stage.global_batch_size * stage.sequence_length
            rate = tokens / (now - self._since[1])
            flops = joint_flops_per_token(self.recipe, state.metadata, stage.sequence_length, stage.weights)
            text += f" | base tokens/s {rate:.0f} | joint GFLOP/s {rate * flops / 1e9:.1f}"
        self._since = iteration, now
        self._say(text)

    def write(self, values: Mapping[str, float], iteration: int) -> None:
        """Adds values to TensorBoard and wandb, on the rank that has them."""
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        for name, value in values.items():
            if writer is not None:
                writer.add_scalar(name, value, iteration)
        if wandb and values:
            wandb.log(dict(values), iteration)

    def _describe(self, iteration: int, metadata: Metadata) -> None:
        """What Megatron's own flags do not say, into wandb's config: budgets, axes, curriculum."""
        wandb = get_wandb_writer()
        if not wandb:
            return
        recipe = self.recipe
        elastic = {
            "stage": self.stage,
            "budgets": [asdict(budget) for budget in recipe.family.budgets],
            "axes": {axis: list(choices) for axis, choices in recipe.family.choices.items() if len(choices) > 1},
            "stages": [asdict(stage) for stage in recipe.stages],
            "budget_mode": recipe.budget_mode,
            "temperature": recipe.temperature,
            "loss": asdict(recipe.loss),
            "router": None if recipe.router is None else asdict(recipe.router),
            "parent": recipe.parent,
            "teacher": recipe.teacher,
        }
        wandb.config.update({"elastic": elastic}, allow_val_change=True)
        if metadata.selections:
            self._table(iteration, metadata)

    def _table(self, iteration: int, metadata: Metadata) -> None:
        """The decided budgets as a table in wandb: target, what is reached of it, and every axis."""
        wandb = get_wandb_writer()
        if not wandb:
            return
        family, rows = self.recipe.family, []
        shapes = [selection.as_dict() for selection in metadata.selections]
        axes = list(dict.fromkeys(axis for shape in shapes for axis in shape))
        for budget, selection, shape in zip(metadata.budgets, metadata.selections, shapes, strict=True):
            reached = float(family.selection_cost(selection, budget.unit) / family.full_cost(budget.unit))
            parameters = int(family.selection_cost(selection))
            # Text: an axis may have a size a layer in one budget, and one for all in another.
            sizes = [str(shape.get(axis, "")) for axis in axes]
            rows.append([budget.name, budget.unit, budget.fraction, reached, parameters, *sizes])
        columns = ["budget", "unit", "target", "reached", "parameters", *axes]
        wandb.log({"router/budgets": wandb.Table(columns=columns, data=rows)}, iteration)

    def _router(self, iteration: int, state: Any) -> None:
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        trainer = state.trainer
        if trainer is None or state.metadata.selections or (writer is None and not wandb):
            return
        router, values = trainer.router, {}
        with torch.no_grad():
            for index, budget in enumerate(router.budgets):
                made = {axis: router.probabilities(index, axis, iteration, noise=False) for axis in router.nets}
                fixed = {axis: router.probabilities(index, axis, iteration) for axis in set(router.choices) - set(made)}
                for axis, probabilities in made.items():
                    for choice, probability in zip(router.choices[axis], probabilities.mean(0).tolist(), strict=True):
                        values[f"router/{budget.name}/{axis}/{choice}"] = probability
                values[f"router/{budget.name}/cost_over_target"] = router.expected_cost(index, {**made, **fixed}).item()
        self.write(values, iteration)

    def decided(self, iteration: int, metadata: Metadata) -> None:
        """Called once, when the router is frozen."""
        family = self.recipe.family
        self._say(f"elastic | iteration {iteration} | the router is frozen; training goes on sliced")
        for budget, selection in zip(metadata.budgets, metadata.selections, strict=True):
            parent = family.full_cost(budget.unit)
            share = family.selection_cost(selection, budget.unit) / parent
            unit = budget.unit.replace("_", " ")
            self._say(f"elastic |   {budget.name}: {selection.as_dict()} = {share:.4f} of {parent:.12g} {unit}")
        self._table(iteration, metadata)
