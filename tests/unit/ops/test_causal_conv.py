import pytest
import torch

from megatron_elastic.ops import causal_conv
from megatron_elastic.ops.causal_conv import causal_conv1d_silu, causal_conv1d_silu_ref

# fp64 sums of a few hundred terms of size one.
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def make_inputs(length=9, d=5, k=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, length, d), (d, 1, k), (d,)]
    return [torch.randn(*s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


@pytest.fixture(params=["whole", "blocks"], autouse=True)
def blocks(request, monkeypatch):
    """Both as one block of tokens and as several, the last one smaller than the kernel."""
    if request.param == "blocks":
        monkeypatch.setattr(causal_conv, "_BLOCK_BYTES", 2 * 5 * 8 * 4)


@pytest.mark.parametrize(("length", "k"), [(9, 4), (2, 4), (1, 4), (9, 1), (3, 3)])
def test_equals_the_grouped_convolution(length, k):
    inputs = make_inputs(length, k=k)
    y, expected = causal_conv1d_silu(*inputs), causal_conv1d_silu_ref(*inputs)
    torch.testing.assert_close(y, expected, **EXACT)
    weight = torch.arange(y.numel(), dtype=y.dtype).view(y.shape).sin()
    for a, b in zip(*(torch.autograd.grad((v * weight).sum(), inputs) for v in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_a_transposed_input_gives_the_same():
    x, weight, bias = make_inputs()
    strided = x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(causal_conv1d_silu(strided, weight, bias), causal_conv1d_silu(x, weight, bias))


@pytest.mark.parametrize("changed", range(3))
def test_depends_on_every_input(changed):
    inputs = [t.detach() for t in make_inputs()]
    y = causal_conv1d_silu(*inputs)
    inputs[changed] = inputs[changed] + 0.01
    assert not torch.allclose(causal_conv1d_silu(*inputs), y, **EXACT)


def test_later_tokens_do_not_matter():
    x, weight, bias = (t.detach() for t in make_inputs())
    y = causal_conv1d_silu(x, weight, bias)
    x[:, 5:] += 1
    changed = causal_conv1d_silu(x, weight, bias)
    assert torch.equal(changed[:, :5], y[:, :5])
    assert not torch.allclose(changed[:, 5:], y[:, 5:], **EXACT)


def test_gradcheck():
    assert torch.autograd.gradcheck(causal_conv1d_silu, make_inputs(5, 2))


def test_keeps_the_input_dtype():
    x, weight, bias = make_inputs(dtype=torch.float32)
    low = x.detach().bfloat16().requires_grad_()
    y = causal_conv1d_silu(low, weight, bias)
    y.sum().backward()
    assert y.dtype == low.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == bias.grad.dtype == torch.float32


DOCUMENTS = torch.tensor([[0, 0, 1, 2, 2, 2, 2, 2, 7], [0, 0, 0, 0, 0, 0, 3, 3, 3]])


@pytest.mark.parametrize("k", [4, 1, 3])
def test_no_tap_crosses_a_boundary(k):
    inputs = make_inputs(k=k)
    y, expected = causal_conv1d_silu(*inputs, DOCUMENTS), causal_conv1d_silu_ref(*inputs, DOCUMENTS)
    torch.testing.assert_close(y, expected, **EXACT)
    weight = torch.arange(y.numel(), dtype=y.dtype).view(y.shape).sin()
    for a, b in zip(*(torch.autograd.grad((v * weight).sum(), inputs) for v in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    whole = causal_conv1d_silu(*inputs)
    if k == 1:  # there is no tap to cross
        torch.testing.assert_close(whole, y, **EXACT)
    else:
        assert (whole - y).abs().max() > 1e-2


def test_gradcheck_with_documents():
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]])
    assert torch.autograd.gradcheck(lambda *t: causal_conv1d_silu(*t, documents), make_inputs(5, 2))


def test_documents_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"documents has the shape \[2, 8\] for a batch of 2 x 9 tokens"):
        causal_conv1d_silu(*make_inputs(), DOCUMENTS[:, 1:])
