"""The elastic top-k router: tokens go to the experts that a submodel keeps.

Core's score functions, top-k and balancing losses stay; what goes out is over all experts of the parent, so that core's
dispatchers run unchanged. An expert that is cut gets no token.
"""

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    get_tokens_per_expert_and_token_count,
    router_gating_linear,
    switch_load_balancing_loss_func,
    topk_routing_with_score_function,
    z_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_elastic.axes import Segments
from megatron_elastic.ops.sliced_parameter import sliced_parameter

_SMALLEST_SUM = 1e-20
"""What core adds to the sum of a token's scores before it divides by it."""

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class ElasticRouter(TopKRouter):
    """`TopKRouter` over all experts, over a slice of them, or with a soft mask `m` of them.

    Soft, an expert's share of a softmax is `m * exp(logit)`, and its score under a sigmoid `m * sigmoid(logit)`; it is
    chosen by its logit, or its score and bias, plus `log(m)`. With `m` of zeros and ones that is the slice.
    """

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        *,
        mask: Tensor | None = None,
        segments: tuple[Segments | None, ...] | None = None,
        count_tokens: bool = True,
        loss_weight: float | Tensor = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Args:
            input: normalised, `[s, b, kept hidden]`; with sequence parallelism this rank's tokens.
            mask: soft mask of all experts, `[E]`.
            segments: kept rows and columns of the weight; None uses all of it.
            count_tokens: whether these tokens move the experts' biases.
            loss_weight: of the balancing losses.

        Returns:
            Combine weights `[tokens, E]`, and which experts a token goes to, `[tokens, E]` bool.
        """
        self._maintain_float32_expert_bias()
        weight: Tensor = self.weight if segments is None else sliced_parameter(self.weight, *segments)
        dtype = _DTYPES.get(self.config.moe_router_dtype or "", input.dtype)
        logits: Tensor = router_gating_linear(input, weight, None, dtype)
        length, logits = logits.size(0), logits.flatten(0, 1)
        training = self.training and torch.is_grad_enabled()
        # Balancing losses train the gate and see the mask as given: they are no reason to keep or cut an expert.
        seen = None if mask is None else mask.detach()
        if training and self.config.moe_z_loss_coeff is not None:
            logits = self._with_z_loss(logits, seen, loss_weight)
        experts = None if segments is None else segments[0]
        if mask is not None and self.score_function != "softmax":
            probs, routing = self._masked(logits, mask)
        else:
            probs, routing = topk_routing_with_score_function(
                logits if mask is None else logits + _logarithm(mask, logits),
                self.topk,
                use_pre_softmax=self.config.moe_router_pre_softmax,
                scaling_factor=self.config.moe_router_topk_scaling_factor,
                score_function=self.score_function,
                expert_bias=_kept(self.expert_bias, experts),
            )
        if training and self.is_aux_loss_enabled():
            probs = self._with_balancing_losses(probs, logits, seen, length, loss_weight)
        if experts is not None:
            probs, routing = (_among_all(each, experts, len(self.weight)) for each in (probs, routing))
        if self.enable_expert_bias and count_tokens and torch.is_grad_enabled():
            with torch.no_grad():
                self.local_tokens_per_expert += routing.sum(dim=0)
        return probs, routing

    def _scores(self, logits: Tensor) -> Tensor:
        """Scores without a softmax, fp32 as in core."""
        if self.score_function == "sigmoid":
            return torch.sigmoid(logits.float())
        return torch.nn.functional.softplus(logits.float()).sqrt()

    def _masked(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Core's top-k of scores without a softmax, with a soft mask."""
        scores = self._scores(logits)
        with torch.no_grad():
            key = scores + _logarithm(mask, scores)
            if self.expert_bias is not None:
                key = key + self.expert_bias
            indices = torch.topk(key, self.topk, dim=1).indices
        chosen = (scores * _of_each_token(mask, scores)).gather(1, indices)
        if self.topk > 1:
            chosen = chosen / (chosen.sum(dim=-1, keepdim=True) + _SMALLEST_SUM)
        if self.config.moe_router_topk_scaling_factor:
            chosen = chosen * self.config.moe_router_topk_scaling_factor
        probs = torch.zeros_like(logits).scatter(1, indices, chosen.type_as(logits))
        return probs, torch.zeros_like(logits, dtype=torch.bool).scatter(1, indices, True)

    def _with_z_loss(self, logits: Tensor, mask: Tensor | None, weight: float | Tensor) -> Tensor:
        """Core's z-loss of the experts there are, attached to the logits; scaled as core scales it."""
        coefficient = self.config.moe_z_loss_coeff / self.tp_cp_group.size()
        loss = weight * z_loss_func(logits if mask is None else logits + _logarithm(mask, logits), coefficient)
        tokens = len(logits) * self.tp_cp_group.size() if self.calculate_per_token_loss else 1
        get_moe_metrics_tracker().record(
            "z_loss", loss / coefficient, self.layer_number, self.config.num_layers, avg_group=self.tp_dp_cp_group
        )
        attached: Tensor = MoEAuxLossAutoScaler.apply(logits, loss * tokens)  # type: ignore[no-untyped-call]
        return attached

    def _with_balancing_losses(
        self, probs: Tensor, logits: Tensor, mask: Tensor | None, length: int, weight: float | Tensor
    ) -> Tensor:
        """Core's auxiliary losses of the experts there are, attached to the combine weights."""
        count: Tensor | int = logits.size(1) if mask is None else mask.sum()
        if mask is not None and self.score_function != "softmax":
            scores = self._scores(logits) * _of_each_token(mask, logits).float()
            scores = scores / (scores.sum(dim=-1, keepdim=True) + _SMALLEST_SUM)
            indices = torch.topk(scores, self.topk, dim=1).indices
            routing = torch.zeros_like(scores, dtype=torch.bool).scatter(1, indices, True)
        else:
            if mask is not None:
                logits = logits + _logarithm(mask, logits)
            routing, scores = compute_routing_scores_for_aux_loss(logits, self.topk, self.score_function)
        batch = len(scores) // length
        for kind, name, sequences in (
            ("aux_loss", "load_balancing_loss", 1),
            ("seq_aux_loss", "seq_load_balancing_loss", batch),
        ):
            coefficient = self.get_aux_loss_coeff(kind)
            if not coefficient:
                continue
            # The loss of each sequence: its experts stand beside those of the other sequences, as in core.
            rows = length if sequences > 1 else len(scores)
            per_expert, local, total = get_tokens_per_expert_and_token_count(
                routing_map=routing.reshape(rows, -1), reduce_group=self.tp_cp_group, topk=self.topk * sequences
            )
            loss = switch_load_balancing_loss_func(
                probs=scores.reshape(rows, -1),
                tokens_per_expert=per_expert,
                total_num_tokens=total,
                topk=self.topk,
                num_experts=count,
                moe_aux_loss_coeff=coefficient,
            )
            probs = self.attach_and_log_load_balancing_loss(
                probs,
                coefficient,
                loss * (weight / sequences),
                name,
                self.tp_cp_group,
                valid_token_count=local * sequences,
            )
        return probs


