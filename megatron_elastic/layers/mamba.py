"""The elastic Mamba-2 layer: heads narrowed inside their SSM group, hidden channels in and out."""

from megatron.core.ssm.mamba_context_parallel import MambaContextParallel
from megatron.core.ssm.mamba_layer import MambaLayer
from torch import Tensor

from megatron_elastic.family import LayerPlan
from megatron_elastic.layers.moe_role import MoeRole
from megatron_elastic.layers.plain import LocalMambaMixer
from megatron_elastic.masks import Masks, effective_width
from megatron_elastic.ops.masking import masked
from megatron_elastic.ops.sliced_parameter import sliced_parameter


class ElasticMambaMixer(LocalMambaMixer):
    """Mamba-2 mixer on all heads, with a mask, or on a slice of them."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        *,
        mask: Tensor | None = None,
        plan: LayerPlan | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Args:
            hidden_states: normalised input, `[s, b, kept hidden]`, `s` being this rank's tokens.
            mask: soft mask of the inner channels, `[inner / TP]`. It is applied once, where the heads' outputs meet
                (gated norm and output projection): at one-hot a masked channel adds exactly nothing, and no weight of
                it gets a gradient.
            plan: slice to run instead.
            documents: of the whole sequence, `[b, s * CP]`, or None.

        Returns:
            `[s, b, kept hidden]`.
        """
        segments = plan.segments if plan is not None else {}
        zxbcdt, _ = self.in_proj(hidden_states, segments=segments.get("mixer.in_proj.weight"))
        # Afterwards: weights are used, and their gradients come, in the order of the layout (see `stack._skip`).
        cp = self.cp if plan is None else self._sliced(plan)
        y, z = self.scan(cp.pre_conv_ssm(zxbcdt), cp, documents)
        # The norm runs where a rank has all channels again: its groups, mask and weight are as without CP.
        gated = self.norm(cp.post_conv_ssm(y), cp.post_conv_ssm(z), mask, segments=segments.get("mixer.norm.weight"))
        out, _ = self.out_proj(gated.contiguous(), segments=segments.get("mixer.out_proj.weight"))
        return out

    def _sliced(self, plan: LayerPlan) -> MambaContextParallel:
        """Core's split of the mixer over context-parallel ranks, for the heads and parameters that a plan keeps."""

        def kept(name: str) -> Tensor:
            return sliced_parameter(self.get_parameter(name), *plan.segments[f"mixer.{name}"])

        return MambaContextParallel(
            cp_group=self.pg_collection.cp,
            d_inner_local_tp=plan.sizes["mamba_heads"] * plan.sizes["mamba_head_dim"],
            nheads_local_tp=plan.sizes["mamba_heads"],
            ngroups_local_tp=self.ngroups_local_tp,
            d_state=self.d_state,
            conv1d_weight_cp1=kept("conv1d_weight"),
            conv1d_bias_cp1=kept("conv1d_bias"),
            conv1d_padding=self.d_conv - 1,
            dt_bias_cp1=kept("dt_bias"),
            A_log_cp1=kept("A_log"),
            D_cp1=kept("D"),
            D_has_hdim=False,
        )


class ElasticMambaLayer(MambaLayer):
    """Residual Mamba-2 layer on a masked or sliced residual stream."""

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
        """`[s, b, kept hidden]` -> the same shape. `rotary_pos_emb` and `moe` are not used."""
        if masks is not None:
            normed = self.norm(hidden_states, width=effective_width(masks.hidden))
            channels = (masks.axes["mamba_heads"][:, None] * masks.axes["mamba_head_dim"]).flatten()
            out = self.mixer(normed, mask=channels, documents=documents)
            return masked(out, masks.residual, hidden_states)
        normed = self.norm(hidden_states, segments=None if plan is None else plan.segments["norm.weight"])
        return hidden_states + self.mixer(normed, plan=plan, documents=documents)
