import pytest
import torch

from megatron_elastic.curriculum import DistillationLoss
from megatron_elastic.errors import ElasticError
from megatron_elastic.ops import fused_head
from megatron_elastic.ops.cross_entropy import cross_entropy, cross_entropy_ref
from megatron_elastic.ops.divergence import tensors_alive
from megatron_elastic.ops.fused_head import default_chunk_tokens
from megatron_elastic.ops.kd_loss import kd_loss, kd_loss_ref
from megatron_elastic.ops.sliced_parameter import sliced_parameter, sliced_parameter_ref
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


LOSSES = [
    DistillationLoss(kind="reverse_kl"),
    DistillationLoss(kind="jsd"),
    DistillationLoss(kind="jsd", beta=0.1),
    DistillationLoss(kind="jsd", beta=0.9, ce_weight=0.7),
    DistillationLoss(ce_weight=0.3),
    DistillationLoss(kind="reverse_kl", ce_weight=2.0),
]


def make_labels(weights, vocabulary=11):
    labels = torch.arange(weights.numel()).view(weights.shape) % vocabulary
    return labels.masked_fill(weights == 0, 0)


@pytest.mark.parametrize("chunk", [1, 4, 15, None])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chosen", LOSSES, ids=str)
def test_every_loss_equals_its_reference(chosen, temperature, chunk):
    inputs = make_inputs()
    settings = {"temperature": temperature, "loss": chosen, "labels": make_labels(inputs[4])}
    expected, expected_lse = kd_loss_ref(*inputs, **settings)
    wanted, known = torch.autograd.grad(expected * 0.7, inputs[:2], retain_graph=True), None
    for _ in range(2):  # the second with the teacher's log-sum-exp
        total, known = kd_loss(*inputs, **settings, teacher_lse=known, chunk_tokens=chunk)
        torch.testing.assert_close(total, expected, **EXACT)
        torch.testing.assert_close(known, expected_lse, **EXACT)
        for a, b in zip(torch.autograd.grad(total * 0.7, inputs[:2]), wanted, strict=True):
            torch.testing.assert_close(a, b, **EXACT)
    other, _ = kd_loss(*inputs, temperature=temperature, chunk_tokens=chunk)
    assert not torch.allclose(total, other, rtol=1e-3)
    other = kd_loss(*inputs, **settings | {"temperature": temperature + 0.5}, chunk_tokens=chunk)[0]
    assert not torch.allclose(total, other, rtol=1e-3)


def test_the_losses_are_what_they_are_called():
    hidden, weight, teacher_hidden, teacher_weight, weights = make_inputs()
    forward, _ = kd_loss(hidden, weight, teacher_hidden, teacher_weight, weights)
    reverse = DistillationLoss(kind="reverse_kl")
    swapped, _ = kd_loss(teacher_hidden, teacher_weight, hidden.detach(), weight.detach(), weights, loss=reverse)
    torch.testing.assert_close(swapped, forward.detach(), **EXACT)
    # Near its ends the generalised divergence is a share of one of the two.
    share = 1e-6
    backward, _ = kd_loss(hidden, weight, teacher_hidden, teacher_weight, weights, loss=reverse)
    for beta, end in ((share, forward), (1 - share, backward)):
        jsd, _ = kd_loss(
            hidden, weight, teacher_hidden, teacher_weight, weights, loss=DistillationLoss(kind="jsd", beta=beta)
        )
        # The next term is a share of the divergence's own second moment.
        torch.testing.assert_close(jsd / share, end, rtol=1e-3, atol=0.0)
    even = DistillationLoss(kind="jsd")
    one, _ = kd_loss(hidden, weight, teacher_hidden, teacher_weight, weights, loss=even)
    other, _ = kd_loss(teacher_hidden, teacher_weight, hidden.detach(), weight.detach(), weights, loss=even)
    torch.testing.assert_close(one.detach(), other, **EXACT)
    assert one < torch.tensor(2.0).log() * weights.sum()  # its bound
    assert forward > torch.tensor(2.0).log() * weights.sum()


