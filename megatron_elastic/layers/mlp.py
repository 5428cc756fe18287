"""The elastic MLP layer: neurons and hidden channels narrowed."""

from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_elastic.family import LayerPlan
from megatron_elastic.layers.moe_role import MoeRole
from megatron_elastic.layers.recompute import checkpointed, residual_branch
from megatron_elastic.masks import Masks
from megatron_elastic.ops.masking import masked


def activations(mlp: MLP, neurons: Tensor, mask: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """What goes from the first linear of an MLP or an expert to the second.

    Args:
        mlp: gated or not; where it is gated, a rank has the gate's neurons before the others.
        neurons: `[..., kept neurons]`, twice as many where it is gated.
        mask: soft mask of the neurons on this rank.
        scale: weight of each token, `[tokens]`.

    Returns:
        `[..., kept neurons]`.
    """
    if mlp.config.gated_linear_unit:
        gate, linear = neurons.chunk(2, dim=-1)
        active: Tensor = mlp.config.activation_func(gate) * linear
    else:
        active = mlp.config.activation_func(neurons)
    if mask is not None:
        active = masked(active, mask)
    return active if scale is None else (active * scale.unsqueeze(-1)).to(active.dtype)


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
        neurons, _ = self.linear_fc1(hidden_states, segments=fc1)
        out, _ = self.linear_fc2(activations(self, neurons, mask), segments=fc2)
        return out


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

        def body(x: Tensor) -> Tensor:
            mask = None if masks is None else masks.axes["ffn"]
            if not self.recompute_mlp or not self.training:
                return self.mlp(x, mask=mask, plan=plan)

            def run(x: Tensor, mask: Tensor | None) -> Tensor:
                return self.mlp(x, mask=mask, plan=plan)

            return checkpointed(run, x, mask, config=self.config, layer_number=self.layer_number)

        return residual_branch(
            hidden_states,
            self.pre_mlp_layernorm,
            body,
            masks=masks,
            segments=segments,
            recompute=self.recompute_pre_mlp_layernorm and self.training,
        )
