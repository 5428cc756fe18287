"""Defects of the released megatron-core that this package mends: each named, each behind a check that it is there."""

import functools
import importlib.metadata
import importlib.util
import inspect
import multiprocessing.managers
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_elastic.errors import ElasticError

SUPPORTED_CORE = "0.19."
TRACKER_WAIT = 60.0
"""Seconds until a tracker file that another node writes must be seen here."""


@dataclass(frozen=True)
class Defect:
    """One defect of a released wheel.

    Attributes:
        name: what the mend is called in messages and tests.
        why: what goes wrong without it.
        present: whether the installed megatron-core has it here; false once it is mended.
        mend: replaces the defective function.
    """

    name: str
    why: str
    present: Callable[[], bool]
    mend: Callable[[], None]


def check_core_version(version: str | None = None) -> None:
    """Refuses a megatron-core that this package was not written for.

    Args:
        version: the version to judge; None asks the installed distribution.

    Raises:
        ElasticError: where megatron-core is missing or not 0.19.x.
    """
    remedy = f"install megatron-core=={SUPPORTED_CORE}*, for example with: pip install 'megatron-core==0.19.2'"
    if version is None:
        try:
            version = importlib.metadata.version("megatron-core")
        except importlib.metadata.PackageNotFoundError as error:
            raise ElasticError(f"megatron-core is not installed: {remedy}") from error
    if not version.startswith(SUPPORTED_CORE):
        raise ElasticError(f"megatron-core {version} is installed, but only {SUPPORTED_CORE}x is supported: {remedy}")


def _makefile_missing() -> bool:
    from megatron.core.datasets import utils

    compiled = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    makefile = Path(utils.__file__).with_name("Makefile")
    return compiled and not makefile.exists() and utils.compile_helpers is not _helpers_are_compiled


def _helpers_are_compiled() -> None:
    """Stands for `compile_helpers`: the wheel ships the compiled helpers."""


def _mend_compile_helpers() -> None:
    from megatron.core.datasets import utils

    utils.compile_helpers = _helpers_are_compiled


def _torch_optimizer_without(method: str, defective: str) -> bool:
    """Whether torch's own AdamW is in use and `DistributedOptimizer.method` still has the defective line."""
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return False
    function = vars(distrib_optimizer.DistributedOptimizer)[method]
    # A mended method is a wrapper, and `getsource` would look through it.
    return not hasattr(function, "__wrapped__") and defective in inspect.getsource(function)


