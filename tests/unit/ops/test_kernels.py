"""How mamba-ssm's and causal-conv1d's kernels are called, and when they are not.

The stand-ins take what the packages' functions take, refuse what those refuse, and compute by the references here.
mamba-ssm 2.3.2's own kernels, in fp32 in Triton's interpreter, gave the recurrence's results to 1e-6.
"""

import importlib.util
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_elastic.ops import kernels
from megatron_elastic.ops.causal_conv import causal_conv1d_silu, causal_conv1d_silu_ref
from megatron_elastic.ops.gated_norm import gated_rms_norm, gated_rms_norm_ref
from megatron_elastic.ops.masking import masked, masked_ref
from megatron_elastic.ops.norm import rms_norm, rms_norm_ref
from megatron_elastic.ops.ssd import ssd, ssd_ref

# fp64 sums of some hundred terms of size one.
EXACT = {"rtol": 1e-11, "atol": 1e-12}
DOCUMENTS = torch.tensor([[0, 0, 1, 2, 2, 2, 2, 2, 7], [0, 0, 0, 0, 0, 0, 3, 3, 3]])
CALLS: list[dict[str, Any]] = []


def chunk_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, **how: Any) -> Tensor:
    """`mamba_chunk_scan_combined` with the options that are used."""
    assert set(how) == {"D", "seq_idx"}
    assert chunk_size & (chunk_size - 1) == 0
    CALLS.append(how)
    return ssd_ref(x, dt, A, B, C, how["D"], how["seq_idx"])


def conv1d(x: Tensor, weight: Tensor, bias: Tensor, *, seq_idx: Tensor | None, activation: str) -> Tensor:
    """`causal_conv1d_fn` with what its C++ checks for channel-last tensors, and that 16 bytes are read at once."""
    assert activation == "silu"
    assert weight.shape == (x.size(1), 4)
    assert x.stride(1) == 1
    assert x.stride(2) > 1
    assert not any(number % 8 for number in (x.size(1), x.stride(0), x.stride(2), x.storage_offset()))
    if seq_idx is not None:
        assert seq_idx.dtype is torch.int32
        assert seq_idx.shape == (x.size(0), x.size(2))
    CALLS.append({"x": x, "seq_idx": seq_idx})
    return causal_conv1d_silu_ref(x.transpose(1, 2), weight[:, None], bias, seq_idx).transpose(1, 2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    CALLS.clear()


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_scan_is_called_with_what_it_takes(monkeypatch: pytest.MonkeyPatch, documents: Tensor | None) -> None:
    x, B, C = normal(2, 9, 4, 3), normal(2, 9, 2, 5, seed=1), normal(2, 9, 2, 5, seed=2)
    dt, A, D = normal(2, 9, 4, seed=3).exp(), -normal(4, seed=4).exp(), normal(4, seed=5)
    inputs = [t.requires_grad_() for t in (x, dt, A, B, C, D)]
    torch_only = ssd(*inputs, 4, documents)
    monkeypatch.setattr(kernels, "scan_kernel", lambda x: chunk_scan)
    fused = ssd(*inputs, 4, documents)
    torch.testing.assert_close(fused, torch_only, **EXACT)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), inputs) for y in (fused, torch_only)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    (how,) = CALLS
    assert (how["seq_idx"] is None) == (documents is None)
    if documents is not None:
        assert how["seq_idx"].dtype is torch.int32
        assert not torch.allclose(ssd(*inputs, 4, None), fused, **EXACT)


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize(
    ("before", "after", "copied"), [(0, 0, False), (8, 16, False), (4, 4, True), (8, 3, True)], ids=str
)
def test_convolution_is_called_with_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, documents: Tensor | None, before: int, after: int, copied: bool
) -> None:
    """Channels inside a packed projection `[s, b, ...]`, wherever its kernel could not read them."""
    packed = normal(9, 2, before + 16 + after)
    x = packed.transpose(0, 1)[..., before : before + 16].requires_grad_()
    inputs = [x, normal(16, 1, 4, seed=1).requires_grad_(), normal(16, seed=2).requires_grad_()]
    torch_only = causal_conv1d_silu(*inputs, documents)
    monkeypatch.setattr(kernels, "conv_kernel", lambda x, weight: conv1d)
    fused = causal_conv1d_silu(*inputs, documents)
    torch.testing.assert_close(fused, torch_only, **EXACT)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), inputs) for y in (fused, torch_only)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    (how,) = CALLS
    assert (how["x"].data_ptr() != x.data_ptr()) is copied
    if documents is not None:
        assert not torch.allclose(causal_conv1d_silu(*inputs, None), fused, **EXACT)


