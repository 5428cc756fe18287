"""Selective recompute of a norm: its output is dropped after use, and computed again when the backward comes."""

from collections.abc import Callable

import torch
from megatron.core import tensor_parallel
from torch import Tensor


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
