"""Models outside Megatron's training loop: whole in one process, or split over the ranks of a launcher."""

import contextlib
import datetime
import io
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.training.argument_utils import hybrid_config_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig
from torch import Tensor

from megatron_elastic import megatron_compat
from megatron_elastic.backend import FLAG, LOCAL, available_backend
from megatron_elastic.checkpoint import expert_of, find_checkpoint, parameters, read_parameter
from megatron_elastic.cpu import adaptation
from megatron_elastic.errors import CheckpointError, ElasticError, RecipeError
from megatron_elastic.family import Family
from megatron_elastic.flags import LAYOUT_FLAGS, padded_vocabulary, to_argv
from megatron_elastic.layout import ModelShape
from megatron_elastic.model import ElasticHybridModel, ElasticModelBuilder, ElasticModelConfig
from megatron_elastic.schedule import BACKEND_FLAGS, CPU_FLAGS
from megatron_elastic.specs import plain_spec

RUN_FLAGS = (
    "lr",
    "min-lr",
    "lr-warmup-iters",
    "lr-warmup-fraction",
    "tensorboard-dir",
    "wandb-project",
    "fp16",
    "bf16",
    *("fp8-format", "fp8-recipe", "first-last-layers-bf16"),
)
"""Flags about training and precision: set here, or without meaning outside training."""


_RANKS_FLAGS = (
    "tensor-model-parallel-size",
    "pipeline-model-parallel-size",
    "expert-model-parallel-size",
    "expert-tensor-parallel-size",
)
SPLIT_FLAGS = (
    *(*_RANKS_FLAGS, "sequence-parallel"),
    *("decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers"),
)
"""The flags of a layout that a forward pass keeps; the ranks that a recipe gives to context parallelism are
data-parallel then."""


