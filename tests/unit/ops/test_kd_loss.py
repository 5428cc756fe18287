import pytest
import torch

from megatron_elastic.ops.kd_loss import cross_entropy, cross_entropy_ref, default_chunk_tokens, kd_loss, kd_loss_ref
from tests.unit.ops.tensor_watch import TensorWatch

# fp64 sums of some hundred terms of size one.
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def make_inputs(s=5, b=3, k=4, h=6, vocabulary=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(s, b, k), (vocabulary, k), (s, b, h), (vocabulary, h)]
    inputs = [torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes]
    weights = (torch.rand(s, b, generator=generator) > 0.3).to(dtype)
    return [inputs[0].requires_grad_(), inputs[1].requires_grad_(), *inputs[2:], weights]


@pytest.mark.parametrize("chunk", [1, 2, 7, 15, 100, None])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_fused_equals_unfused(chunk, temperature):
    inputs = make_inputs()
    loss, lse = kd_loss(*inputs, temperature=temperature, chunk_tokens=chunk)
    expected, expected_lse = kd_loss_ref(*inputs, temperature=temperature)
    assert loss.shape == ()
    assert loss._base is None
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(lse, expected_lse, **EXACT)
    assert not lse.requires_grad
    for a, b in zip(*(torch.autograd.grad(v * 0.7, inputs[:2]) for v in (loss, expected)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_gradcheck():
    hidden, weight, *rest = make_inputs(3, 2, 2, 3, 5)
    assert torch.autograd.gradcheck(
        lambda x, w: kd_loss(x, w, *rest, temperature=1.5, chunk_tokens=4)[0], (hidden, weight)
    )


def test_tokens_of_zero_weight_get_zero_gradient():
    inputs = make_inputs()
    kd_loss(*inputs)[0].backward()
    off = inputs[4] == 0
    assert off.any()
    assert inputs[0].grad[off].eq(0).all()
    assert inputs[0].grad[~off].ne(0).all()


@pytest.mark.parametrize("chunk", [4, None])
def test_known_teacher_lse_gives_the_same(chunk):
    inputs = make_inputs()
    first, lse = kd_loss(*inputs, temperature=2.0, chunk_tokens=chunk)
    second, same = kd_loss(*inputs, temperature=2.0, teacher_lse=lse, chunk_tokens=chunk)
    assert same is lse
    torch.testing.assert_close(first, second, **EXACT)
    for a, b in zip(*(torch.autograd.grad(v, inputs[:2]) for v in (first, second)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    stranger = kd_loss(*inputs, temperature=2.0, teacher_lse=lse + 0.1)[0]
    assert not torch.allclose(stranger, first, rtol=1e-3)


@pytest.mark.parametrize("changed", range(5))
def test_depends_on_every_input(changed):
    inputs = [t.detach() for t in make_inputs()]
    loss, _ = kd_loss(*inputs)
    inputs[changed] = inputs[changed] * 1.01
    assert not torch.allclose(kd_loss(*inputs)[0], loss, **EXACT)


def test_the_teacher_itself_loses_nothing():
    hidden, weight, _, _, weights = make_inputs(dtype=torch.float32)
    loss, _ = kd_loss(hidden, weight, hidden.detach(), weight.detach(), weights)
    loss.backward()
    assert loss == 0
    assert hidden.grad.abs().max() < 1e-6  # p - p from two divisions in fp32
    assert kd_loss(hidden, weight, hidden.detach() * 1.1, weight.detach(), weights)[0] > 1e-3


def test_large_logits_stay_finite():
    hidden, weight, teacher_hidden, teacher_weight, weights = make_inputs(dtype=torch.float32)
    inputs = [hidden * 1e3, weight, teacher_hidden * 1e3, teacher_weight, weights]
    loss, _ = kd_loss(*inputs)
    assert loss.isfinite()
    # fp32 logits of order 1e3 carry 1e-7 of that each.
    torch.testing.assert_close(loss, kd_loss_ref(*inputs)[0])


def test_bfloat16_loss_is_summed_in_float32():
    inputs = make_inputs(dtype=torch.float32)
    low = [t.detach().bfloat16().requires_grad_(t.requires_grad) for t in inputs]
    loss, _ = kd_loss(*low, chunk_tokens=4)
    expected, _ = kd_loss_ref(*low)
    assert loss.dtype == torch.float32
    # The same bfloat16 logits; fp32 sums after that.
    torch.testing.assert_close(loss, expected)
    for a, b in zip(*(torch.autograd.grad(v, low[:2]) for v in (loss, expected)), strict=True):
        assert a.dtype == torch.bfloat16
        # Logit gradients and results are rounded to 8 bits.
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(("student", "head"), [(True, False), (False, True), (False, False)])
def test_only_the_wanted_gradients_are_computed(student, head):
    hidden, weight, *rest = make_inputs()
    hidden.requires_grad_(student)
    weight.requires_grad_(head)
    loss, _ = kd_loss(hidden, weight, *rest)
    assert loss.requires_grad == (student or head)
    if student or head:
        loss.backward()
    assert (hidden.grad is not None, weight.grad is not None) == (student, head)


def forward_and_backward(s, vocabulary, chunk=16):
    inputs = make_inputs(s, 2, 4, 6, vocabulary, torch.float32)
    with TensorWatch().know(*inputs) as watch:
        kd_loss(*inputs, chunk_tokens=chunk)[0].backward()
    return watch


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    watch, longer = forward_and_backward(64, 512), forward_and_backward(256, 512)
    chunk, tokens = 16 * 512 * 4, 192 * 2
    assert watch.largest == longer.largest == chunk
    # Per token more: its gradient twice (k numbers, made and scaled), its log-sum-exp and its weight.
    assert longer.peak - watch.peak <= tokens * 4 * (2 * 4 + 2)
    assert watch.peak <= 6 * chunk
    whole = forward_and_backward(64, 512, chunk=128)
    assert whole.largest == 8 * chunk
    inputs = make_inputs(64, 2, 4, 6, 512, torch.float32)
    with TensorWatch().know(*inputs) as unfused:
        kd_loss_ref(*inputs)[0].backward()
    assert unfused.peak > 4 * watch.peak


def test_default_chunks_are_bounded():
    assert default_chunk_tokens(100, 1000) == 128
    assert default_chunk_tokens(8192, 1000) == 256
    assert default_chunk_tokens(2**20, 2**17) == 256
    assert default_chunk_tokens(2**22, 2**17) == 256


def test_bad_arguments_are_refused():
    hidden, weight, teacher_hidden, teacher_weight, weights = make_inputs()
    with pytest.raises(ValueError, match="temperature is 0"):
        kd_loss(hidden, weight, teacher_hidden, teacher_weight, weights, temperature=0)
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        kd_loss(hidden, weight, teacher_hidden, teacher_weight, weights, chunk_tokens=0)
    with pytest.raises(ValueError, match="same tokens and vocabulary"):
        kd_loss(hidden, weight, teacher_hidden, teacher_weight[:-1], weights)
    with pytest.raises(ValueError, match=r"give \[s, b, k\], \[V, k\] and \[s, b\]"):
        kd_loss(hidden, weight, teacher_hidden, teacher_weight, weights.flatten())


@pytest.mark.parametrize("chunk", [1, 4, 15, None])
def test_cross_entropy_equals_unfused(chunk):
    hidden, weight, _, _, weights = make_inputs()
    labels = torch.arange(15).view(5, 3) % 11
    labels[weights == 0] = -1
    loss = cross_entropy(hidden, weight, labels, weights, chunk_tokens=chunk)
    expected = cross_entropy_ref(hidden, weight, labels.clamp_min(0), weights)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected, **EXACT)
    for made, wanted in zip(
        torch.autograd.grad(3.0 * loss, (hidden, weight)),
        torch.autograd.grad(3.0 * expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(made, wanted, **EXACT)
        assert not torch.allclose(made, 1.01 * wanted)
    with torch.no_grad():
        assert torch.equal(cross_entropy(hidden, weight, labels, weights, chunk_tokens=chunk), loss)
    other = cross_entropy(hidden, weight, (labels + 1) % 11, weights, chunk_tokens=chunk)
    assert not torch.allclose(other, loss, rtol=1e-3)
