"""Tensor-parallel linears that run in FP8 or on a slice of their weight, and the LM head with the KD loss inside it.

A weight is read only in the forward of the module that owns it: with `overlap_param_gather` it is stale anywhere else.
"""

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_elastic.axes import Segments
from megatron_elastic.curriculum import FORWARD_KL, DistillationLoss
from megatron_elastic.layers.fp8_weight import QuantisedWeight
from megatron_elastic.ops.cross_entropy import cross_entropy
from megatron_elastic.ops.fp8 import fp8_linear_ref
from megatron_elastic.ops.kd_loss import kd_loss
from megatron_elastic.ops.sliced_parameter import packed_again, sliced_parameter
from megatron_elastic.ops.top_k_loss import teacher_top_k, top_k_kd_loss
from megatron_elastic.precision import Scaling


def kept_weight(linear: torch.nn.Module, segments: tuple[Segments | None, ...] | None) -> Tensor:
    """The kept part of a linear's weight, for a product of several of them.

    What waits for a gathered weight before its owner's forward waits here too.
    """
    for hook in tuple(linear._forward_pre_hooks.values()):
        hook(linear, ())
    return sliced_parameter(linear.weight, *(segments or ()))  # type: ignore[arg-type]


class _Fp8:
    """What both kinds of linear need to run in FP8.

    Attributes:
        fp8: the quantised copies of the weight; None where the layer is not quantised.
    """

    fp8: QuantisedWeight | None = None
    weight: Tensor

    def quantise(self, scaling: Scaling) -> None:
        """From now on the layer's three products have FP8 operands."""
        self.fp8 = QuantisedWeight(scaling)
        self.quantized_once = self.fp8.once  # where `weights_changed` finds it

    def _fp8_product(self, fp8: QuantisedWeight, x: Tensor, segments: tuple[Segments | None, ...] | None) -> Tensor:
        """`[..., kept inputs]` -> `[..., kept outputs]` with the slice's own copy of the weight."""
        kept = self.weight if segments is None else sliced_parameter(self.weight, *segments)
        if not x.numel() or not kept.numel():  # an expert without tokens, or one that the slice cuts
            return torch.nn.functional.linear(x, kept)
        return fp8_linear_ref(x, kept, fp8.of(kept, segments), fp8.scaling)


class ElasticColumnParallelLinear(_Fp8, ColumnParallelLinear):
    """`ColumnParallelLinear` whose weight may be sliced on both dimensions."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        segments: tuple[Segments | None, ...] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Args:
            input_: `[s, b, kept inputs]` (`[s / TP, b, ...]` with sequence parallelism).
            weight: as in core; not together with `segments`.
            runtime_gather_output: as in core.
            segments: kept rows and columns of the rank-local weight; None runs the stock layer.

        Returns:
            `[s, b, kept outputs / TP]` and None.
        """
        # The dispatcher has gathered an expert's tokens, and sums what becomes of them.
        alone = self.explicit_expert_comm
        if self.fp8 is not None:
            if self.sequence_parallel and not alone:
                # Transformer Engine quantises before it gathers, with one scale for the group: the same numbers.
                x = gather_from_sequence_parallel_region(
                    input_, tensor_parallel_output_grad=True, group=self.tp_group
                )
            else:
                x = input_ if alone else copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
            return self._fp8_product(self.fp8, x, segments), None
        if segments is None:
            return super().forward(input_, weight, runtime_gather_output)
        if not (self.allreduce_dgrad or self.sequence_parallel or alone):
            input_ = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        kept = sliced_parameter(self.weight, *segments)
        with packed_again(kept, self.weight, *segments):
            output = self._forward_impl(
                input=input_,
                weight=kept,
                bias=None,
                gradient_accumulation_fusion=False,
                allreduce_dgrad=self.allreduce_dgrad and not alone,
                sequence_parallel=self.sequence_parallel and not alone,
                grad_output_buffer=None,
                wgrad_deferral_limit=None,
                tp_group=self.tp_group,
            )
        return output, None