@pytest.mark.parametrize("chosen", [DistillationLoss(), *LOSSES[:3]], ids=str)
def test_every_divergence_of_the_teacher_itself_is_zero_and_large_logits_stay_finite(chosen):
    hidden, weight, teacher_hidden, teacher_weight, weights = make_inputs(dtype=torch.float32)
    same, _ = kd_loss(hidden, weight, hidden.detach(), weight.detach(), weights, loss=chosen)
    same.backward()
    # The mixture of two equal distributions is rounded: 1e-7 of a log-probability, a token.
    assert 0 <= same < 1e-5
    assert hidden.grad.abs().max() < 1e-5
    assert kd_loss(hidden, weight, hidden.detach() * 1.1, weight.detach(), weights, loss=chosen)[0] > 1e-3
    far = [hidden * 1e3, weight, teacher_hidden * 1e3, teacher_weight, weights]
    total, _ = kd_loss(*far, loss=chosen)
    total.backward()
    assert hidden.grad.isfinite().all()
    # fp32 logits of order 1e3 carry 1e-7 of that each.
    torch.testing.assert_close(total, kd_loss_ref(*far, loss=chosen)[0], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("chosen", [DistillationLoss(), *LOSSES], ids=str)
def test_as_many_tensors_are_alive_as_the_chunks_are_sized_for(chosen):
    inputs = make_inputs(64, 2, 4, 6, 4096, torch.float32)
    labels = make_labels(inputs[4], 4096)
    with TensorWatch().know(*inputs) as watch:
        kd_loss(*inputs, loss=chosen, labels=labels, chunk_tokens=16)
    chunk = 16 * 4096 * 4
    # Beside them the weight's gradient, a quarter of a chunk here, and what a token has.
    assert tensors_alive(chosen) * chunk <= watch.peak <= (tensors_alive(chosen) + 0.5) * chunk


def test_gradients_are_handed_out_once():
    inputs = make_inputs()
    total, _ = kd_loss(*inputs)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        total.backward()


def test_a_loss_that_is_none_is_refused():
    for settings, message in (
        ({"kind": "kl"}, "elastic.loss.kind: 'kl' must be one of"),
        ({"kind": "jsd", "beta": 1.0}, "use forward_kl or reverse_kl"),
        ({"beta": 0.0}, "elastic.loss.beta: 0.0 must lie between"),
        ({"ce_weight": -1.0}, "elastic.loss.ce_weight: -1.0 must not be negative"),
    ):
        with pytest.raises(ElasticError, match=message):
            DistillationLoss(**settings)
    inputs = make_inputs()
    for labels in (None, make_labels(inputs[4])[:-1]):
        with pytest.raises(ValueError, match=r"ce_weight is 0.5 and labels are .*; give labels \(5, 3\)"):
            kd_loss(*inputs, loss=DistillationLoss(ce_weight=0.5), labels=labels)


class DifferentiatedAgain(torch.autograd.Function):
    """The loss, computed again for every backward: the check runs several."""

    @staticmethod
    def forward(ctx, hidden, weight, function):
        ctx.save_for_backward(hidden, weight)
        ctx.function = function
        return function(hidden, weight)

    @staticmethod
    def backward(ctx, grad):
        inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            total = ctx.function(*inputs)
        return *torch.autograd.grad(total, inputs, grad), None


@pytest.mark.parametrize("chosen", [DistillationLoss(), *LOSSES[:4]], ids=str)
def test_gradcheck(chosen):
    hidden, weight, *rest = make_inputs(3, 2, 2, 3, 5)
    settings = {"temperature": 1.5, "chunk_tokens": 4, "loss": chosen, "labels": make_labels(rest[-1], 5)}
    assert torch.autograd.gradcheck(
        lambda x, w: DifferentiatedAgain.apply(x, w, lambda x, w: kd_loss(x, w, *rest, **settings)[0]),
        (hidden, weight),
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


@pytest.mark.parametrize("rows", [4, 2**14])
def test_bfloat16_loss_is_summed_in_float32(rows, monkeypatch):
    monkeypatch.setattr(fused_head, "_ROWS", rows)
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


@pytest.mark.parametrize("kept", [None, ((0, 2), (3, 4))])
def test_a_slice_takes_the_gradient_of_its_weight_before_it_is_rounded(kept):
    hidden, weight, *rest = make_inputs(s=64, dtype=torch.bfloat16)
    hidden = hidden.detach()[..., : 4 if kept is None else 3].requires_grad_()
    loss, _ = kd_loss(hidden, sliced_parameter_ref(weight, None, kept), *rest, chunk_tokens=16)
    rounded, by_hidden = torch.autograd.grad(loss * 0.5, (weight, hidden))
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32).requires_grad_(False)
    loss, _ = kd_loss(hidden, sliced_parameter(weight, None, kept), *rest, chunk_tokens=16)
    carried, by_sliced = torch.autograd.grad(loss * 0.5, (weight, hidden))
    assert torch.equal(by_sliced, by_hidden)
    assert weight.grad_added_to_main_grad
    assert not carried.any()
    # 0.5 is exact in bfloat16, so that only the last rounding differs.
    assert torch.equal(weight.main_grad.bfloat16(), rounded)
    assert not torch.equal(weight.main_grad, rounded.float())
    without = torch.empty_like(weight).copy_(weight.detach()).requires_grad_()
    loss, _ = kd_loss(hidden, sliced_parameter(without, None, kept), *rest, chunk_tokens=16)
    assert torch.equal(torch.autograd.grad(loss * 0.5, without)[0], rounded)


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
    assert default_chunk_tokens(2**22, 2**17, tensors=4) == 192


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
