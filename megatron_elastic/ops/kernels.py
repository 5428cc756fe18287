"""Which operations run as fused kernels: the one place that decides. None of them runs on the CPU.

Triton comes with torch on a GPU machine; mamba-ssm and causal-conv1d are installed or not. Where a kernel is not there
or cannot take the sizes or the type at hand, the operation runs in plain torch on the GPU, with the same result.
"""

import functools
import importlib
import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

SCAN_CHUNK = 128
"""Tokens per chunk of mamba-ssm's scan, as in core."""
CONV_MULTIPLE = 8
"""Channels that causal-conv1d reads at once from channel-last tensors: sizes and strides are multiples of it."""
_CONV_TAPS = range(2, 5)
_HALF = (torch.bfloat16, torch.float16)
_LARGEST_BLOCK = 2**14
"""Channels that one program of a norm holds in registers; in twice as many most would be spilled to memory."""


@functools.cache
def found(module: str) -> Any:
    """A module of an optional package, or None where it is not installed or does not import (which is logged once)."""
    package = module.split(".")[0]
    try:
        if importlib.util.find_spec(package) is None:
            return None
        return importlib.import_module(module)
    except ImportError as error:
        _logger.warning("%s is installed but does not import (%s): torch runs in its place", module, error)
        return None


def scan_kernel(x: Tensor) -> Any:
    """mamba-ssm's `mamba_chunk_scan_combined` for inputs like `x`, or None.

    For half precision alone: its products of fp32 numbers are TF32's, with 10 bits, and torch's scan keeps 23. It takes
    heads, channels of a head, groups and states of any number.
    """
    if not x.is_cuda or x.dtype not in _HALF:
        return None
    module = found("mamba_ssm.ops.triton.ssd_combined")
    return module and module.mamba_chunk_scan_combined


def conv_kernel(x: Tensor, weight: Tensor) -> Any:
    """causal-conv1d's `causal_conv1d_fn` for `x` `[b, l, d]` and `weight` `[d, 1, k]`, or None.

    It takes 2 to 4 taps, numbers of channels that are multiples of `CONV_MULTIPLE` (a rank's inner channels and those
    of B and C together), and more than one token.
    """
    taken = x.dtype in _HALF and x.size(2) % CONV_MULTIPLE == 0 and weight.size(-1) in _CONV_TAPS and x.size(1) > 1
    if not x.is_cuda or not taken:
        return None
    module = found("causal_conv1d")
    return module and module.causal_conv1d_fn


def norms_are_fused(x: Tensor, channels: int) -> bool:
    """Whether norms of `channels` of `x` run as this package's Triton kernels: on a GPU, up to fp32."""
    return channels <= _LARGEST_BLOCK and masks_are_fused(x)


def masks_are_fused(x: Tensor) -> bool:
    """Whether `x` is multiplied with soft masks by this package's Triton kernel: on a GPU, up to fp32."""
    return x.is_cuda and x.dtype is not torch.float64 and found("triton") is not None
