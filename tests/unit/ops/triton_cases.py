"""The Triton kernels against their references in fp64; run by test_triton.py under Triton's interpreter.

Tolerances: fp32 sums of at most 60 terms of size one, carried through a root and products: 1e-5 of the largest value.
In bfloat16 inputs are the same numbers on both sides; the interpreter cuts results to 8 bits where a GPU rounds them.
"""

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from megatron_elastic.ops import triton_masking, triton_rows
from megatron_elastic.ops.gated_norm import gated_rms_norm_ref
from megatron_elastic.ops.masking import masked_ref
from megatron_elastic.ops.norm import rms_norm_ref
from megatron_elastic.ops.triton_gated_norm import gated_rms_norm
from megatron_elastic.ops.triton_norm import rms_norm

assert os.environ["TRITON_INTERPRET"] == "1", "these kernels run on the CPU in Triton's interpreter alone"

EPS = 1e-5
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
Op = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fewer than rows, so that a program has several; one program's share is larger than another's.
    for module in ("triton_norm", "triton_gated_norm", "triton_masking"):
        monkeypatch.setattr(f"megatron_elastic.ops.{module}.PROGRAMS", 4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def worst(found: Tensor, expected: Tensor) -> float:
    assert found.isfinite().all()
    assert found.shape == expected.shape
    return float((found.double() - expected).abs().max() / expected.abs().max())


def errors(op: Op, reference: Op, inputs: Sequence[Tensor]) -> list[float]:
    """Of the result and of every gradient, in the units of the reference's largest value."""
    low = [t.detach().requires_grad_() for t in inputs]
    high = [t.detach().double().requires_grad_() for t in inputs]
    found, expected = op(*low), reference(*high)
    assert found.dtype == inputs[0].dtype
    upstream = normal(*found.shape, seed=99).to(found.dtype)
    gradients = torch.autograd.grad((found * upstream).sum(), low)
    wanted = torch.autograd.grad((expected * upstream.double()).sum(), high)
    assert [g.dtype for g in gradients] == [t.dtype for t in inputs]
    pairs = [(found.detach(), expected.detach()), *zip(gradients, wanted, strict=True)]
    return [worst(a, b) for a, b in pairs]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("channels", [48, 60])
def test_norm_with_an_effective_width(dtype: torch.dtype, channels: int) -> None:
    x, weight = normal(3, 2, channels).to(dtype), (normal(channels, seed=1) + 2).to(dtype)
    width = torch.tensor(channels - 9.5)

    def by(op: Op, more: float = 0.0) -> Op:
        return lambda x, w, n: op(x, w, EPS, n + more)

    assert max(errors(by(rms_norm), by(rms_norm_ref), [x, weight, width])) < TOLERANCES[dtype]
    assert min(errors(by(rms_norm, 1.0), by(rms_norm_ref), [x, weight, width])) > 10 * TOLERANCES[torch.float32]


def test_norm_of_all_channels() -> None:
    x, weight = normal(7, 33), normal(33, seed=1)
    assert max(errors(lambda *t: rms_norm(*t, EPS), lambda *t: rms_norm_ref(*t, EPS), [x, weight])) < 1e-5
    assert max(errors(lambda *t: rms_norm(*t, 0.1), lambda *t: rms_norm_ref(*t, EPS), [x, weight])) > 1e-3


def test_norm_of_one_channel_and_of_no_row() -> None:
    x, weight = normal(5, 1), normal(1, seed=1)
    # The result does not depend on x but for its sign and eps: its gradient is 1e-5 of two terms that cancel.
    found = rms_norm(x, weight, EPS)
    assert worst(found, rms_norm_ref(x.double(), weight.double(), EPS)) < 1e-5
    empty = torch.empty(0, 2, 8, requires_grad=True)
    scale = torch.ones(8, requires_grad=True)
    rms_norm(empty, scale, EPS).sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == empty.shape
    assert scale.grad is not None
    assert not scale.grad.any()


def strided(t: Tensor) -> Tensor:
    """The same numbers `[s, b, d]` inside a larger tensor in which the batch comes first."""
    room = torch.full((t.size(1), t.size(0), t.size(2) + 5), torch.nan, dtype=t.dtype)
    room[..., 3 : 3 + t.size(2)] = t.transpose(0, 1)
    return room[..., 3 : 3 + t.size(2)].transpose(0, 1)


def test_rows_are_read_where_they_lie() -> None:
    y, z, weight, mask = normal(3, 2, 24), normal(3, 2, 24, seed=1), normal(24, seed=2), torch.rand(24)
    there = strided(y)
    assert triton_rows.rows(there).values.data_ptr() == there.data_ptr()
    grad = normal(3, 2, 24, seed=3)
    results = []
    for as_read in (strided, torch.clone):
        inputs = [as_read(y).requires_grad_(), as_read(z).requires_grad_(), weight.clone().requires_grad_()]
        out = gated_rms_norm(*inputs, 2, EPS, mask)
        normed = rms_norm(inputs[0], inputs[2], EPS)
        results.append([out, normed, *torch.autograd.grad([out, normed], inputs, [as_read(grad), as_read(grad)])])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("dtype", "groups", "channels"),
    [(torch.float32, 2, 48), (torch.bfloat16, 2, 48), (torch.float32, 3, 30), (torch.float32, 1, 8)],
)
def test_gated_norm_with_a_soft_mask(dtype: torch.dtype, groups: int, channels: int) -> None:
    y, z = (normal(3, 2, channels, seed=seed).to(dtype) for seed in range(2))
    weight = (normal(channels, seed=2) + 2).to(dtype)
    mask = torch.rand(channels, generator=torch.Generator().manual_seed(3)) * 0.9 + 0.1

    def by(op: Op) -> Op:
        return lambda y, z, w, m: op(y, z, w, groups, EPS, m)

    assert max(errors(by(gated_rms_norm), by(gated_rms_norm_ref), [y, z, weight, mask])) < TOLERANCES[dtype]
    # A mask that is not in the width is another norm.
    other = errors(by(lambda y, z, w, g, e, m: gated_rms_norm(y * m, z, w, g, e)), by(gated_rms_norm_ref),
                   [y.float(), z.float(), weight.float(), mask])  # fmt: skip
    assert min(other) > 10 * TOLERANCES[torch.float32]