class ElasticRowParallelLinear(_Fp8, RowParallelLinear):
    """`RowParallelLinear` whose weight may be sliced on both dimensions."""

    def forward(
        self, input_: Tensor, *, segments: tuple[Segments | None, ...] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Args:
            input_: `[s, b, kept inputs / TP]`.
            segments: kept rows and columns of the rank-local weight; None runs the stock layer.

        Returns:
            `[s, b, kept outputs]` (`[s / TP, b, ...]` with sequence parallelism) and None.
        """
        if self.fp8 is not None:
            return self._joined(self._fp8_product(self.fp8, input_, segments)), None
        if segments is None:
            return super().forward(input_)
        kept = sliced_parameter(self.weight, *segments)
        with packed_again(kept, self.weight, *segments):
            output = self._forward_impl(
                input=input_,
                weight=kept,
                bias=None,
                gradient_accumulation_fusion=False,
                allreduce_dgrad=False,
                sequence_parallel=False,
                tp_group=None,
                grad_output_buffer=None,
            )
        return self._joined(output), None

    def _joined(self, output: Tensor) -> Tensor:
        """The sum over tensor-parallel ranks, of an expert left to the dispatcher."""
        if self.explicit_expert_comm:
            return output
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(output, group=self.tp_group)


@dataclass
class TeacherTarget:
    """What the teacher leaves on the last stage for the students of one batch.

    Attributes:
        hidden: final hidden states after the final norm, `[s, b, h]` (`[s / TP, b, h]` with sequence parallelism).
        weight: the teacher's LM head on this rank, `[V / TP, h]`; None where the parent itself teaches: its own head.
        log_sum_exp: per token, `[s * b]`; filled by the first student, read by the others.
    """

    hidden: Tensor
    weight: Tensor | None
    log_sum_exp: Tensor | None = None


@dataclass
class TopKTarget:
    """The same where only the teacher's most probable tokens are known; nothing of the model is read for it.

    Attributes:
        ids: `[s, b, k]` int32, of whole sequences (of a context-parallel rank's share).
        log_probs: `[s, b, k + 1]`, at the temperature of the loss; the last is the ghost token's.
    """

    ids: Tensor
    log_probs: Tensor

    def rounded(self, precision: str) -> "TopKTarget":
        """What is left where the kept log-probabilities are stored in `fp16` or `fp32`; the ghost's is in fp32."""
        stored = self.log_probs.float()
        if precision == "fp16":
            stored[..., :-1] = stored[..., :-1].half()
        return TopKTarget(self.ids, stored.to(self.log_probs.dtype))


class ElasticLMHead(ElasticColumnParallelLinear):
    """The output layer: logits of a slice, or the loss, so that no `[s, b, V]` tensor need exist."""

    def top_k_target(self, hidden: Tensor, k: int, temperature: float) -> TopKTarget:
        """The `k` most probable tokens at final hidden states `[s, b, h]` (`[s / TP, b, h]` with sequence parallelism).

        For a frozen head: nothing waits for its weight to be gathered.
        """
        with torch.no_grad():
            whole = self._whole_sequence(hidden)
        group = self.tp_group if self.tp_group.size() > 1 else None
        return TopKTarget(*teacher_top_k(whole, self.weight.detach(), k, temperature=temperature, group=group))

    def _whole_sequence(self, hidden: Tensor) -> Tensor:
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        segments: tuple[Segments | None, ...] | None = None,
        teacher: TeacherTarget | TopKTarget | None = None,
        labels: Tensor | None = None,
        token_weights: Tensor | None = None,
        temperature: float = 1.0,
        loss: DistillationLoss = FORWARD_KL,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits, or with `teacher` the summed KD loss, or with `labels` alone the summed cross entropy.

        Args:
            input_: final hidden states, `[s, b, kept hidden]`.
            weight, runtime_gather_output: as in core (logits only).
            segments: kept rows and columns of the weight; None uses all of it.
            teacher: target of the distillation; the `log_sum_exp` of a `TeacherTarget` is filled.
            labels: `[b, s]`; with `teacher`, for the cross entropy that `loss` adds.
            token_weights: `[b, s]`, the loss mask.
            temperature: of the KD softmax.
            loss: divergence from the teacher, and the weight of the cross entropy.
        """
        if teacher is None and labels is None:
            return super().forward(input_, weight, runtime_gather_output, segments=segments)
        if token_weights is None:
            raise ValueError("token_weights (the loss mask) is required for a loss")
        hidden = self._whole_sequence(input_)
        kept = sliced_parameter(self.weight, *segments) if segments is not None else self.weight
        group = self.tp_group if self.tp_group.size() > 1 else None
        mask = token_weights.transpose(0, 1).contiguous()
        targets = None if labels is None else labels.transpose(0, 1).contiguous()
        if teacher is None:
            assert targets is not None
            return cross_entropy(hidden, kept, targets, mask, group=group), None
        if isinstance(teacher, TopKTarget):
            total = top_k_kd_loss(
                hidden,
                kept,
                teacher.ids,
                teacher.log_probs,
                mask,
                temperature=temperature,
                loss=loss,
                labels=targets,
                group=group,
            )
            return total, None
        with torch.no_grad():
            target = self._whole_sequence(teacher.hidden)
        total, teacher.log_sum_exp = kd_loss(
            hidden,
            kept,
            target,
            self.weight.detach() if teacher.weight is None else teacher.weight,
            mask,
            temperature=temperature,
            loss=loss,
            labels=targets,
            group=group,
            teacher_lse=teacher.log_sum_exp,
        )
        return total, None
