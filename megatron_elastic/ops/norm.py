"""RMS norm that sees the effective width of a masked hidden state."""

import torch
from torch import Tensor

from megatron_elastic.ops import kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float, width: Tensor | None = None) -> Tensor:
    """`x * rsqrt(sum(x^2) / width + eps) * weight`, computed in at least fp32; on a GPU one kernel each way.

    With `x` multiplied by a one-hot choice of prefix mask and `width` the sum of that mask this is exactly the norm of
    the sliced channels; a soft mask interpolates, and the gradient reaches `width`.

    Args:
        x: `[..., h]`, already masked.
        weight: `[h]`.
        eps: added to the mean square.
        width: effective number of channels, 0-dim (or broadcast against `[..., 1]`); None for `h`.

    Returns:
        `[..., h]` in the dtype of `x`.
    """
    if (width is None or width.numel() == 1) and weight.dim() == 1 and kernels.norms_are_fused(x, x.size(-1)):
        from megatron_elastic.ops import triton_norm

        return triton_norm.rms_norm(x, weight, eps, width)
    compute = torch.promote_types(x.dtype, torch.float32)
    values = x.to(compute)
    total = torch.linalg.vector_norm(values, dim=-1, keepdim=True).square()
    mean = total / (x.size(-1) if width is None else width.to(compute))
    return (values * torch.rsqrt(mean + eps) * weight.to(compute)).to(x.dtype)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, width: Tensor | None = None) -> Tensor:
    """`rms_norm` one token at a time; shapes as there."""
    compute = torch.promote_types(x.dtype, torch.float32)
    channels = torch.tensor(x.size(-1)) if width is None else width
    rows = [
        row * weight.to(compute) / torch.sqrt((row * row).sum() / channels.to(compute) + eps)
        for row in x.to(compute).reshape(-1, x.size(-1))
    ]
    return torch.stack(rows).view(x.shape).to(x.dtype)
