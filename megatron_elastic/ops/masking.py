"""Product with a soft mask, and the residual stream that it is added to."""

import torch
from torch import Tensor

from megatron_elastic.ops import kernels


def masked(values: Tensor, mask: Tensor, residual: Tensor | None = None) -> Tensor:
    """`values * mask`, plus `residual` where it is given; on a GPU one kernel each way, computed in fp32.

    Args:
        values: `[..., d]`.
        mask: `[d]`; its gradient is a sum over all rows.
        residual: `[..., d]` or None.

    Returns:
        `[..., d]` in the dtype of `values`.
    """
    if kernels.masks_are_fused(values) and mask.dim() == 1:
        from megatron_elastic.ops import triton_masking

        return triton_masking.masked(values, mask, residual)
    product = values * mask
    return product if residual is None else residual + product


def masked_ref(values: Tensor, mask: Tensor, residual: Tensor | None = None) -> Tensor:
    """`masked` one row at a time; shapes as there."""
    compute = torch.promote_types(values.dtype, torch.float32)
    rows = [row * mask.to(compute) for row in values.to(compute).reshape(-1, values.size(-1))]
    product = torch.stack(rows).view(values.shape)
    return (product if residual is None else residual.to(compute) + product).to(values.dtype)
