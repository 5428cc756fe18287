"""Routed experts in Transformer Engine's grouped products, each slice on a stand-in of its own size."""

from typing import Any

import torch
from torch import Tensor

from megatron_elastic.layers.mlp import activations
from megatron_elastic.layers.moe import ElasticExperts, KeptWeight
from megatron_elastic.layers.quantized_once import QuantizedOnce
from megatron_elastic.layers.te_module import StandIns, transformer_engine
from megatron_elastic.ops.sliced_parameter import all_packed_again

ALIGNMENT = 16
"""Rows that an expert's part of a quantised operand is a multiple of (Transformer Engine's, for the recipes here)."""


class TEElasticExperts(ElasticExperts):
    """`ElasticExperts` on Transformer Engine; the experts' linears own the weights, and never run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what core's experts take."""
        super().__init__(*args, **kwargs)
        self.grouped = True  # one after the other there would be experts without a row, or without a neuron
        self.quantized_once = QuantizedOnce()
        self._first, self._second = StandIns(self._make), StandIns(self._make)

    def _make(self, experts: int, outputs: int, inputs: int) -> torch.nn.Module:
        # The dispatcher has gathered the tokens, and sums what becomes of them: no communication here.
        made: torch.nn.Module = transformer_engine().GroupedLinear(
            experts,
            inputs,
            outputs,
            fuse_wgrad_accumulation=False,
            bias=False,
            params_dtype=self.config.params_dtype,
            parallel_mode=None,
            device="meta",
        )
        return made

    def products(
        self,
        tokens: Tensor,
        counts: list[int],
        probs: Tensor,
        mask: Tensor | None,
        first: list[KeptWeight],
        second: list[KeptWeight],
    ) -> Tensor:
        """As of the local layer; where products are quantised, every expert's rows are filled up to a whole tile."""
        rows = counts
        if self.config.fp8:
            tokens, probs, rows = filled_up(tokens, counts), filled_up(probs, counts), padded(counts)
        neurons = self._product(self._first, tokens, rows, first)
        out = self._product(self._second, activations(self.local_experts[0], neurons, mask, probs), rows, second)
        return out if rows is counts else without_filling(out, counts)

    def _product(self, stand_ins: StandIns, x: Tensor, counts: list[int], weights: list[KeptWeight]) -> Tensor:
        packed = [each for _, each, _ in weights]
        kept = tuple(self._number(linear) for linear, _, _ in weights), weights[0][2]
        slices = [(each, linear.weight, segments) for linear, each, segments in weights]
        with all_packed_again(slices):  # type: ignore[arg-type]
            return stand_ins.run(
                x,
                counts,
                kept=kept,
                sizes=(len(packed), *packed[0].shape),
                weights=packed,
                once=self.quantized_once,
                trained=bool(slices[0][1].requires_grad),
            )

    def _number(self, linear: torch.nn.Module) -> int:
        return next(n for n, e in enumerate(self.local_experts) if linear in (e.linear_fc1, e.linear_fc2))


def padded(counts: list[int]) -> list[int]:
    """Rows of every expert, filled up to a multiple of `ALIGNMENT`."""
    return [-(-count // ALIGNMENT) * ALIGNMENT for count in counts]


def filled_up(x: Tensor, counts: list[int]) -> Tensor:
    """`[rows, ...]`, expert after expert, with rows of zeros after every expert's."""
    parts = []
    for part, rows in zip(x.split(counts), padded(counts), strict=True):
        parts += [part, x.new_zeros(rows - len(part), *x.shape[1:])]
    return torch.cat(parts)


def without_filling(x: Tensor, counts: list[int]) -> Tensor:
    """The rows that `filled_up` did not add."""
    parts = x.split(padded(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
