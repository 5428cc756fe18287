"""A residual branch behind its norm, and what is dropped after use and computed again in the backward."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_elastic.axes import Segments
from megatron_elastic.masks import Masks, effective_width
from megatron_elastic.ops.masking import masked


def layer_precision(config: TransformerConfig, layer_number: int) -> AbstractContextManager[Any]:
    """Core's FP8 context of one layer: none in bf16, and none where `first-last-layers-bf16` leaves the layer in bf16.

    Args:
        config: of the model.
        layer_number: in the whole model, from 1.
    """
    context: AbstractContextManager[Any] = get_fp8_context(config, layer_number - 1)
    return context


def checkpointed(
    run: Callable[..., Tensor], *arguments: Tensor | None, config: TransformerConfig, layer_number: int
) -> Tensor:
    """`run(*arguments)`, computed again in the backward in the layer's precision.

    The backward runs outside of the stack's loop, and so outside of the layer's FP8 context.

    Args:
        run: reads its arguments alone, but for parameters.
        arguments: tensors, or None.
        config, layer_number: as of `layer_precision`.
    """

    def again(*arguments: Tensor | None) -> Tensor:
        with layer_precision(config, layer_number):
            return run(*arguments)

    out: Tensor = tensor_parallel.checkpoint(again, False, *arguments)
    return out


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