def test_norms_and_masks_are_called_with_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_elastic.ops import triton_gated_norm, triton_masking, triton_norm

    y, z, weight, mask = normal(3, 2, 8), normal(3, 2, 8, seed=1), normal(8, seed=2), normal(8, seed=3).sigmoid()

    def results() -> list[Tensor]:
        return [
            rms_norm(y, weight, 1e-5), rms_norm(y, weight, 1e-5, mask.sum()), masked(y, mask), masked(y, mask, z),
            gated_rms_norm(y, z, weight, 2, 1e-5), gated_rms_norm(y, z, weight, 2, 1e-5, mask),
        ]  # fmt: skip

    torch_only = results()
    monkeypatch.setattr(kernels, "norms_are_fused", lambda x, channels: True)
    monkeypatch.setattr(kernels, "masks_are_fused", lambda x: True)
    called = []
    for module, reference in (
        (triton_norm, rms_norm_ref), (triton_gated_norm, gated_rms_norm_ref), (triton_masking, masked_ref),
    ):  # fmt: skip
        name = reference.__name__.removesuffix("_ref")
        monkeypatch.setattr(module, name, lambda *t, call=reference: called.append(call) or call(*t))
    for a, b in zip(results(), torch_only, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    assert len(called) == len(torch_only)
    assert not torch.allclose(torch_only[0], torch_only[1], **EXACT)


def on_gpu(*size: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What the choice of a kernel looks at."""
    return SimpleNamespace(is_cuda=True, dtype=dtype, size=lambda number: size[number])


def test_kernels_are_chosen_by_device_type_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(mamba_chunk_scan_combined=chunk_scan, causal_conv1d_fn=conv1d)
    monkeypatch.setattr(kernels, "found", lambda name: module)
    weight = torch.empty(48, 1, 4)
    assert kernels.scan_kernel(on_gpu()) is chunk_scan
    assert kernels.conv_kernel(on_gpu(2, 9, 48), weight) is conv1d
    assert kernels.norms_are_fused(on_gpu(dtype=torch.float32), 4096)
    for other in (torch.float32, torch.float64):
        assert kernels.scan_kernel(on_gpu(dtype=other)) is None
        assert kernels.conv_kernel(on_gpu(2, 9, 48, dtype=other), weight) is None
    assert kernels.scan_kernel(torch.empty(2, dtype=torch.bfloat16)) is None
    assert kernels.conv_kernel(torch.empty(2, 9, 48, dtype=torch.bfloat16), weight) is None
    assert kernels.conv_kernel(on_gpu(2, 9, 44), weight) is None
    assert kernels.conv_kernel(on_gpu(2, 1, 48), weight) is None
    assert kernels.conv_kernel(on_gpu(2, 9, 48), torch.empty(48, 1, 5)) is None
    assert not kernels.norms_are_fused(torch.empty(2), 2)
    assert not kernels.norms_are_fused(on_gpu(dtype=torch.float64), 2)
    assert not kernels.norms_are_fused(on_gpu(), 2**16)
    assert kernels.masks_are_fused(on_gpu())
    assert not kernels.masks_are_fused(torch.empty(2))
    monkeypatch.setattr(kernels, "found", lambda name: None)
    assert kernels.scan_kernel(on_gpu()) is None
    assert kernels.conv_kernel(on_gpu(2, 9, 48), weight) is None
    assert not kernels.norms_are_fused(on_gpu(), 2)


def test_a_package_that_does_not_import_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol")

    kernels.found.cache_clear()
    assert kernels.found("no_such_package.kernels") is None
    assert not caplog.records
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", broken)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert kernels.found("causal_conv1d") is None
    (record,) = caplog.records
    assert "causal_conv1d is installed but does not import (undefined symbol)" in record.getMessage()
    kernels.found.cache_clear()
