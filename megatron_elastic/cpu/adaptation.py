"""Lets Megatron's CUDA-only call sites run without CUDA: "cuda" means "cpu", and no line that computes changes.

Every name that is replaced stands in `REPLACED_NAMES` (`install`) or `REPLACED_FOR_TRAINING` (`install_training`); a
test compares the lists with what really changed. One flag more is raised for the length of a constructor and put back:
`megatron.core.ssm.mamba_mixer.HAVE_MAMBA_SSM`, see `megatron_elastic.layers.plain.without_mamba_kernels`.
"""

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo

from megatron_elastic.errors import ElasticError

CPU = torch.device("cpu")

CONSTRUCTORS = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "randperm",
    "tensor",
    "zeros",
    "zeros_like",
)
"""Tensor constructors of `torch` that take a device."""

_NO_OPERATION = ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_device", "synchronize")

REPLACED_NAMES = (
    *(f"torch.{name}" for name in CONSTRUCTORS),
    "torch.Tensor.cuda",
    "torch.Tensor.pin_memory",
    "torch.Tensor.to",
    "torch.Tensor.type",
    *(f"torch.cuda.{name}" for name in _NO_OPERATION),
    "torch.cuda.Event",
    "torch.cuda.Stream",
    "torch.cuda.current_device",
    "torch.cuda.current_stream",
    "torch.cuda.default_stream",
    "torch.cuda.device",
    "torch.cuda.device_count",
    "torch.cuda.get_device_capability",
    "torch.cuda.get_rng_state",
    "torch.cuda.manual_seed",
    "torch.cuda.set_rng_state",
    "torch.cuda.stream",
    "torch.cuda.random.get_rng_state",
    "torch.cuda.random.set_rng_state",
    "torch._dynamo.config.disable",
    "megatron.core.tensor_parallel.random._set_cuda_rng_state",
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
)
"""Everything that `install` replaces."""

_WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync"

REPLACED_FOR_TRAINING = (
    f"{_WRITER}.preload_tensors",
    "megatron.training.initialize.init_persistent_async_worker",
    "megatron.training.training.initialize_megatron",
    "megatron.training.arguments.get_device_arch_version",
)
"""What `install_training` replaces on top."""


class _InOrder:
    """A stream or an event of a device that runs everything in program order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what a CUDA stream or event takes, and needs none of it."""

    def __getattr__(self, name: str) -> Callable[..., "_InOrder"]:
        return lambda *args, **kwargs: self

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds: none that a device could tell."""
        return 0.0


def _on_cpu(device: Any) -> Any:
    """`cpu` for any spelling of a CUDA device; anything else as it is."""
    if isinstance(device, str):
        return CPU if device.startswith("cuda") else device
    return CPU if isinstance(device, torch.device) and device.type == "cuda" else device


def _constructor(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A constructor for which CUDA is the CPU, and pinned memory is memory."""

    @functools.wraps(make)
    def make_on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return make(*args, **kwargs)

    return make_on_cpu


def _nothing() -> Callable[..., None]:
    """A function that does nothing; each one its own object, since dynamo keeps a table of rules by function."""
    return lambda *args, **kwargs: None


def _current_stream(*args: Any, **kwargs: Any) -> _InOrder:
    return _InOrder()


def _no_context(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _same_tensor(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


def _replace_tensor_methods() -> None:
    to, type_of = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(to)
    def to_cpu(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return to(tensor, *map(_on_cpu, args), **{name: _on_cpu(value) for name, value in kwargs.items()})

    @functools.wraps(type_of)
    def cuda_type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The optimizer sorts parameters by the spelling "torch.cuda.FloatTensor".
        if args or kwargs:
            return type_of(tensor, *args, **kwargs)
        return type_of(tensor).replace("torch.", "torch.cuda.", 1)

    replaced: Any = torch.Tensor
    replaced.cuda = replaced.pin_memory = _same_tensor
    replaced.to, replaced.type = to_cpu, cuda_type


def _replace_cuda_functions() -> None:
    cuda: Any = torch.cuda
    for name in _NO_OPERATION:
        setattr(cuda, name, _nothing())
    cuda.Stream = cuda.Event = _InOrder
    cuda.current_stream = cuda.default_stream = _current_stream
    cuda.stream = cuda.device = _no_context
    cuda.current_device = lambda: CPU
    cuda.device_count = lambda: 1
    cuda.get_device_capability = lambda *args, **kwargs: (9, 0)  # asked whether grouped products have a kernel
    cuda.get_rng_state = cuda.random.get_rng_state = _get_rng_state
    cuda.set_rng_state = cuda.random.set_rng_state = _set_rng_state
    cuda.manual_seed = _manual_seed


def _as_if_moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What the exchange of experts' tokens counts with: numbers of tokens, which it takes as numpy from a device."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _is_not_about_cpu_rng(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


def install() -> None:
    """Makes "cuda" mean "cpu" in this process; call it before any model is built. A second call does nothing.

    Raises:
        ElasticError: where CUDA is available.
    """
    if torch.cuda.is_available():
        raise ElasticError(
            "the CPU adaptation cannot be installed: CUDA is available here. Run without it, or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    if vars(torch.cuda)["current_stream"] is _current_stream:
        return
    # Megatron's jit_fuser is torch.compile, which needs a C++ compiler on the CPU; eager runs the same operations.
    torch._dynamo.config.disable = True
    for name in CONSTRUCTORS:
        setattr(torch, name, _constructor(getattr(torch, name)))
    _replace_tensor_methods()
    _replace_cuda_functions()
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    token_dispatcher.maybe_move_tensor_to_cpu = _as_if_moved
    random._set_cuda_rng_state = _set_rng_state
    # The tracked generator is the CPU's own here: that its state changes inside a fork is the purpose.
    logging.getLogger(random.__name__).addFilter(_is_not_about_cpu_rng)


def _forked_worker(start: Callable[..., None]) -> Callable[..., None]:
    """The writer of asynchronous saves as a fork, which has this adaptation: a fresh process would ask for a GPU."""

    @functools.wraps(start)
    def init_persistent_async_worker(rank: int, mp_mode: str = "fork") -> None:
        start(rank, "fork")

    return init_persistent_async_worker


def _copies(preload: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """The copy from device to host that a save begins with: of a CPU tensor `.to("cpu")` is none."""

    @functools.wraps(preload)  # with its name, by which it is sent to the writer
    def preload_tensors(write_buckets: list[Any], non_blocking: bool = True) -> list[Any]:
        return [
            (file, key, (objects, [(item, tensor.clone()) for item, tensor in tensors]))
            for file, key, (objects, tensors) in preload(write_buckets, non_blocking)
        ]

    return preload_tensors


def install_training() -> None:
    """`install`, and what `megatron.training.pretrain` asks of a device. A second call does nothing.

    Raises:
        ElasticError: where CUDA is available.
    """
    install()
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.training import arguments, initialize, training

    if isinstance(training.initialize_megatron, functools.partial):
        return
    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    # Decides only whether CUDA_DEVICE_MAX_CONNECTIONS=1 is demanded.
    arguments.get_device_arch_version = lambda: 10
    initialize.init_persistent_async_worker = _forked_worker(initialize.init_persistent_async_worker)
    FileSystemWriterAsync.preload_tensors = staticmethod(_copies(FileSystemWriterAsync.preload_tensors))