def _of_each_token(mask: Tensor, like: Tensor) -> Tensor:
    """`[E]` -> `[tokens, E]` in another type; its gradient is summed over tokens in the mask's own."""
    return mask.expand_as(like).to(like.dtype)


def _logarithm(mask: Tensor, like: Tensor) -> Tensor:
    """Logarithm of a mask for every token, minus infinity where it is 0, where it has no gradient."""
    value = _of_each_token(mask, like)
    cut = value == 0
    return value.masked_fill(cut, 1.0).log().masked_fill(cut, -torch.inf)


def _kept(tensor: Tensor | None, experts: Segments | None) -> Tensor | None:
    """Entries of the kept experts."""
    if tensor is None or experts is None:
        return tensor
    return torch.cat([tensor[start:stop] for start, stop in experts])


def _among_all(kept: Tensor, experts: Segments, count: int) -> Tensor:
    """`[tokens, kept experts]` -> `[tokens, count]`, zeros for the others."""
    pieces, end, taken = [], 0, 0
    for start, stop in (*experts, (count, count)):
        if start > end:
            pieces.append(kept.new_zeros(len(kept), start - end))
        pieces.append(kept[:, taken : taken + stop - start])
        end, taken = stop, taken + stop - start
    return torch.cat(pieces, dim=1)
