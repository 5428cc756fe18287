"""Gated RMS norm of Mamba-2, per group of channels, with a mask over the channels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_elastic.ops import kernels
from megatron_elastic.ops.norm import rms_norm


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, mask: Tensor | None = None) -> Tensor:
    """RMS norm of `u = y * silu(z) * mask` inside each group of `d / groups` channels, computed in at least fp32.

    On a GPU it is one kernel each way.

    The mean square divides by the mask's sum inside the group, so that a prefix mask in every group is exactly the norm
    of the sliced channels.  A group whose mask is all zero gives zeros.

    Args:
        y: output of the scan, `[..., d]`.
        z: gate, `[..., d]`.
        weight: `[d]`.
        groups: number of groups; divides `d`.
        eps: added to the mean square.
        mask: `[d]`, or None for all ones.

    Returns:
        `[..., d]` in the dtype of `y`.

    Raises:
        ValueError: `groups` does not divide `d`.

    Source: Dao and Gu (arXiv 2405.21060), the normalisation before the output projection, gate first.
    """
    channels = y.size(-1)
    if groups < 1 or channels % groups:
        raise ValueError(f"{channels} channels do not divide into {groups} groups; use a divisor of the channels")
    if kernels.norms_are_fused(y, channels // groups):
        from megatron_elastic.ops import triton_gated_norm

        return triton_gated_norm.gated_rms_norm(y, z, weight, groups, eps, mask)
    compute = torch.promote_types(y.dtype, torch.float32)
    u = y.to(compute) * F.silu(z.to(compute))
    if mask is None:
        grouped = rms_norm(_split(u, groups), _split(weight, groups), eps)
    else:
        kept = mask.to(compute)
        # The clamp only meets groups without any kept channel, whose sum of squares is 0.
        width = _split(kept, groups).sum(-1, keepdim=True).clamp_min(torch.finfo(compute).tiny)
        grouped = rms_norm(_split(u * kept, groups), _split(weight, groups), eps, width)
    return grouped.flatten(-2).to(y.dtype)


def _split(t: Tensor, groups: int) -> Tensor:
    return t.reshape(*t.shape[:-1], groups, -1)


def gated_rms_norm_ref(
    y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, mask: Tensor | None = None
) -> Tensor:
    """`gated_rms_norm` one group at a time; shapes as there."""
    compute = torch.promote_types(y.dtype, torch.float32)
    size = y.size(-1) // groups
    outputs = []
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        u = y[..., part].to(compute) * z[..., part].to(compute) * torch.sigmoid(z[..., part].to(compute))
        width = torch.tensor(size, dtype=compute, device=y.device)
        if mask is not None:
            u, width = u * mask[part].to(compute), mask[part].to(compute).sum()
        mean = (u * u).sum(-1, keepdim=True) / width
        outputs.append(u / torch.sqrt(mean + eps) * weight[part].to(compute))
    return torch.cat(outputs, -1).to(y.dtype)