def test_gated_norm_without_a_mask() -> None:
    inputs = [normal(5, 24, seed=0), normal(5, 24, seed=1), normal(24, seed=2)]
    found = errors(lambda *t: gated_rms_norm(*t, 2, EPS), lambda *t: gated_rms_norm_ref(*t, 2, EPS), inputs)
    assert max(found) < 1e-5
    assert max(errors(lambda *t: gated_rms_norm(*t, 4, EPS), lambda *t: gated_rms_norm_ref(*t, 2, EPS), inputs)) > 1e-2


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("added", [False, True])
def test_product_with_a_mask(dtype: torch.dtype, added: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_masking, "BLOCK", 32)  # two programs for the channels
    inputs = [normal(5, 2, 40).to(dtype), torch.rand(40, generator=torch.Generator().manual_seed(1)) + 0.1]
    inputs[1] = torch.stack([inputs[1], inputs[1] + 1], 1)[:, 0]  # an entry of two
    inputs += [strided(normal(5, 2, 40, seed=2).to(dtype))] if added else []
    assert max(errors(triton_masking.masked, masked_ref, inputs)) < TOLERANCES[dtype]
    other = errors(lambda v, m, *r: triton_masking.masked(v, m + 0.1, *r), masked_ref, inputs)
    assert max(other) > 0.02


@pytest.mark.parametrize("kept", [0, 5])
def test_hard_masks(kept: int) -> None:
    """One-hot is the norm of the sliced channels up to rounding; a group that keeps nothing gives zeros."""
    y, z, weight = normal(3, 2, 24, seed=0), normal(3, 2, 24, seed=1), normal(24, seed=2)
    keep = (torch.arange(12) < kept).repeat(2)
    inputs = [t.requires_grad_() for t in (y, z, weight)]
    masked = gated_rms_norm(y, z, weight, 2, EPS, keep.float())
    gradients = torch.autograd.grad(masked.square().sum(), inputs)
    assert all(g.isfinite().all() for g in gradients)
    assert masked[..., ~keep].eq(0).all()
    assert all(g[..., ~keep].eq(0).all() for g in gradients)
    if kept:
        sliced = gated_rms_norm(y[..., keep], z[..., keep], weight[keep], 2, EPS)
        assert worst(masked[..., keep].detach(), sliced.detach().double()) < 1e-6
        assert worst(masked[..., keep].detach(), sliced.detach().double().roll(1, 0)) > 1e-2
