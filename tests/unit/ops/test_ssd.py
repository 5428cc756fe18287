import pytest
import torch
import torch.nn.functional as F

from megatron_elastic.ops import ssd as scan
from megatron_elastic.ops.ssd import ssd, ssd_ref

# fp64 sums of a few hundred terms of size one.
EXACT = {"rtol": 1e-10, "atol": 1e-11}


@pytest.fixture(params=[1, 1 << 20], ids=["one chunk at a time", "all at once"], autouse=True)
def blocks(request, monkeypatch):
    monkeypatch.setattr(scan, "_BLOCK_BYTES", request.param)


def make_inputs(b=2, length=21, h=4, p=3, g=2, n=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    dt, decay = F.softplus(normal(b, length, h) - 1), -torch.rand(h, generator=generator, dtype=dtype) * 4 - 0.5
    inputs = [normal(b, length, h, p), dt, decay, normal(b, length, g, n), normal(b, length, g, n), normal(h)]
    return [t.requires_grad_() for t in inputs]


def gradients(y, inputs, seed=1):
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
    return torch.autograd.grad((y * weight).sum(), inputs)


@pytest.mark.parametrize("chunk", [1, 4, 7, 8, 21, 64])
@pytest.mark.parametrize(("h", "g"), [(4, 2), (4, 4), (3, 1)])
def test_scan_equals_the_recurrence(chunk, h, g):
    inputs = make_inputs(h=h, g=g)
    y, expected = ssd(*inputs, chunk), ssd_ref(*inputs)
    torch.testing.assert_close(y, expected, **EXACT)
    for name, a, b in zip(("x", "dt", "A", "B", "C", "D"), *(gradients(v, inputs) for v in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("changed", range(6))
def test_scan_depends_on_every_input(changed):
    inputs = [t.detach() for t in make_inputs()]
    y = ssd(*inputs, 8)
    inputs[changed] = inputs[changed] * 1.01
    assert not torch.allclose(ssd(*inputs, 8), y, **EXACT)


def test_state_crosses_chunks():
    inputs = [t.detach() for t in make_inputs()]
    alone = ssd(*(t[:, 8:] if t.dim() > 1 else t for t in inputs), 8)
    assert not torch.allclose(ssd(*inputs, 8)[:, 8:], alone, **EXACT)


def test_later_tokens_do_not_matter():
    inputs = [t.detach() for t in make_inputs()]
    y = ssd(*inputs, 8)
    inputs[0][:, 13:] += 1
    changed = ssd(*inputs, 8)
    assert torch.equal(changed[:, :13], y[:, :13])
    assert not torch.allclose(changed[:, 13:], y[:, 13:], **EXACT)


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda *t: ssd(*t, 3), make_inputs(b=1, length=7, h=2, p=2, g=1, n=2))


def test_strong_decay_does_not_overflow():
    x, _, _, B, C, D = (t.detach() for t in make_inputs(length=96, dtype=torch.float32))
    inputs = [x, torch.full(x.shape[:3], 30.0), torch.full((4,), -16.0), B, C, D]
    inputs = [t.requires_grad_() for t in inputs]
    y = ssd(*inputs, 32)
    # Every decay is exp(-480) = 0: only the token itself is left.  fp32 sums of 5 products of order 100.
    own = (B * C).sum(-1).repeat_interleave(2, 2) * 30.0
    torch.testing.assert_close(y, x * (own[..., None] + D[:, None]), rtol=1e-5, atol=1e-3)
    assert all(t.isfinite().all() for t in gradients(y, inputs))


def test_zero_step_passes_the_state_through():
    inputs = [t.detach() for t in make_inputs()]
    inputs[1][:, 5] = 0
    inputs = [t.requires_grad_() for t in inputs]
    y = ssd(*inputs, 8)
    torch.testing.assert_close(y, ssd_ref(*inputs), **EXACT)
    assert all(t.isfinite().all() for t in gradients(y, inputs))


def test_bfloat16_is_computed_in_float32():
    inputs = [t.detach() for t in make_inputs(dtype=torch.float32)]
    low = [t.bfloat16() if i in (0, 3, 4) else t for i, t in enumerate(inputs)]
    y = ssd(*low, 8)
    assert y.dtype == torch.bfloat16
    # One rounding of the result to 8 bits, nothing else.
    torch.testing.assert_close(y.float(), ssd(*(t.float() for t in low), 8), rtol=2**-8, atol=0)


def test_gradients_keep_the_dtype_of_their_input():
    inputs = [t.detach() for t in make_inputs(dtype=torch.float32)]
    low = [(t.bfloat16() if i in (0, 3, 4) else t).requires_grad_() for i, t in enumerate(inputs)]
    grads = gradients(ssd(*low, 8), low)
    assert [g.dtype for g in grads] == [t.dtype for t in low]


def test_bad_arguments_are_refused():
    inputs = make_inputs()
    with pytest.raises(ValueError, match="chunk_size is 0"):
        ssd(*inputs, 0)
    with pytest.raises(ValueError, match="4 heads do not divide over 3 groups"):
        ssd(*inputs[:3], *(torch.zeros(2, 21, 3, 5),) * 2, inputs[5])


# Boundaries inside chunks and on their edges, documents of one token, one longer than two chunks; rows differ.
DOCUMENTS = torch.tensor([[0] * 8 + [1] + [2] * 3 + [5] * 9, [3] * 5 + [4] * 16])


@pytest.mark.parametrize("chunk", [1, 4, 7, 8, 21, 64])
@pytest.mark.parametrize(("h", "g"), [(4, 2), (3, 1)])
def test_documents_reset_the_recurrence(chunk, h, g):
    inputs = make_inputs(h=h, g=g)
    y, expected = ssd(*inputs, chunk, DOCUMENTS), ssd_ref(*inputs, DOCUMENTS)
    torch.testing.assert_close(y, expected, **EXACT)
    for name, a, b in zip(("x", "dt", "A", "B", "C", "D"), *(gradients(v, inputs) for v in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
    # Without them, and with a boundary one token later, the result is another one.
    moved = DOCUMENTS.clone()
    moved[:, 1:] = DOCUMENTS[:, :-1]
    for other in (None, moved):
        assert (ssd(*inputs, chunk, other) - y).abs().max() > 1e-2 * y.abs().max()


@pytest.mark.parametrize("scan", [lambda inputs, documents: ssd(*inputs, 8, documents), lambda i, d: ssd_ref(*i, d)])
def test_each_document_is_run_as_if_alone(scan):
    inputs = [t.detach() for t in make_inputs()]
    y = scan(inputs, DOCUMENTS)
    for row, numbers in enumerate(DOCUMENTS):
        for number in numbers.unique():
            here = numbers == number
            alone = [t[row : row + 1, here] if t.dim() > 1 else t for t in inputs]
            torch.testing.assert_close(y[row : row + 1, here], scan(alone, None), **EXACT)


def test_gradcheck_with_documents():
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2]])
    assert torch.autograd.gradcheck(lambda *t: ssd(*t, 3, documents), make_inputs(b=1, length=7, h=2, p=2, g=1, n=2))


def test_what_another_document_decays_by_does_not_matter():
    inputs = [t.detach() for t in make_inputs(length=96, dtype=torch.float32)]
    documents = torch.arange(96).ge(40).long().expand(2, -1)
    y = ssd(*inputs, 32, documents)
    before = gradients(ssd(*(t.requires_grad_() for t in inputs), 32, documents), inputs)
    # In a difference of prefix sums the log decay of the second document would drown in 1e30: it starts inside a chunk.
    inputs = [t.detach() for t in inputs]
    inputs[1] = inputs[1].index_fill(1, torch.arange(30, 40), 1e30)
    inputs[0] = inputs[0].index_fill(1, torch.arange(30, 40), 1e-30)
    inputs = [t.requires_grad_() for t in inputs]
    changed = ssd(*inputs, 32, documents)
    assert torch.equal(changed[:, 40:], y[:, 40:])
    assert not torch.equal(changed[:, :40], y[:, :40])
    after = gradients(changed, inputs)
    assert all(t.isfinite().all() for t in (changed, *after))
    for number in (0, 1, 3, 4):  # those of each token
        assert torch.equal(after[number][:, 40:], before[number][:, 40:])
    assert not torch.equal(ssd(*inputs, 32)[:, 40:], y[:, 40:])


def test_documents_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"documents has the shape \[1, 21\] for a batch of 2 x 21 tokens"):
        ssd(*make_inputs(), 8, DOCUMENTS[:1])
