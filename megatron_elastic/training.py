"""Runs inside `megatron.training.pretrain()`: the parent's training and the elastic stages. Wiring only, no maths."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import hybrid_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.models.hybrid import HybridModelConfig

from megatron_elastic.batch import rank_batch
from megatron_elastic.checkpoint import find_checkpoint, fused_norms, save_faults_are_told
from megatron_elastic.config import Recipe, Stage
from megatron_elastic.distillation.roles import OF_KIND, JointRoles, RoleDataset, Roles, SampledRoles
from megatron_elastic.errors import CheckpointError
from megatron_elastic.family import Family
from megatron_elastic.forward_step import JointStep
from megatron_elastic.layers.packing import packed_documents
from megatron_elastic.layers.plain import plain_stack_spec
from megatron_elastic.metadata import Metadata
from megatron_elastic.metrics import StepLog
from megatron_elastic.model import ElasticHybridModel, ElasticModelBuilder, ElasticModelConfig, FamilyState
from megatron_elastic.parallel import ranks_of
from megatron_elastic.parents import with_ranked_layers
from megatron_elastic.router import Router, RouterTrainer
from megatron_elastic.schedule import stage_argv
from megatron_elastic.wandb_run import join


@dataclass(frozen=True, kw_only=True)
class TextRun:
    """Where the text of a stage comes from.

    Attributes:
        train, validation: data prefixes.
        seed: of the shuffle; every stage has its own.
        roles: what each base microbatch becomes in training.
        evaluation_roles: the same in evaluation.
        start: samples (all roles) that earlier stages consumed.
        samples: base samples of this stage.
    """

    train: str
    validation: str
    seed: int
    roles: Roles
    evaluation_roles: Roles
    start: int
    samples: int

    is_distributed = True  # core then builds the data sets on every tensor- and pipeline-parallel rank

    def __call__(self, sizes: Sequence[int], vp_stage: int | None = None) -> tuple[Any, Any, None]:
        """Megatron's data set provider; what it asks for (`sizes`) counts every role."""
        args = get_args()
        dp = parallel_state.get_data_parallel_world_size()
        judged = self.evaluation_roles.count
        period = args.eval_iters * args.eval_global_batch_size // judged
        config = GPTDatasetConfig(
            random_seed=self.seed,
            sequence_length=args.seq_length,
            blend=None,
            blend_per_split=[([self.train], None), ([self.validation], None), None],
            split=None,
            tokenizer=get_tokenizer(),
            path_to_cache=None,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=args.eod_mask_loss,
            create_attention_mask=False,
            inter_document_masking=args.dataloader_inter_document_masking,
            mid_level_dataset_surplus=0.005,
        )
        wanted = [self.samples, period, 0]
        base = BlendedMegatronDatasetBuilder(GPTDataset, wanted, lambda: True, config).build()
        group = args.micro_batch_size * dp
        train = RoleDataset(base[0], roles=self.roles, group=group, samples=self.samples, start=self.start)
        if not period:
            return train, None, None
        group = args.eval_micro_batch_size * dp
        valid = RoleDataset(
            base[1],
            roles=self.evaluation_roles,
            group=group,
            # As many as Megatron will draw over the whole run, what is already consumed included.
            samples=-(-(sizes[1] or 0) // judged) + args.consumed_valid_samples,
            start=args.consumed_valid_samples % (group * judged),
            period=period,
        )
        return train, valid, None


def _join_wandb(flags: Mapping[str, Any], save: str, job_type: str) -> None:
    """On the rank that Megatron logs on: the last one."""
    if int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        join(flags, save, job_type)


def _parse(argv: list[str]) -> Any:
    """Megatron's own parser and validation on flags made from a recipe."""
    sys.argv = [sys.argv[0], *argv]
    return parse_and_validate_args(args_defaults={})


def load_parent(model: ElasticHybridModel, path: str | Path) -> None:
    """Loads a parent's weights into a model that has no family state yet.

    Norms that Transformer Engine fused into the next linear layer are asked for under its names. What linear layers
    save beside their weights is left: the local backend's is empty, and it ignores Transformer Engine's.

    Raises:
        CheckpointError: no checkpoint there, or not this parent's.
    """
    found = find_checkpoint(path)
    stored = fused_norms(found)
    weights = {name: entry for name, entry in model.sharded_state_dict().items() if not name.endswith("_extra_state")}
    for entry in weights.values():
        entry.key = stored.get(entry.key, entry.key)
    try:
        # Under a key of its own: apart from what Megatron stores beside the weights.
        loaded = dist_checkpointing.load({"model": weights}, str(found))
        model.load_state_dict(loaded["model"], strict=True)
    except (RuntimeError, KeyError, ValueError, dist_checkpointing.core.CheckpointingException) as error:
        raise CheckpointError(f"{found}: not a checkpoint of the parent that the recipe describes: {error}") from error


class _Attach:
    """Finishes each model chunk: parent's weights, frozen teacher, family state, gradient hook."""

    def __init__(self, recipe: Recipe, state: FamilyState, step: JointStep) -> None:
        self.recipe, self.state, self.step = recipe, state, step

    def __call__(
        self,
        builder: ElasticModelBuilder,
        model: ElasticHybridModel,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None,
    ) -> None:
        load_parent(model, self.recipe.parent)
        teacher = builder.build_plain(pg_collection, model.pre_process, model.post_process, vp_stage)
        load_parent(teacher, self.recipe.teacher)
        teacher.requires_grad_(False)
        teacher.eval()
        teacher.cuda(torch.cuda.current_device())
        model.teachers = (teacher,)
        if not vp_stage:
            model.states = (self.state,)
            self.step.attach(model.config)


def make_router(recipe: Recipe, family: Family) -> Router | None:
    """The recipe's router, or None where it gives the selections."""
    if recipe.router is None:
        return None
    return Router(recipe.router, family)


def train_stage(recipe: Recipe, number: int) -> None:
    """One elastic stage, in its own process group, continuing the family where it stands.

    Args:
        recipe: checked recipe.
        number: of the stage, from 1.
    """
    recipe = with_ranked_layers(recipe)
    stage = recipe.stages[number - 1]
    _join_wandb(recipe.megatron, recipe.save, "elastic")
    args = _parse(
        stage_argv(
            recipe.megatron,
            recipe.stages,
            number,
            roles=recipe.roles,
            evaluation_roles=recipe.evaluation_roles,
            save=recipe.save,
            save_interval=recipe.save_interval,
            eval_interval=recipe.evaluation.interval,
            eval_iterations=recipe.evaluation.iterations,
            cuda=torch.cuda.is_available(),
        )
    )
    router = make_router(recipe, recipe.family)
    if router is not None:
        router.to(torch.cuda.current_device())
    trainer = None if router is None else RouterTrainer(router, stage.weights)
    state = FamilyState(
        Metadata.of_family(
            recipe.family,
            recipe.megatron,
            selections=recipe.selections,
            stage=number,
            budget_mode=recipe.budget_mode,
            router=recipe.router,
        ),
        trainer,
    )
    step = JointStep(recipe, state, stage, StepLog(recipe, number, args.log_interval))
    config = hybrid_config_from_args(args, model_config_cls=ElasticModelConfig)
    config.family = recipe.family
    config.on_build = _Attach(recipe, state, step)
    budgets = [budget.name for budget in recipe.family.budgets]
    teachers = [OF_KIND[kind] for kind in stage.teachers(budgets)]
    # A stage with one teacher in a run that elsewhere has two runs its own twice: see `Recipe.teachers`.
    different = sorted(set(teachers), reverse=True)
    joint = JointRoles(len(budgets), (different * recipe.teachers)[: recipe.teachers])
    together = stage.micro_batch_size * ranks_of(recipe.megatron, []).sharing_experts
    sampled = SampledRoles(stage.weights, seed=args.seed + number, together=together, teachers=teachers)
    text = TextRun(
        train=recipe.train_data,
        validation=recipe.validation_data,
        seed=args.seed + number,
        roles=sampled if recipe.budget_mode == "sampled" else joint,
        evaluation_roles=joint,
        start=recipe.base_samples_before(number) * recipe.roles,
        samples=stage.iterations * stage.global_batch_size,
    )
    with save_faults_are_told(recipe.save):
        pretrain(pretrain_cfg_container_from_args(args, config), text, ModelType.encoder_or_decoder, step)


def _causal_loss(mask: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    def loss(output: torch.Tensor) -> Any:
        flat = mask.reshape(-1).float()
        summed, count = (output.reshape(-1).float() * flat).sum(), flat.sum()
        return summed, count.to(torch.int), {"lm loss": torch.stack([summed.detach(), count])}

    return loss


def plain_forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """Megatron's `forward_step_func` for an ordinary model: next-token cross entropy."""
    batch = next(data_iterator)
    groups, device = unwrap_model(model).pg_collection, next(model.parameters()).device
    local, documents = rank_batch(batch, ("tokens", "position_ids", "labels", "loss_mask"), device, groups.cp)
    packed = None if documents is None else packed_documents(documents)
    output = model(local["tokens"], local["position_ids"], None, labels=local["labels"], packed_seq_params=packed)
    return output, _causal_loss(local["loss_mask"])


def train_plain(
    flags: Mapping[str, Any],
    stages: Sequence[Stage],
    number: int,
    *,
    train_data: str,
    validation_data: str,
    save: str,
    save_interval: int,
    evaluation: tuple[int, int],
) -> None:
    """Trains a stock hybrid model with cross entropy: the parent, or a baseline of a submodel's shape.

    Args:
        flags: Megatron's model, optimizer and layout flags.
        stages: curriculum; the text of a stage is that of an elastic run with the same stage and seed.
        number: of the stage, from 1.
        train_data, validation_data: data prefixes.
        save: checkpoint folder.
        save_interval: optimizer steps.
        evaluation: interval in steps, and batches.
    """
    _join_wandb(flags, save, "plain")
    args = _parse(
        stage_argv(
            flags,
            stages,
            number,
            roles=1,
            evaluation_roles=1,
            save=save,
            save_interval=save_interval,
            eval_interval=evaluation[0],
            eval_iterations=evaluation[1],
            cuda=torch.cuda.is_available(),
        )
    )
    config = hybrid_config_from_args(args, model_config_cls=HybridModelConfig)
    config.hybrid_stack_spec = plain_stack_spec
    before = sum(s.iterations * s.global_batch_size for s in stages[: number - 1])
    text = TextRun(
        train=train_data,
        validation=validation_data,
        seed=args.seed + number,
        roles=JointRoles(0),
        evaluation_roles=JointRoles(0),
        start=before,
        samples=stages[number - 1].iterations * stages[number - 1].global_batch_size,
    )
    with save_faults_are_told(save):
        pretrain(pretrain_cfg_container_from_args(args, config), text, ModelType.encoder_or_decoder, plain_forward_step)
