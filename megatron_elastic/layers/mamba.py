"""The elastic Mamba-2 layer: heads narrowed inside their SSM group, hidden channels in and out."""

import torch
import torch.nn.functional as F
from megatron.core.ssm.mamba_layer import MambaLayer
from torch import Tensor

from megatron_elastic.family import SlicePlan
from megatron_elastic.layers.plain import LocalMambaMixer
from megatron_elastic.masks import Masks
from megatron_elastic.ops.causal_conv import causal_conv1d_silu
from megatron_elastic.ops.sliced_parameter import sliced_parameter
from megatron_elastic.ops.ssd import ssd


class ElasticMambaMixer(LocalMambaMixer):
    """Mamba-2 mixer on all heads, with a mask, or on a slice of them."""

    def forward(self, hidden_states: Tensor, *, mask: Tensor | None = None, plan: SlicePlan | None = None) -> Tensor:
        """Args:
            hidden_states: normalised input, `[s, b, kept hidden]`.
            mask: soft mask of the heads, `[heads / TP]`. It is applied once, where the heads' outputs meet (gated norm
                and output projection): at one-hot a masked head adds exactly nothing, and no weight of it gets a
                gradient.
            plan: slice to run instead.

        Returns:
            `[s, b, kept hidden]`.
        """
        segments = plan.segments if plan is not None else {}
        heads = self.nheads_local_tp if plan is None else plan.mamba_heads
        zxbcdt, _ = self.in_proj(hidden_states, segments=segments.get("mixer.in_proj.weight"))
        inner, states = heads * self.headdim, self.ngroups_local_tp * self.d_state
        z, xbc, dt = zxbcdt.transpose(0, 1).split([inner, inner + 2 * states, heads], dim=-1)
        conv = self._parameter("conv1d_weight", plan), self._parameter("conv1d_bias", plan)
        x, b, c = causal_conv1d_silu(xbc, *conv).split([inner, states, states], dim=-1)
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self._parameter("dt_bias", plan).to(wide))
        y = ssd(
            x.unflatten(-1, (heads, self.headdim)),
            dt,
            -torch.exp(self._parameter("A_log", plan).to(wide)),
            b.unflatten(-1, (self.ngroups_local_tp, self.d_state)),
            c.unflatten(-1, (self.ngroups_local_tp, self.d_state)),
            self._parameter("D", plan),
            self.ssd_chunk,
        )
        channels = None if mask is None else mask.repeat_interleave(self.headdim)
        gated = self.norm(y.flatten(-2), z, channels, segments=segments.get("mixer.norm.weight"))
        out, _ = self.out_proj(gated.transpose(0, 1).contiguous(), segments=segments.get("mixer.out_proj.weight"))
        return out

    def _parameter(self, name: str, plan: SlicePlan | None) -> Tensor:
        whole: Tensor = self.get_parameter(name)
        return whole if plan is None else sliced_parameter(whole, *plan.segments[f"mixer.{name}"])


class ElasticMambaLayer(MambaLayer):
    """Residual Mamba-2 layer on a masked or sliced residual stream."""

    def forward(
        self,
        hidden_states: Tensor,
        *,
        masks: Masks | None,
        plan: SlicePlan | None,
        rotary_pos_emb: Tensor | None = None,
    ) -> Tensor:
        """`[s, b, kept hidden]` -> the same shape. `rotary_pos_emb` is not used."""
        if masks is not None:
            normed = self.norm(hidden_states, width=masks.hidden.sum())
            return hidden_states + self.mixer(normed, mask=masks.mamba_heads) * masks.hidden
        normed = self.norm(hidden_states, segments=None if plan is None else plan.segments["norm.weight"])
        return hidden_states + self.mixer(normed, plan=plan)
