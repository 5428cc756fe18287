import pytest
import torch
import torch.nn.functional as F

from megatron_elastic.ops.gated_norm import gated_rms_norm, gated_rms_norm_ref

EPS, D, GROUPS = 1e-5, 24, 3
# fp64 sums of 24 terms of size one.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def make_inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in [(2, 3, D), (2, 3, D), (D,)]]


def prefix_in_groups(kept):
    return (torch.arange(D // GROUPS) < kept).repeat(GROUPS)


def test_without_a_mask_each_group_is_normed_alone():
    y, z, weight = make_inputs()
    u = (y * F.silu(z)).view(2, 3, GROUPS, -1)
    expected = F.rms_norm(u, (D // GROUPS,), None, EPS).flatten(-2) * weight
    torch.testing.assert_close(gated_rms_norm(y, z, weight, GROUPS, EPS), expected, **EXACT)
    torch.testing.assert_close(gated_rms_norm_ref(y, z, weight, GROUPS, EPS), expected, **EXACT)
    assert not torch.allclose(gated_rms_norm(y, z, weight, 1, EPS), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kept", [1, 4, 8])
def test_one_hot_prefix_mask_in_each_group_is_the_norm_of_the_sliced_channels(kept):
    y, z, weight = make_inputs()
    keep = prefix_in_groups(kept)
    masked = gated_rms_norm(y, z, weight, GROUPS, EPS, keep.double())
    sliced = gated_rms_norm(y[..., keep], z[..., keep], weight[keep], GROUPS, EPS)
    torch.testing.assert_close(masked[..., keep], sliced, **EXACT)
    assert masked[..., ~keep].eq(0).all()


def test_plain_prefix_across_groups_is_not_the_norm_of_the_sliced_channels():
    y, z, weight = make_inputs()
    keep = torch.arange(D) < 4 * GROUPS
    masked = gated_rms_norm(y, z, weight, GROUPS, EPS, keep.double())
    sliced = gated_rms_norm(y[..., keep], z[..., keep], weight[keep], GROUPS, EPS)
    assert not torch.allclose(masked[..., keep], sliced, rtol=1e-2, atol=1e-2)


def test_masked_width_and_not_the_full_one_divides():
    y, z, weight = make_inputs()
    keep = prefix_in_groups(4)
    sliced = gated_rms_norm(y[..., keep], z[..., keep], weight[keep], GROUPS, EPS)
    z_off = torch.where(keep, z, 0)
    assert not torch.allclose(gated_rms_norm(y, z_off, weight, GROUPS, EPS)[..., keep], sliced, rtol=1e-2, atol=1e-2)


def test_soft_mask_equals_the_reference_and_has_gradients():
    y, z, weight = (t.requires_grad_() for t in make_inputs())
    mask = torch.rand(D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    inputs = (y, z, weight, mask)
    assert torch.autograd.gradcheck(lambda y, z, w, m: gated_rms_norm(y, z, w, GROUPS, EPS, m), inputs)
    ours, reference = (f(y, z, weight, GROUPS, EPS, mask) for f in (gated_rms_norm, gated_rms_norm_ref))
    torch.testing.assert_close(ours, reference, **EXACT)
    for a, b in zip(*(torch.autograd.grad(v.sin().sum(), inputs) for v in (ours, reference)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_group_without_a_kept_channel_is_zero():
    y, z, weight = (t.requires_grad_() for t in make_inputs())
    mask = (torch.arange(D) >= D // GROUPS).double()
    out = gated_rms_norm(y, z, weight, GROUPS, EPS, mask)
    out.sum().backward()
    assert out[..., : D // GROUPS].eq(0).all()
    assert out[..., D // GROUPS :].ne(0).all()
    assert y.grad.isfinite().all()


def test_groups_must_divide_the_channels():
    y, z, weight = make_inputs()
    with pytest.raises(ValueError, match="24 channels do not divide into 5 groups"):
        gated_rms_norm(y, z, weight, 5, EPS)
