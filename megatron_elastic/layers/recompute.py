"""A residual branch behind its norm, whose output may be dropped after use and computed again in the backward."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_elastic.axes import Segments
from megatron_elastic.masks import Masks, effective_width
from megatron_elastic.ops.masking import masked


def normed(
    norm: Callable[[Tensor, Tensor | None], Tensor],
    body: Callable[[Tensor], Tensor],
    x: Tensor,
    width: Tensor | None,
    *,
    recompute: bool,
) -> Tensor:
    """`body(norm(x, width))`.

    Args:
        norm: of the layer.
        body: what reads the norm's output.
        x: `[s, b, kept hidden]`.
        width: effective width under a mask, or None. An argument: a graph that the norm captured would be walked once a
            layer, and it can be walked once only.
        recompute: do not keep the norm's output (core's `recompute_modules` has `layernorm`).

    Returns:
        What `body` returns, in its shape.
    """
    if not recompute or not torch.is_grad_enabled():
        return body(norm(x, width))
    kept = tensor_parallel.CheckpointWithoutOutput(fp8=None)  # core takes False for yes
    out = body(kept.checkpoint(norm, x, width))
    kept.discard_output_and_register_recompute(out)
    return out


def residual_branch(
    x: Tensor,
    norm: Any,
    body: Callable[[Tensor], Tensor],
    *,
    masks: Masks | None,
    segments: tuple[Segments | None, ...] | None,
    recompute: bool,
) -> Tensor:
    """`x + body(norm(x))` on a masked or sliced residual stream.

    Args:
        x: `[s, b, kept hidden]`.
        norm: the layer's `ElasticRMSNorm`.
        body: what reads the norm's output.
        masks: of the layer, on the norm's width and on what is added; None without.
        segments: kept entries of the norm's weight.
        recompute: as in `normed`.
    """

    def normalised(x: Tensor, width: Tensor | None) -> Tensor:
        found: Tensor = norm(x, width=width, segments=segments)
        return found

    width = None if masks is None else effective_width(masks.hidden)
    out = normed(normalised, body, x, width, recompute=recompute)
    return x + out if masks is None else masked(out, masks.residual, x)
