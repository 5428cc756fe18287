"""The elastic mixture-of-experts layer: routed experts, their neurons, the shared expert and hidden channels narrowed.

Routed experts run on core's dispatchers, one after the other or as one grouped product. The weights of those that are
cut report a gradient all the same, as data parallelism with overlap asks of every weight.
"""

from functools import lru_cache
from typing import Any

import torch
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from megatron_elastic.axes import Segments
from megatron_elastic.errors import ElasticError
from megatron_elastic.family import LayerPlan
from megatron_elastic.layers.linear import kept_weight
from megatron_elastic.layers.mlp import activations
from megatron_elastic.layers.moe_role import MoeRole
from megatron_elastic.layers.recompute import checkpointed, residual_branch
from megatron_elastic.masks import Masks
from megatron_elastic.ops.grouped_linear import grouped_linear
from megatron_elastic.ops.unused import unused

FC1, FC2 = "mlp.experts.experts.linear_fc1.weight", "mlp.experts.experts.linear_fc2.weight"
SHARED_FC1, SHARED_FC2 = "mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.linear_fc2.weight"


_OfWeight = tuple[Segments | None, ...] | None
OfExpert = tuple[_OfWeight, _OfWeight]
"""Kept segments of an expert's two weights."""
KeptWeight = tuple[torch.nn.Module, Tensor, tuple[Segments | None, ...]]
"""A linear, what is kept of its weight, and the segments of that."""
_WHOLE: OfExpert = (None, None)


class ElasticExperts(SequentialMLP):
    """The routed experts of this rank: with core's `moe_grouped_gemm` in one product, else one after the other.

    In FP8 always one after the other: every expert's tokens and weight have a scale of their own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what core's experts take."""
        super().__init__(*args, **kwargs)
        self.grouped: bool = self.config.moe_grouped_gemm

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        tokens_per_expert: Tensor,
        probs: Tensor,
        *,
        mask: Tensor | None = None,
        plan: LayerPlan | None = None,
    ) -> tuple[Tensor, None]:
        """Args:
            tokens: sorted by expert, `[tokens, kept hidden]`.
            tokens_per_expert: `[experts of this rank]`; 0 for those that the plan cuts.
            probs: combine weight of each token, `[tokens]`.
            mask: soft mask of every expert's neurons, `[expert_ffn / expert TP]`.
            plan: slice to run instead.

        Returns:
            `[tokens, kept hidden]`, weighted, and None.
        """
        # No wait for the device: core's dispatchers have brought the counts to the host, which splits their buffers.
        counts = tokens_per_expert.tolist()
        if plan is None:
            segments = (_WHOLE,) * len(counts)
        else:
            segments = _of_experts(plan.segments[FC1], plan.segments[FC2], len(counts))
        if self.grouped and self.local_experts[0].linear_fc1.fp8 is None:
            return self._grouped(tokens, counts, probs, mask, segments), None
        outputs = []
        groups = zip(self.local_experts, tokens.split(counts), probs.split(counts), segments, strict=True)
        for expert, x, scale, (fc1, fc2) in groups:
            neurons, _ = expert.linear_fc1(x, segments=fc1)
            out, _ = expert.linear_fc2(activations(expert, neurons, mask, scale), segments=fc2)
            outputs.append(out)
        return torch.cat(outputs), None

    def _grouped(
        self, tokens: Tensor, counts: list[int], probs: Tensor, mask: Tensor | None, segments: tuple[OfExpert, ...]
    ) -> Tensor:
        """All experts that are kept, in two products."""
        first, second, left, cut = [], [], [], []
        for expert, count, (fc1, fc2) in zip(self.local_experts, counts, segments, strict=True):
            # Both here, and every expert: what starts a gather of weights runs in the order of the layout.
            weights = kept_weight(expert.linear_fc1, fc1), kept_weight(expert.linear_fc2, fc2)
            if weights[0].numel():
                first.append((expert.linear_fc1, weights[0], fc1 or ()))
                second.append((expert.linear_fc2, weights[1], fc2 or ()))
                left.append(count)
            else:
                cut += [expert.linear_fc1.weight, expert.linear_fc2.weight]
        out = self.products(tokens, left, probs, mask, first, second)
        return unused(out, *cut) if torch.is_grad_enabled() else out

    def products(
        self,
        tokens: Tensor,
        counts: list[int],
        probs: Tensor,
        mask: Tensor | None,
        first: list[KeptWeight],
        second: list[KeptWeight],
    ) -> Tensor:
        """The experts that are kept: tokens `[tokens, kept hidden]`, `counts` of each, through both their weights."""
        neurons = grouped_linear(tokens, torch.stack([packed for _, packed, _ in first]), counts)
        active = activations(self.local_experts[0], neurons, mask, probs)
        return grouped_linear(active, torch.stack([packed for _, packed, _ in second]), counts)

