"""Every op, forward and gradients, against its reference in fp64 on the same inputs.

Not run on a GPU yet. The tolerances are what the same comparison gives on a CPU, with room.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_elastic.ops.attention import causal_attention, causal_attention_ref
from megatron_elastic.ops.causal_conv import causal_conv1d_silu, causal_conv1d_silu_ref
from megatron_elastic.ops.gated_norm import gated_rms_norm, gated_rms_norm_ref
from megatron_elastic.ops.kd_loss import kd_loss, kd_loss_ref
from megatron_elastic.ops.masking import masked, masked_ref
from megatron_elastic.ops.norm import rms_norm, rms_norm_ref
from megatron_elastic.ops.sliced_parameter import sliced_parameter, sliced_parameter_ref
from megatron_elastic.ops.ssd import ssd, ssd_ref

# Worst error over the reference's largest value. fp32: sums of some hundred terms of 6e-8 each. bfloat16: inputs and
# upstream gradients are the same numbers on both sides, so what is left is the rounding of results to 8 bits (4e-3),
# twice where a gradient is rounded on its way.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
Op = Callable[..., Tensor]


def normal(*shape: int, device: torch.device, seed: int) -> Tensor:
    # Drawn on the CPU: the same numbers on every machine.
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def worst(found: Tensor, expected: Tensor) -> float:
    assert found.isfinite().all()
    assert found.shape == expected.shape
    return float((found.double() - expected).abs().max() / expected.abs().max())


def compare(op: Op, reference: Op, inputs: Sequence[Tensor], low_tolerance: float = 1e-2) -> None:
    """Result and gradient of every input in both types; then the negative: another input gives another result."""
    for dtype, limit in {**TOLERANCES, torch.bfloat16: low_tolerance}.items():
        compare_in(dtype, op, reference, inputs, limit)


def compare_in(dtype: torch.dtype, op: Op, reference: Op, inputs: Sequence[Tensor], limit: float) -> None:
    low = [t.to(dtype).requires_grad_() for t in inputs]
    high = [t.detach().double().requires_grad_() for t in low]
    found, expected = op(*low), reference(*high)
    assert worst(found.detach(), expected.detach()) < limit
    upstream = normal(*found.shape, device=found.device, seed=99).to(found.dtype)
    gradients = torch.autograd.grad((found * upstream).sum(), low)
    wanted = torch.autograd.grad((expected * upstream.double()).sum(), high)
    for number, (a, b) in enumerate(zip(gradients, wanted, strict=True)):
        assert worst(a, b) < limit, f"gradient of input {number} in {dtype}"
    changed = [low[0].detach() + 1.0, *low[1:]]
    assert worst(op(*changed).detach(), expected.detach()) > 10 * limit


def scan_inputs(device: torch.device, heads: int, head_dim: int) -> list[Tensor]:
    b, length, g, n = 2, 96, 2, 16
    shapes = [(heads, head_dim), (g, n), (g, n)]
    x, B, C = (normal(b, length, *s, device=device, seed=i) for i, s in enumerate(shapes))
    dt = F.softplus(normal(b, length, heads, device=device, seed=5) - 1)
    A = -torch.rand(heads, generator=torch.Generator().manual_seed(6)).to(device) - 0.5
    return [x, dt, A, B, C, normal(heads, device=device, seed=7)]


DOCUMENTS = torch.tensor([[0] * 10 + [1] * 50 + [2] * 36, [0] * 96])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head_dim", [16, 12])
def test_ssd(device: torch.device, head_dim: int, packed: bool) -> None:
    """The chunked scan and its own backward against the recurrence; in bf16 mamba-ssm's kernels where they are."""
    inputs = scan_inputs(device, 8, head_dim)
    documents = DOCUMENTS.to(device) if packed else None
    compare_in(torch.float32, lambda *t: ssd(*t, 32, documents), lambda *t: ssd_ref(*t, documents), inputs, 2e-5)
    x, dt, A, B, C, D = inputs

    def exact(x: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return ssd_ref(x, dt.double(), A.double(), B, C, D.double(), documents)

    # As in the layer: steps, decays and skips stay in fp32. The kernels round the states that chunks hand on and the
    # scores inside a chunk to 8 bits.
    compare_in(torch.bfloat16, lambda x, B, C: ssd(x, dt, A, B, C, D, 32, documents), exact, [x, B, C], 3e-2)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("channels", [48, 44])
def test_causal_conv(device: torch.device, channels: int, packed: bool) -> None:
    """Shifted products, or in bf16 causal-conv1d's kernel (of 44 channels: not), against `conv1d`."""
    shapes = [(2, 96, channels), (channels, 1, 4), (channels,)]
    inputs = [normal(*s, device=device, seed=i) for i, s in enumerate(shapes)]
    documents = DOCUMENTS.to(device) if packed else None
    compare(
        lambda *t: causal_conv1d_silu(*t, documents), lambda *t: causal_conv1d_silu_ref(*t, documents), inputs, 2e-2
    )


def test_norms(device: torch.device) -> None:
    """Both norms with a soft mask, its gradient included; Triton kernels on a GPU."""
    x, z = (normal(300, 2, 64, device=device, seed=i) for i in range(2))
    weight, mask = (torch.sigmoid(normal(64, device=device, seed=i)) + 0.5 for i in (2, 3))
    width = mask.sum()
    compare(
        lambda *t: rms_norm(*t[:2], 1e-5, t[2]),
        lambda *t: rms_norm_ref(*t[:2], 1e-5, t[2]),
        [x, weight, width],
    )
    compare(
        lambda *t: gated_rms_norm(*t[:3], 4, 1e-5, t[3]),
        lambda *t: gated_rms_norm_ref(*t[:3], 4, 1e-5, t[3]),
        [x, z, weight, mask],
    )


def test_product_with_a_mask(device: torch.device) -> None:
    """A soft mask, its gradient included, and the residual stream; a Triton kernel on a GPU."""
    values, residual = (normal(300, 2, 64, device=device, seed=i) for i in range(2))
    mask = torch.sigmoid(normal(64, device=device, seed=2)) + 0.5
    compare(masked, masked_ref, [values, mask])
    # The sum of a product with the stream is rounded twice where it is not one kernel.
    compare(masked, masked_ref, [values, mask, residual])


def test_attention(device: torch.device) -> None:
    """Torch's fused attention with grouped heads."""
    inputs = [normal(64, 2, heads, 32, device=device, seed=seed) for seed, heads in enumerate((8, 2, 2))]
    # The fused kernels round the probabilities too.
    compare(lambda *t: causal_attention(*t, 0.2), lambda *t: causal_attention_ref(*t, 0.2), inputs, 3e-2)


def test_kd_loss(device: torch.device) -> None:
    """The KD loss fused with the LM head, in chunks."""
    hidden, head, teacher, teacher_head = (
        normal(*s, device=device, seed=i) * 0.3 for i, s in enumerate([(32, 2, 32), (257, 32), (32, 2, 48), (257, 48)])
    )
    fixed = [t.bfloat16() for t in (teacher, teacher_head)]  # exact in all three types
    mask = (torch.arange(64, device=device).view(32, 2) % 5 > 0).float()
    # In bfloat16 the logits are rounded before the softmax: 4e-3 of a logit of size one, on every probability.
    compare(
        lambda h, w: kd_loss(h, w, *(t.to(h.dtype) for t in fixed), mask, temperature=2.0, chunk_tokens=24)[0],
        lambda h, w: kd_loss_ref(h, w, *(t.double() for t in fixed), mask, temperature=2.0)[0],
        [hidden, head],
        3e-2,
    )


def test_sliced_parameter(device: torch.device) -> None:
    """A slice and its gradient in `main_grad`, exactly."""
    segments = ((0, 8), (32, 40)), ((4, 20),)
    for dtype in TOLERANCES:
        weight = normal(64, 48, device=device, seed=1).to(dtype).requires_grad_()
        plain = weight.detach().clone().requires_grad_()
        weight.main_grad = torch.ones_like(weight, dtype=torch.float32, requires_grad=False)  # type: ignore[attr-defined]
        packed, expected = sliced_parameter(weight, *segments), sliced_parameter_ref(plain, *segments)
        assert torch.equal(packed, expected)
        upstream = normal(*packed.shape, device=device, seed=2).to(dtype)
        packed.backward(upstream)  # type: ignore[no-untyped-call]
        expected.backward(upstream)  # type: ignore[no-untyped-call]
        assert plain.grad is not None
        assert torch.equal(weight.main_grad, 1 + plain.grad.float())  # type: ignore[attr-defined]
        assert not torch.equal(packed, sliced_parameter(weight, ((1, 9), (32, 40)), ((4, 20),)))
