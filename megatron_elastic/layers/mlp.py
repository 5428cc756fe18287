"""The elastic MLP layer: neurons and hidden channels narrowed."""

from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_elastic.family import SlicePlan
from megatron_elastic.masks import Masks


class ElasticMLP(MLP):
    """Two linears around an elementwise activation, on all neurons, with a mask, or on a slice of them."""

    def forward(self, hidden_states: Tensor, *, mask: Tensor | None = None, plan: SlicePlan | None = None) -> Tensor:
        """Args:
            hidden_states: normalised input, `[s, b, kept hidden]`.
            mask: soft mask of the neurons, `[ffn / TP]`, on the activations.
            plan: slice to run instead.

        Returns:
            `[s, b, kept hidden]`.
        """
        segments = plan.segments if plan is not None else {}
        neurons, _ = self.linear_fc1(hidden_states, segments=segments.get("mlp.linear_fc1.weight"))
        active = self.activation_func(neurons)
        if mask is not None:
            active = active * mask
        out, _ = self.linear_fc2(active, segments=segments.get("mlp.linear_fc2.weight"))
        return out


class ElasticMLPLayer(MLPLayer):
    """Residual MLP layer on a masked or sliced residual stream."""

    def forward(
        self,
        hidden_states: Tensor,
        *,
        masks: Masks | None,
        plan: SlicePlan | None,
        rotary_pos_emb: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """`[s, b, kept hidden]` -> the same shape. `rotary_pos_emb` and `documents` are not used."""
        if masks is not None:
            normed = self.pre_mlp_layernorm(hidden_states, width=masks.hidden.sum())
            return hidden_states + self.mlp(normed, mask=masks.ffn) * masks.hidden
        normed = self.pre_mlp_layernorm(
            hidden_states, segments=None if plan is None else plan.segments["pre_mlp_layernorm.weight"]
        )
        return hidden_states + self.mlp(normed, plan=plan)
