import pytest
import torch

from megatron_elastic.ops.attention import causal_attention, causal_attention_ref

# fp64 sums of some ten terms of size one.
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def make_inputs(heads=4, groups=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 2, heads, 3), (7, 2, groups, 3), (7, 2, groups, 3)]
    return [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 4), (6, 1)])
def test_equals_explicit_softmax(heads, groups):
    inputs = make_inputs(heads, groups)
    out, expected = causal_attention(*inputs, 0.3), causal_attention_ref(*inputs, 0.3)
    assert out.shape == (7, 2, heads * 3)
    torch.testing.assert_close(out, expected, **EXACT)
    for a, b in zip(*(torch.autograd.grad(v.sin().sum(), inputs) for v in (out, expected)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_query_heads_of_a_group_are_neighbours():
    q, k, v = (t.detach() for t in make_inputs(4, 2))
    out = causal_attention(q, k, v, 0.3).view(7, 2, 4, 3)
    alone = causal_attention(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:], 0.3).view(7, 2, 2, 3)
    torch.testing.assert_close(out[:, :, 2:], alone, **EXACT)
    assert not torch.allclose(out[:, :, 1:3], alone, **EXACT)


def test_scale_and_causality():
    q, k, v = (t.detach() for t in make_inputs())
    out = causal_attention(q, k, v, 0.3)
    assert not torch.allclose(causal_attention(q, k, v, 0.4), out, **EXACT)
    v[4:] += 1
    changed = causal_attention(q, k, v, 0.3)
    torch.testing.assert_close(changed[:4], out[:4], **EXACT)
    assert not torch.allclose(changed[4:], out[4:], **EXACT)


def test_heads_must_divide_over_groups():
    q, k, v = make_inputs(4, 3)
    with pytest.raises(ValueError, match="4 query heads do not divide over 3 key groups"):
        causal_attention(q, k, v, 1.0)


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 3, 3, 3], [2, 2, 2, 2, 2, 4, 4]])


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("queries", [1, 3, 7])
def test_the_last_tokens_alone(queries, documents):
    q, k, v = inputs = make_inputs()
    part = q[-queries:]
    out, expected = (op(part, k, v, 0.3, documents) for op in (causal_attention, causal_attention_ref))
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(out, causal_attention(*inputs, 0.3, documents)[-queries:], **EXACT)
    for a, b in zip(*(torch.autograd.grad(t.sin().sum(), inputs) for t in (out, expected)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    if queries < 7:  # the first tokens are other queries
        assert (causal_attention(q[:queries], k, v, 0.3, documents) - out).abs().max() > 1e-2


@pytest.mark.parametrize("op", [causal_attention, causal_attention_ref])
def test_each_document_is_run_as_if_alone(op):
    inputs = [t.detach() for t in make_inputs()]
    out = op(*inputs, 0.3, DOCUMENTS)
    for row, numbers in enumerate(DOCUMENTS):
        for number in numbers.unique():
            here = numbers == number
            alone = causal_attention_ref(*(t[here, row : row + 1] for t in inputs), 0.3)
            torch.testing.assert_close(out[here, row : row + 1], alone, **EXACT)
    assert (op(*inputs, 0.3) - out).abs().max() > 1e-2


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_gradcheck(documents):
    q, k, v = make_inputs()
    assert torch.autograd.gradcheck(lambda *t: causal_attention(*t, 0.3, documents), (q[3:], k, v))


def test_what_does_not_fit_is_refused():
    q, k, v = make_inputs()
    with pytest.raises(ValueError, match="7 queries for 5 keys"):
        causal_attention(q, k[:5], v[:5], 1.0)
    with pytest.raises(ValueError, match=r"documents has the shape \[7, 2\] for a batch of 2 x 7 tokens"):
        causal_attention(q, k, v, 1.0, DOCUMENTS.T)
