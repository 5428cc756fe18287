import pytest
import torch

from megatron_elastic.ops.masking import masked, masked_ref

# fp64: one product and one sum of numbers of size one.
EXACT = {"rtol": 1e-14, "atol": 1e-14}


def make_inputs(added):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2, 6), (6,), (3, 2, 6)]
    made = [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    return made if added else made[:2]


@pytest.mark.parametrize("added", [False, True])
def test_equals_the_reference_and_has_gradients(added):
    inputs = make_inputs(added)
    assert torch.autograd.gradcheck(masked, inputs)
    torch.testing.assert_close(masked(*inputs), masked_ref(*inputs), **EXACT)
    changed = [inputs[0], inputs[1] + 0.1, *inputs[2:]]
    assert not torch.allclose(masked(*changed), masked_ref(*inputs), **EXACT)


def test_a_masked_channel_adds_nothing():
    values, mask, residual = (t.detach() for t in make_inputs(True))
    mask[2:] = 0
    out = masked(values, mask, residual)
    assert torch.equal(out[..., 2:], residual[..., 2:])
    assert not torch.equal(out[..., :2], residual[..., :2])
