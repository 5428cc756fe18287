"""What every rank of a run would hold, without weights: models built on the meta device for a fake world."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.training.argument_utils import hybrid_config_from_args
from megatron.training.arguments import parse_and_validate_args
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._device import _device_constructors

from megatron_elastic.backend import FLAG, LOCAL
from megatron_elastic.config import Recipe
from megatron_elastic.errors import RecipeError
from megatron_elastic.model import ElasticHybridModel, ElasticModelBuilder, ElasticModelConfig
from megatron_elastic.schedule import stage_argv

_CONSTRUCTORS = {func.__name__ for func in _device_constructors()}
"""By name: where the CPU adaptation is installed torch's own functions are behind others."""


@dataclass(frozen=True)
class RankMemory:
    """What the ranks of one pipeline stage hold, each; bytes.

    Attributes:
        stage: pipeline rank.
        ranks: how many ranks hold the same: tensor, context, expert and data parallel.
        layers: global layer numbers, in the order of the model chunks.
        parameters: of the student on one rank.
        weights, teacher, gradients, optimizer: bytes; the optimizer's are fp32 master weights (where the model is not
            in fp32) and two moments, spread over data-parallel ranks by the distributed optimizer.
    """

    stage: int
    ranks: int
    layers: tuple[int, ...]
    parameters: int
    weights: int
    teacher: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Bytes of all that is there between two steps."""
        return self.weights + self.teacher + self.gradients + self.optimizer


class _OnMeta(TorchFunctionMode):
    """Makes every new tensor on the meta device, where it has a shape and no storage.

    Megatron names the device of every weight, which a `torch.device("meta")` context would leave as it is.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if getattr(func, "__name__", "") in _CONSTRUCTORS:
            given["device"] = "meta"
        return func(*args, **given)


@contextlib.contextmanager
def _fake_world(args: Any, rank: int) -> Iterator[ProcessGroupCollection]:
    """Process groups of one rank of a world that does not exist: collectives do nothing."""
    torch.distributed.init_process_group("fake", rank=rank, world_size=args.world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(args.seed)
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _environment(**values: int) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _arguments(recipe: Recipe, world_size: int) -> Any:
    """Megatron's own arguments of the first stage, for so many ranks."""
    argv = stage_argv(
        # Nothing is read or run: tokenizer and Transformer Engine may be elsewhere, and both backends hold the same.
        {**recipe.megatron, "tokenizer-type": "NullTokenizer", "tokenizer-model": None, FLAG: LOCAL},
        recipe.stages,
        1,
        roles=recipe.roles,
        evaluation_roles=recipe.evaluation_roles,
        save=recipe.save,
        save_interval=recipe.save_interval,
        eval_interval=recipe.evaluation.interval,
        eval_iterations=recipe.evaluation.iterations,
        cuda=torch.cuda.is_available(),
    )
    before, said = sys.argv, io.StringIO()
    sys.argv = [before[0], *argv]
    try:
        with _environment(WORLD_SIZE=world_size, RANK=0), contextlib.redirect_stdout(said):
            return parse_and_validate_args(args_defaults={})
    except (SystemExit, AssertionError, ValueError) as error:
        why = "see its message above" if isinstance(error, SystemExit) else str(error) or "an assertion failed"
        raise RecipeError([f"megatron: Megatron refuses these flags: {why}"], recipe.source) from error
    finally:
        sys.argv = before


def _chunks(args: Any, recipe: Recipe, groups: ProcessGroupCollection) -> list[ElasticHybridModel]:
    """The model chunks of this rank, as training would build them."""
    config = hybrid_config_from_args(args, model_config_cls=ElasticModelConfig)
    config.family = recipe.family
    builder, virtual = ElasticModelBuilder(config), args.virtual_pipeline_model_parallel_size
    if virtual is None:
        return [builder.build_plain(groups)]
    first, last = groups.pp.rank() == 0, groups.pp.rank() == groups.pp.size() - 1
    return [
        builder.build_plain(groups, first and chunk == 0, last and chunk == virtual - 1, chunk)
        for chunk in range(virtual)
    ]


def _measure(
    args: Any, chunks: list[ElasticHybridModel], groups: ProcessGroupCollection, teacher: bool
) -> RankMemory:
    stage, count, weights, gradients, optimizer = groups.pp.rank(), 0, 0, 0, 0
    for chunk in chunks:
        for parameter in chunk.parameters():
            size = parameter.numel()
            copies = (groups.dp_cp if getattr(parameter, "allreduce", True) else groups.expt_dp).size()
            states = 8 if parameter.dtype is torch.float32 else 12
            shared = states * size / copies if args.use_distributed_optimizer else states * size
            wide = args.accumulate_allreduce_grads_in_fp32 or parameter.dtype is torch.float32
            count += size
            weights += size * parameter.element_size()
            gradients += size * (4 if wide else parameter.element_size())
            optimizer += round(shared)
    layers = tuple(layer.layer_number - 1 for chunk in chunks for layer in chunk.decoder.layers)
    ranks = args.world_size // args.pipeline_model_parallel_size
    return RankMemory(stage, ranks, layers, count, weights, weights if teacher else 0, gradients, optimizer)


def dry_run(recipe: Recipe, world_size: int) -> list[RankMemory]:
    """Builds what the ranks of a run would build, on the meta device, and adds it up.

    One rank of every pipeline stage is built: the others of a stage hold tensors of the same shapes. In a process of
    its own: the process groups are fake.

    Args:
        recipe: checked for this many ranks.
        world_size: ranks.

    Raises:
        RecipeError: Megatron refuses the flags.
    """
    args = _arguments(recipe, world_size)
    teacher = recipe.teacher_cache is None or recipe.teacher_cache.mode != "read"
    found = []
    for stage in range(args.pipeline_model_parallel_size):
        with _fake_world(args, stage * (world_size // args.pipeline_model_parallel_size)) as groups, _OnMeta():
            found.append(_measure(args, _chunks(args, recipe, groups), groups, teacher))
    return found


def as_rows(found: list[RankMemory]) -> list[Mapping[str, Any]]:
    """The rows as plain values, for JSON and for a table."""
    return [
        {
            "pipeline_stage": each.stage,
            "ranks": each.ranks,
            "layers": list(each.layers),
            "parameters": each.parameters,
            "weights_bytes": each.weights,
            "teacher_bytes": each.teacher,
            "gradient_bytes": each.gradients,
            "optimizer_bytes": each.optimizer,
            "total_bytes": each.total,
        }
        for each in found
    ]
