"""The elastic MLP layer: neurons and hidden channels narrowed."""

from megatron.core import tensor_parallel
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_elastic.axes import Segments
from megatron_elastic.family import LayerPlan
from megatron_elastic.layers.moe_role import MoeRole
from megatron_elastic.layers.recompute import normed
from megatron_elastic.masks import Masks


def neurons(
    mlp: MLP,
    x: Tensor,
    *,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    fc1: tuple[Segments | None, ...] | None = None,
    fc2: tuple[Segments | None, ...] | None = None,
) -> Tensor:
    """Two linears around an activation, gated or not: on all neurons, with a mask, or on a slice of them.

    Args:
        mlp: has elastic linears; where it is gated, a rank has the gate's rows before the others.
        x: `[..., kept hidden]`.
        mask: soft mask of the neurons on this rank, on the activations.
        scale: weight of each token, `[tokens]`.
        fc1, fc2: kept rows and columns of the weights; None uses all of them.

    Returns:
        `[..., kept hidden]`.
    """
    active, _ = mlp.linear_fc1(x, segments=fc1)
    if mlp.config.gated_linear_unit:
        gate, linear = active.chunk(2, dim=-1)
        active = mlp.activation_func(gate) * linear
    else:
        active = mlp.activation_func(active)
    if mask is not None:
        active = active * mask
    if scale is not None:
        active = (active * scale.unsqueeze(-1)).to(active.dtype)
    out, _ = mlp.linear_fc2(active, segments=fc2)
    return out


class ElasticMLP(MLP):
    """The MLP of a layer `-`."""

    def forward(self, hidden_states: Tensor, *, mask: Tensor | None = None, plan: LayerPlan | None = None) -> Tensor:
        """Args:
            hidden_states: normalised input, `[s, b, kept hidden]`.
            mask: soft mask of the neurons, `[ffn / TP]`, on the activations.
            plan: slice to run instead.

        Returns:
            `[s, b, kept hidden]`.
        """
        segments = plan.segments if plan is not None else {}
        fc1, fc2 = segments.get("mlp.linear_fc1.weight"), segments.get("mlp.linear_fc2.weight")
        return neurons(self, hidden_states, mask=mask, fc1=fc1, fc2=fc2)


class ElasticMLPLayer(MLPLayer):
    """Residual MLP layer on a masked or sliced residual stream."""

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
        """`[s, b, kept hidden]` -> the same shape. `rotary_pos_emb`, `documents` and `moe` are not used."""
        segments = None if plan is None else plan.segments["pre_mlp_layernorm.weight"]

        def norm(x: Tensor, width: Tensor | None) -> Tensor:
            return self.pre_mlp_layernorm(x, width=width, segments=segments)

        def body(x: Tensor) -> Tensor:
            mask = None if masks is None else masks.axes["ffn"]
            if not self.recompute_mlp or not self.training:
                return self.mlp(x, mask=mask, plan=plan)
            return tensor_parallel.checkpoint(lambda x, mask: self.mlp(x, mask=mask, plan=plan), False, x, mask)

        width = None if masks is None else masks.hidden.sum()
        out = normed(norm, body, hidden_states, width, recompute=self.recompute_pre_mlp_layernorm and self.training)
        return hidden_states + (out if masks is None else out * masks.residual)