def launched() -> int:
    """Ranks that a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def split(flags: Mapping[str, Any]) -> dict[str, Any]:
    """How a recipe splits a model over several ranks: its own flags, without the virtual stages of a pipeline."""
    kept = {name: flags[name] for name in SPLIT_FLAGS if name in flags}
    stages = str(flags["hybrid-layer-pattern"]).split("|")
    each = max(1, len(stages) // int(kept.get("pipeline-model-parallel-size", 1)))
    joined = ["".join(stages[start : start + each]) for start in range(0, len(stages), each)]
    return {**kept, "hybrid-layer-pattern": "|".join(joined)}


@contextlib.contextmanager
def split_groups(flags: Mapping[str, Any], seed: int = 1234) -> Iterator[None]:
    """Megatron's groups of the ranks that there are, as a recipe splits its model over them.

    Args:
        flags: the recipe's.
        seed: of Megatron's random states.

    Raises:
        ElasticError: the ranks are no multiple of those that one copy of the model takes.
    """
    kept, ranks = split(flags), torch.distributed.get_world_size()
    tensor, pipeline, expert, expert_tensor = (int(kept.get(flag, 1)) for flag in _RANKS_FLAGS)
    if "expert-tensor-parallel-size" not in kept:
        expert_tensor = tensor
    for copy, what in ((tensor * pipeline, "TP x PP"), (expert * expert_tensor * pipeline, "EP x expert TP x PP")):
        if ranks % copy:
            raise ElasticError(f"{ranks} ranks: they must be a multiple of {what} = {copy}, as the recipe has it")
    parallel_state.initialize_model_parallel(
        tensor, pipeline, expert_model_parallel_size=expert, expert_tensor_parallel_size=expert_tensor
    )
    try:
        model_parallel_cuda_manual_seed(seed)
        yield
    finally:
        parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def launched_processes(flags: Mapping[str, Any]) -> Iterator[None]:
    """Megatron's process groups for the ranks that a launcher started; see `split_groups`.

    Args:
        flags: the recipe's.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        adaptation.install_training()
    megatron_compat.install()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    minutes = int(flags.get("distributed-timeout-minutes", 10))
    torch.distributed.init_process_group(backend, timeout=datetime.timedelta(minutes=minutes))
    try:
        with split_groups(flags):
            yield
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def single_process(seed: int = 1234) -> Iterator[None]:
    """Megatron's process groups for one process, on the GPU or, where there is none, on the CPU adaptation.

    Args:
        seed: of Megatron's random states.

    Raises:
        ElasticError: under a launcher of several processes, or where process groups exist already.
    """
    ranks = launched()
    if ranks > 1:
        raise ElasticError(f"this runs on one process, and a launcher started {ranks}: start it without torchrun")
    if not torch.cuda.is_available():
        adaptation.install()
    megatron_compat.install()
    if torch.distributed.is_initialized():
        raise ElasticError("torch.distributed is initialised already: call this in a process of its own")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(seed)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _arguments(flags: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Megatron's arguments for a recipe's flags, read by its own parser and validation."""
    pattern, ranks = str(flags["hybrid-layer-pattern"]).replace("|", ""), launched()
    kept = {name: value for name, value in flags.items() if name not in LAYOUT_FLAGS and name not in RUN_FLAGS}
    cuda = torch.cuda.is_available()
    # What was trained on one backend is read on what there is; proofs in fp64 are for the local one.
    backend = LOCAL if dtype is torch.float64 else available_backend(flags, cuda=cuda)
    made = {
        **BACKEND_FLAGS[backend],
        **({} if cuda else CPU_FLAGS),
        **kept,
        FLAG: backend,
        "hybrid-layer-pattern": pattern,
        **(split(flags) if ranks > 1 else {}),
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        # The parser demands these; no layer depends on them with no or rotary positions.
        "seq-length": 1,
        "max-position-embeddings": 1,
        "micro-batch-size": 1,
        "train-iters": 1,
        "lr": 1.0,
    }
    before = sys.argv
    sys.argv = [before[0], *to_argv(made)]
    try:
        # Megatron prints every argument; standard output is for results. What it refuses, it says on standard error.
        with contextlib.redirect_stdout(io.StringIO()):
            args = parse_args()
            args.world_size, args.rank = ranks, int(os.environ.get("RANK", "0"))
            validate_args(args)
    except (SystemExit, AssertionError, ValueError) as error:
        said = "see its message above" if isinstance(error, SystemExit) else str(error) or "an assertion failed"
        raise RecipeError([f"megatron: Megatron refuses these flags: {said}"]) from error
    finally:
        sys.argv = before
    args.params_dtype = dtype
    args.padded_vocab_size = padded_vocabulary(flags)
    return args


def _to[M: torch.nn.Module](model: M, dtype: torch.dtype) -> M:
    # Core keeps A_log and D in fp32 whatever the parameters' type; fp64 is for proofs, which they would spoil.
    if dtype is torch.float64:
        model.double()
    return model.cuda(torch.cuda.current_device())


def build_plain_model(
    flags: Mapping[str, Any], dtype: torch.dtype = torch.float32, shape: ModelShape | None = None
) -> HybridModel:
    """Core's `HybridModel` with initial weights, on Transformer Engine where there is one, else on the local backend.

    It is whole inside `single_process`; inside `launched_processes` it is this rank's part.

    Args:
        flags: Megatron's model flags, without dashes in front; those of the layout and of training are left out.
        dtype: of the parameters and of the computation.
        shape: of a model whose layers differ in size, which flags cannot say; None where they do not.

    Raises:
        RecipeError: Megatron refuses the flags.
    """
    args = _arguments(flags, dtype)
    config = hybrid_config_from_args(args, model_config_cls=HybridModelConfig)
    config.hybrid_stack_spec = plain_spec(args.transformer_impl, shape)
    model = HybridModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    return _to(model, dtype)


def build_elastic_model(
    flags: Mapping[str, Any], family: Family, dtype: torch.dtype = torch.float32
) -> ElasticHybridModel:
    """The elastic model of a family, whole, with initial weights, without teacher and router; inside `single_process`.

    Args:
        flags: as for `build_plain_model`.
        family: its shape is the one that the flags describe.
        dtype: of the parameters and of the computation.

    Raises:
        RecipeError: Megatron refuses the flags.
    """
    args = _arguments(flags, dtype)
    config = hybrid_config_from_args(args, model_config_cls=ElasticModelConfig)
    config.family, config.backend = family, args.transformer_impl
    model: ElasticHybridModel = ElasticModelBuilder(config).build_plain(ProcessGroupCollection.use_mpu_process_groups())
    return _to(model, dtype)


def _stored_states(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers (the biases of a MoE router) by the names that modules have; live tensors."""
    found = model.state_dict(keep_vars=True)
    return {name: each for name, each in found.items() if isinstance(each, Tensor)}


@torch.no_grad()
def load_weights(model: Any, checkpoint: str | Path) -> None:
    """Loads every parameter by its stock name, one at a time, in the model's dtype.

    Args:
        model: whole, plain or elastic.
        checkpoint: folder of a parent, a family or an extracted model; a family's router and description are left.

    Raises:
        CheckpointError: no checkpoint there, or not one of this model.
    """
    path = find_checkpoint(checkpoint)
    states = _stored_states(model)
    experts = {name: expert_of(name) for name in states}
    wanted: dict[str, tuple[int, ...]] = {}
    for name, state in states.items():
        stock, expert = experts[name]
        # The experts of a layer come in order: the last one says how many there are.
        wanted[stock] = tuple(state.shape) if expert is None else (expert + 1, *state.shape)
    found = {name: info for name, info in parameters(path).items() if not name.startswith("elastic.")}
    faults = [f"{name} missing" for name in sorted(set(wanted) - set(found))]
    faults += [f"{name} not in the model" for name in sorted(set(found) - set(wanted))]
    for name in sorted(set(wanted) & set(found)):
        if wanted[name] != found[name].shape:
            faults.append(f"{name} is {found[name].shape}, the model's {wanted[name]}")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{path}: not a checkpoint of this model: {'; '.join(faults[:3])}{more}")
    places: dict[str, list[tuple[Tensor, int | None]]] = {}
    for name, state in states.items():
        stock, expert = experts[name]
        places.setdefault(stock, []).append((state, expert))
    for stock, targets in places.items():
        value = read_parameter(path, stock)  # once for all experts of a layer
        for state, expert in targets:
            state.copy_(value if expert is None else value[expert])
        del value  # before the next one is read
