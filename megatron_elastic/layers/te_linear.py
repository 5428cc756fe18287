"""Elastic linears whose products, communication and FP8 are Transformer Engine's.

They own their weights as the local ones do, so that names and checkpoints are the same on both backends. What runs is a
stand-in of Transformer Engine at the slice's own size: the layer that the extracted model would have. Weight gradients
come out of it like any gradient and are added into the parent's buffer by `sliced_parameter`: Transformer Engine's own
accumulation would overwrite, at the first use of a budget in a step, what other budgets have added.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_elastic.axes import Segments
from megatron_elastic.errors import ElasticError
from megatron_elastic.layers.linear import ElasticColumnParallelLinear, ElasticRowParallelLinear
from megatron_elastic.layers.quantized_once import QuantizedOnce
from megatron_elastic.layers.te_module import StandIns, transformer_engine
from megatron_elastic.ops.sliced_parameter import packed_again, sliced_parameter


class _Engine:
    """The stand-ins of a linear layer, made from what core's layer has worked out about its ranks."""

    def __init__(self, owner: Any, mode: str) -> None:
        self.owner, self.mode = owner, mode
        self.stand_ins = StandIns(self._make)
        transformer_engine()  # a missing one is told when the model is built

    def _make(self, outputs: int, inputs: int) -> torch.nn.Module:
        # The dispatcher has gathered an expert's tokens, and sums what becomes of them: no communication here.
        alone = self.owner.explicit_expert_comm
        group: Any = None if alone else self.owner.tp_group
        size = 1 if alone else group.size()
        made: torch.nn.Module = transformer_engine().Linear(
            inputs * (size if self.mode == "row" else 1),
            outputs * (size if self.mode == "column" else 1),
            sequence_parallel=self.owner.config.sequence_parallel,
            fuse_wgrad_accumulation=False,
            tp_group=group,
            tp_size=size,
            bias=False,
            params_dtype=self.owner.weight.dtype,
            parallel_mode=None if alone else self.mode,
            device="meta",
        )
        return made

    def __call__(self, x: Tensor, segments: tuple[Segments | None, ...] | None, once: QuantizedOnce) -> Tensor:
        weight, kept = self.owner.weight, segments or ()
        packed = sliced_parameter(weight, *kept)
        with packed_again(packed, weight, *kept):
            return self.stand_ins.run(
                x,
                kept=segments,
                sizes=tuple(packed.shape),
                weights=[packed],
                once=once,
                trained=weight.requires_grad,
            )


class TEElasticColumnParallelLinear(ElasticColumnParallelLinear):
    """`ElasticColumnParallelLinear` on Transformer Engine."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what core's layer takes.

        Raises:
            ElasticError: for outputs gathered over ranks or a bias, or without Transformer Engine.
        """
        super().__init__(*args, **kwargs)
        if self.gather_output or self.bias is not None:
            raise ElasticError("an elastic linear on Transformer Engine has no bias and leaves its outputs split")
        self.quantized_once = QuantizedOnce()
        self._engine = _Engine(self, "column")

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        segments: tuple[Segments | None, ...] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As of the local layer, but `weight` and `runtime_gather_output` are refused.

        Raises:
            ElasticError: for another weight.
        """
        if weight is not None or runtime_gather_output:
            raise ElasticError("an elastic linear on Transformer Engine runs on its own weight, its outputs left split")
        return self._engine(input_, segments, self.quantized_once), None


class TEElasticRowParallelLinear(ElasticRowParallelLinear):
    """`ElasticRowParallelLinear` on Transformer Engine."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what core's layer takes.

        Raises:
            ElasticError: for inputs that are not split or a bias, or without Transformer Engine.
        """
        super().__init__(*args, **kwargs)
        if not self.input_is_parallel or self.bias is not None:
            raise ElasticError("an elastic linear on Transformer Engine has no bias and takes inputs that are split")
        self.quantized_once = QuantizedOnce()
        self._engine = _Engine(self, "row")

    def forward(
        self, input_: Tensor, *, segments: tuple[Segments | None, ...] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As of the local layer."""
        return self._engine(input_, segments, self.quantized_once), None
