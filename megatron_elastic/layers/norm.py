"""Norms that see the effective width of what they normalise."""

from torch import Tensor

from megatron_elastic.axes import Segments
from megatron_elastic.layers.plain import GatedNorm, LocalRMSNorm
from megatron_elastic.ops.gated_norm import gated_rms_norm
from megatron_elastic.ops.norm import rms_norm
from megatron_elastic.ops.sliced_parameter import sliced_parameter


class ElasticRMSNorm(LocalRMSNorm):
    """RMSNorm of a masked or sliced residual stream."""

    def forward(
        self,
        x: Tensor,
        *,
        width: Tensor | None = None,
        segments: tuple[Segments | None, ...] | None = None,
    ) -> Tensor:
        """Args:
        x: `[s, b, kept hidden]`; already multiplied by the mask where it is soft.
        width: effective width, the sum of the mask (0-dim); None divides by the channels there are.
        segments: kept entries of the weight.
        """
        weight: Tensor = self.weight if segments is None else sliced_parameter(self.weight, *segments)
        return rms_norm(x, weight, self.eps, width)


class ElasticGatedNorm(GatedNorm):
    """Gated RMSNorm inside each SSM group: every group keeps the same number of heads."""

    def forward(
        self,
        y: Tensor,
        z: Tensor,
        mask: Tensor | None = None,
        *,
        segments: tuple[Segments | None, ...] | None = None,
    ) -> Tensor:
        """Args:
        y, z: SSM output and gate, `[..., kept inner / TP]`.
        mask: soft mask of the inner channels, `[inner / TP]`.
        segments: kept entries of the weight.
        """
        weight: Tensor = self.weight if segments is None else sliced_parameter(self.weight, *segments)
        return gated_rms_norm(y, z, weight, self.groups, self.eps, mask)