@lru_cache(maxsize=4096)
def _of_experts(
    first: tuple[Segments | None, ...], second: tuple[Segments | None, ...], count: int
) -> tuple[OfExpert, ...]:
    """Kept rows and columns of every expert's two weights: no neuron where the expert itself is cut.

    Args:
        first, second: what a plan keeps of the two stored tensors, experts first.
        count: experts of this rank.
    """
    experts, rows, hidden = first
    _, outputs, columns = second
    kept = (rows, hidden), (outputs, columns)
    cut = ((), hidden), (outputs, ())
    return tuple(
        kept if experts is None or any(start <= number < stop for start, stop in experts) else cut
        for number in range(count)
    )


class ElasticSharedExpert(SharedExpertMLP):
    """The expert that every token goes to."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, *, mask: Tensor | None = None, plan: LayerPlan | None = None
    ) -> Tensor:
        """`[s, b, kept hidden]` -> the same shape; `mask` `[shared_expert_ffn / TP]`, or a plan to run instead."""
        segments = {} if plan is None else plan.segments
        neurons, _ = self.linear_fc1(hidden_states, segments=segments.get(SHARED_FC1))
        out, _ = self.linear_fc2(activations(self, neurons, mask), segments=segments.get(SHARED_FC2))
        return out


class ElasticMoE(MoELayer):
    """Router, dispatcher, routed experts and shared expert on all neurons, with masks, or on a slice of them."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        *,
        masks: Masks | None = None,
        plan: LayerPlan | None = None,
        role: MoeRole | None = None,
    ) -> Tensor:
        """Args:
            hidden_states: normalised input, `[s, b, kept hidden]`.
            masks: of this layer.
            plan: slice to run instead.
            role: of this microbatch; None counts its tokens.

        Returns:
            `[s, b, kept hidden]`.

        Raises:
            ElasticError: in training with tensor parallelism and without sequence parallelism.
        """
        if self.training and self.attn_tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ElasticError(
                "MoE layers train with tensor parallelism only together with --sequence-parallel: add it"
            )
        role = MoeRole(count_tokens=True, loss_weight=1.0) if role is None else role
        of = {} if masks is None else masks.axes
        loss_weight: float | Tensor = role.loss_weight
        if masks is not None:
            # The first channel is in every choice: what is left of it is the layer's own weight. A layer that is masked
            # out has nothing to balance, like one that a slice leaves out.
            loss_weight = loss_weight * masks.residual[0].detach()
        dispatcher = self.token_dispatcher

        def run(x: Tensor, experts: Tensor | None, ffn: Tensor | None, shared_ffn: Tensor | None) -> Tensor:
            probs, routing = self.router(
                x,
                mask=experts,
                segments=None if plan is None else plan.segments["mlp.router.weight"],
                count_tokens=role.count_tokens,
                loss_weight=loss_weight,
            )
            tokens, probs = dispatcher.dispatch_preprocess(x, routing, probs)
            tokens, probs = dispatcher.token_dispatch(tokens, probs)
            routed, _ = self.experts(*dispatcher.dispatch_postprocess(tokens, probs), mask=ffn, plan=plan)
            routed = dispatcher.token_combine(dispatcher.combine_preprocess(routed))
            out: Tensor = dispatcher.combine_postprocess(routed)
            return out if self.shared_experts is None else out + self._shared(x, shared_ffn, plan)

        arguments = hidden_states, of.get("experts"), of.get("expert_ffn"), of.get("shared_expert_ffn")
        if not self.moe_layer_recompute or not self.training:
            return run(*arguments)
        return checkpointed(run, *arguments, config=self.config, layer_number=self.layer_number)

    def _shared(self, x: Tensor, mask: Tensor | None, plan: LayerPlan | None) -> Tensor:
        def run(x: Tensor, mask: Tensor | None) -> Tensor:
            out: Tensor = self.shared_experts(x, mask=mask, plan=plan)
            return out

        if not self.shared_experts_recompute or not self.training:
            return run(x, mask)
        return checkpointed(run, x, mask, config=self.config, layer_number=self.layer_number)


class ElasticMoELayer(MLPLayer):
    """Residual MoE layer on a masked or sliced residual stream."""

    def forward(
        self,
        hidden_states: Tensor,
        *,
        masks: Masks | None,
        plan: LayerPlan | None,
        rotary_pos_emb: Tensor | None = None,
        documents: Tensor | None = None,
        moe: MoeRole | None = None,
    ) -> Tensor:
        """`[s, b, kept hidden]` -> the same shape. `rotary_pos_emb` and `documents` are not used."""
        segments = None if plan is None else plan.segments["pre_mlp_layernorm.weight"]

        def body(x: Tensor) -> Tensor:
            return self.mlp(x, masks=masks, plan=plan, role=moe)

        return residual_branch(
            hidden_states,
            self.pre_mlp_layernorm,
            body,
            masks=masks,
            segments=segments,
            recompute=self.recompute_pre_mlp_layernorm and self.training,
        )
