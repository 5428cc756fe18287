"""Transformer Engine's modules, made to run on weights that are given with every call. Only here is it imported."""

import importlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_elastic.backend import LOCAL, TRANSFORMER_ENGINE, transformer_engine_fault
from megatron_elastic.errors import ElasticError
from megatron_elastic.layers.quantized_once import QuantizedOnce


def transformer_engine() -> Any:
    """`transformer_engine.pytorch`.

    Raises:
        ElasticError: it cannot run here.
    """
    fault = transformer_engine_fault(cuda=torch.cuda.is_available())
    if fault is not None:
        raise ElasticError(f"backend {TRANSFORMER_ENGINE!r} cannot be had here: {fault}; install it, or use {LOCAL!r}")
    return importlib.import_module("transformer_engine.pytorch")


class StandIn:
    """A module of Transformer Engine without parameters of its own.

    It communicates, quantises and multiplies as the module of a model of its size would; the weights come with each
    call and are not kept. What it keeps is the quantisation's state.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        """Takes the parameters out of a module that was made on the meta device."""
        self.module = module
        self.names = tuple(module._parameters)
        module._parameters.clear()

    def __call__(self, *inputs: Any, weights: Sequence[Tensor], first: bool | None) -> Tensor:
        """The module's forward.

        Args:
            inputs: as the module takes them.
            weights: in the order of the module's parameters.
            first: whether a quantised weight is made anew; None keeps none.
        """
        # In the instance's own dictionary, where an attribute is looked for first: a tensor is no parameter there.
        attributes = vars(self.module)
        attributes.update(zip(self.names, weights, strict=True))
        try:
            out: Tensor = self.module(*inputs, is_first_microbatch=first)
        finally:
            for name in self.names:
                del attributes[name]
        return out


class StandIns:
    """The stand-ins of one owner of weights: one for each slice, made when it is first used.

    Not a module: what it keeps is no part of the owner's state, and is not saved.

    Args:
        make: the module for the sizes of a slice on this rank.
    """

    def __init__(self, make: Callable[..., torch.nn.Module]) -> None:
        self.make = make
        self._made: dict[Hashable, StandIn] = {}

    def run(
        self,
        *inputs: Any,
        kept: Hashable,
        sizes: tuple[int, ...],
        weights: Sequence[Tensor],
        once: QuantizedOnce,
        trained: bool,
    ) -> Tensor:
        """The stand-in of a slice on its weights.

        Args:
            inputs: as the module takes them.
            kept: the slice.
            sizes: what `make` takes.
            weights: packed.
            once: the owner's.
            trained: whether the parameters they were packed from have gradients (without gradients on, no packed
                weight says so).

        Returns:
            What the module returns.
        """
        key = kept, sizes
        if key not in self._made:
            self._made[key] = StandIn(self.make(*sizes))
        # Without gradients (evaluation, the first forward of a recompute) a trained weight is quantised for this use
        # alone: what is kept for gradients has both layouts, and one made without would lack the transposed one.
        first = once.first_use(key) if torch.is_grad_enabled() or not trained else None
        return self._made[key](*inputs, weights=weights, first=first)
