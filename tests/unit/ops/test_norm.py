import torch
import torch.nn.functional as F

from megatron_elastic.ops.norm import rms_norm, rms_norm_ref

EPS = 1e-5
# fp64 sums of 12 terms of size one.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def make_inputs(h=12):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in [(3, 2, h), (h,)]]


def test_full_width_is_the_stock_norm():
    x, weight = make_inputs()
    torch.testing.assert_close(rms_norm(x, weight, EPS), F.rms_norm(x, (12,), weight, EPS), **EXACT)
    torch.testing.assert_close(rms_norm(x, weight, EPS), rms_norm_ref(x, weight, EPS), **EXACT)
    assert not torch.allclose(rms_norm(x, weight, EPS), rms_norm(x, weight, 0.1), **EXACT)


def test_one_hot_mask_is_the_norm_of_the_sliced_channels():
    x, weight = make_inputs()
    mask = (torch.arange(12) < 7).double()
    masked = rms_norm(x * mask, weight, EPS, mask.sum())
    torch.testing.assert_close(masked[..., :7], rms_norm(x[..., :7], weight[:7], EPS), **EXACT)
    assert masked[..., 7:].eq(0).all()


def test_dividing_by_the_full_width_is_another_norm():
    x, weight = make_inputs()
    mask = (torch.arange(12) < 7).double()
    wrong = rms_norm(x * mask, weight, EPS)
    assert not torch.allclose(wrong[..., :7], rms_norm(x[..., :7], weight[:7], EPS), rtol=1e-2, atol=1e-2)


def test_gradients_reach_input_weight_and_width():
    x, weight = (t.requires_grad_() for t in make_inputs())
    width = torch.tensor(7.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: rms_norm(t[0], t[1], EPS, t[2]), (x, weight, width))
    y, expected = rms_norm(x, weight, EPS, width), rms_norm_ref(x, weight, EPS, width)
    torch.testing.assert_close(y, expected, **EXACT)


def test_bfloat16_is_computed_in_float32():
    x, weight = make_inputs()
    low = x.bfloat16()
    y = rms_norm(low, weight.float(), EPS)
    assert y.dtype == torch.bfloat16
    # One rounding of the result to 8 bits, nothing else.
    torch.testing.assert_close(y.float(), rms_norm(low.float(), weight.float(), EPS), rtol=2**-8, atol=0)
    # In bfloat16 a sum of squares over 2^16 channels of 1/16 stops growing long before it reaches 256.
    ones = torch.full((1, 2**16), 1 / 16, dtype=torch.bfloat16)
    torch.testing.assert_close(rms_norm(ones, ones[0] * 16, 0.0), ones * 16)