def _replace_method(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    method = vars(DistributedOptimizer)[name]
    setattr(DistributedOptimizer, name, functools.wraps(method)(make(method)))


def _create_state(optimizer: Any) -> None:
    """Gives torch's optimizer its state by a step at learning rate 0 without gradient: parameters stay as they are."""
    rates = [group["lr"] for group in optimizer.optimizer.param_groups]
    for group in optimizer.optimizer.param_groups:
        group["lr"] = 0.0
    optimizer._init_optimizer_states_with_dummy_values()
    for group, rate in zip(optimizer.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _mend_loading_before_first_step() -> None:
    def make(method: Callable[..., Any]) -> Callable[..., Any]:
        def sharded_state_dict(
            self: Any, model_sharded_state_dict: Any, is_loading: bool = False, *args: Any, **kwargs: Any
        ) -> Any:
            if is_loading and not self.optimizer.state:
                _create_state(self)
            return method(self, model_sharded_state_dict, is_loading, *args, **kwargs)

        return sharded_state_dict

    _replace_method("sharded_state_dict", make)


def _mend_copy_into_leaves() -> None:
    def make(method: Callable[..., Any]) -> Callable[..., Any]:
        def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
            with torch.no_grad():
                # The step is restored by load_state_dict, from the parameter groups.
                method(self, model_param, {**tensors, "step": None})

        return set_states

    _replace_method("_set_main_param_and_optimizer_states", make)


def _mend_shared_step() -> None:
    def make(method: Callable[..., Any]) -> Callable[..., Any]:
        def load_state_dict(self: Any, state_dict: Any) -> None:
            method(self, state_dict)
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

        return load_state_dict

    _replace_method("load_state_dict", make)


def _skipping_reads_on_one_rank() -> bool:
    from megatron.training import training

    return "if tp_rank == 0:" in inspect.getsource(training.dummy_train_step)


def _mend_skipping() -> None:
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import training

    def dummy_train_step(data_iterator: Any) -> None:
        """Reads a step's microbatches and does nothing with them, on every rank that has text."""
        chunks = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        while get_rerun_state_machine().should_run_forward_backward(data_iterator):
            for iterator in filter(None, chunks):
                for _ in range(get_num_microbatches()):
                    next(iterator)

    training.dummy_train_step = dummy_train_step


def _results_end_with_sigterm() -> bool:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    return "ctx.Manager().Queue()" in inspect.getsource(filesystem_async.get_write_results_queue)


def _mend_results_queue() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def get_write_results_queue(mp_mode: str = "spawn") -> Any:
        """The queue of what was written, kept by a process that ignores SIGTERM and goes with this one."""
        if filesystem_async._results_queue is None:
            manager = multiprocessing.managers.SyncManager(ctx=filesystem_async.mp.get_context(mp_mode))
            manager.start(signal.signal, (signal.SIGTERM, signal.SIG_IGN))
            filesystem_async._results_queue = manager.Queue()
            # Without a reference the process would be ended; it ends with this one.
            filesystem_async._results_queue._manager = manager
        return filesystem_async._results_queue

    filesystem_async.get_write_results_queue = get_write_results_queue


def _artifact_before_tracker() -> bool:
    from megatron.training import wandb_utils

    function = wandb_utils.on_save_checkpoint_success
    # A mended function is a wrapper, and `getsource` would look through it.
    return not hasattr(function, "__wrapped__") and "add_file(tracker_filename)" in inspect.getsource(function)


def _mend_artifact() -> None:
    from megatron.training import wandb_utils

    save = wandb_utils.on_save_checkpoint_success

    @functools.wraps(save)
    def on_save_checkpoint_success(checkpoint_path: str, tracker_filename: str, save_dir: str, iteration: int) -> None:
        limit = time.monotonic() + TRACKER_WAIT
        while not Path(tracker_filename).exists() or Path(tracker_filename).read_text().strip() != str(iteration):
            if time.monotonic() > limit:
                raise ElasticError(
                    f"{tracker_filename} does not say {iteration} after {TRACKER_WAIT:.0f} s: rank 0 writes it after a "
                    "save; is the folder shared by all nodes?"
                )
            time.sleep(0.01)
        save(checkpoint_path, tracker_filename, save_dir, iteration)

    wandb_utils.on_save_checkpoint_success = on_save_checkpoint_success


DEFECTS = (
    Defect(
        "dataset helpers without a Makefile",
        "compile_helpers runs `make` in a folder of the wheel that has no Makefile, and pretrain() exits",
        _makefile_missing,
        _mend_compile_helpers,
    ),
    Defect(
        "optimizer loaded before its first step",
        "torch's AdamW has no state before its first step, and DistributedOptimizer.state_dict asserts that it has",
        lambda: _torch_optimizer_without("sharded_state_dict", "self.load_state_dict(self.state_dict())"),
        _mend_loading_before_first_step,
    ),
    Defect(
        "optimizer state copied into leaves",
        "the loaded state has no `step` entry, which torch's AdamW has as a tensor, and fp32 main parameters are "
        "leaves, which cannot be written to while gradients are recorded",
        lambda: _torch_optimizer_without(
            "_set_main_param_and_optimizer_states", "if not isinstance(tensors[key], torch.Tensor)"
        ),
        _mend_copy_into_leaves,
    ),
    Defect(
        "one step count shared by all parameters",
        "load_state_dict gives every parameter the same `step` tensor: Adam's count advances once per parameter",
        lambda: _torch_optimizer_without("load_state_dict", 's["step"] = step\n'),
        _mend_shared_step,
    ),
    Defect(
        "a skipped iteration read by one rank",
        "--iterations-to-skip reads the skipped text on the first tensor-parallel rank alone: with a data provider on "
        "every rank (is_distributed) the ranks read different text from then on",
        _skipping_reads_on_one_rank,
        _mend_skipping,
    ),
    Defect(
        "a save's results end with SIGTERM",
        "torchrun sends SIGTERM to everything that a rank started; the process that keeps the queue of written files "
        "dies of it, and the save that --exit-signal-handler then makes fails",
        _results_end_with_sigterm,
        _mend_results_queue,
    ),
    Defect(
        "wandb's artifact before the tracker file",
        "the last rank gives wandb the tracker file of a save, which rank 0 may not have written yet: the run ends by "
        "'Path is not a file', or the artifact has the save before",
        _artifact_before_tracker,
        _mend_artifact,
    ),
)


def install() -> tuple[str, ...]:
    """Mends the defects that are present; returns their names. A second call finds none.

    Raises:
        ElasticError: where megatron-core is missing or not supported.
    """
    check_core_version()
    mended = []
    for defect in DEFECTS:
        if defect.present():
            defect.mend()
            mended.append(defect.name)
    return tuple(mended)
