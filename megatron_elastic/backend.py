"""Whose linears, attention and experts a model runs on: Transformer Engine's, or this package's own ("local").

Weights, their names and what is saved are the same on both.
"""

import functools
import importlib
from collections.abc import Mapping
from typing import Any

from megatron_elastic.errors import RecipeError

FLAG = "transformer-impl"
"""Megatron's flag for it."""
TRANSFORMER_ENGINE, LOCAL = "transformer_engine", "local"
BACKENDS = (TRANSFORMER_ENGINE, LOCAL)


@functools.cache
def _import_fault() -> str | None:
    try:
        importlib.import_module("transformer_engine.pytorch")
    # Without its CUDA core, or with another version of it, it ends in an assertion; with a library that is missing, in
    # one of the others.
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def transformer_engine_fault(*, cuda: bool) -> str | None:
    """Why Transformer Engine cannot run here; None where it can.

    Args:
        cuda: whether there is a CUDA device.
    """
    if not cuda:
        return "there is no CUDA device"
    fault = _import_fault()
    return None if fault is None else f"transformer_engine does not import ({fault})"


def available_backend(flags: Mapping[str, Any], *, cuda: bool) -> str:
    """The backend for a model that is only read: local where the flags or the machine have nothing else.

    Args:
        flags: Megatron's, without dashes in front.
        cuda: whether there is a CUDA device.
    """
    if flags.get(FLAG) == LOCAL or transformer_engine_fault(cuda=cuda) is not None:
        return LOCAL
    return TRANSFORMER_ENGINE


def chosen_backend(flags: Mapping[str, Any], *, cuda: bool) -> str:
    """The backend of a run: what the flags ask for, and without that what there is.

    Args:
        flags: Megatron's, without dashes in front.
        cuda: whether the ranks have GPUs.

    Raises:
        RecipeError: Transformer Engine is asked for and cannot run here.
    """
    if flags.get(FLAG) == TRANSFORMER_ENGINE:
        fault = transformer_engine_fault(cuda=cuda)
        if fault is not None:
            raise RecipeError(
                [f"megatron.{FLAG}: {TRANSFORMER_ENGINE!r} cannot be had here: {fault}; install it, or use {LOCAL!r}"]
            )
    return available_backend(flags, cuda=cuda)
