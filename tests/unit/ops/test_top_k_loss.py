"""The loss against a teacher's kept tokens and ghost: its reference, the whole vocabulary, Megatron's, its memory."""

import pytest
import torch

from megatron_elastic.curriculum import DIVERGENCES, DistillationLoss
from megatron_elastic.ops.divergence import divergence_ref
from megatron_elastic.ops.kd_loss import kd_loss
from megatron_elastic.ops.top_k_loss import joined_ref, teacher_top_k, top_k_kd_loss, top_k_kd_loss_ref
from tests.unit.ops.tensor_watch import TensorWatch
from tests.unit.ops.test_kd_loss import EXACT, make_inputs, make_labels

VOCABULARY = 11
LOSSES = [DistillationLoss(kind=kind) for kind in DIVERGENCES]
LOSSES += [DistillationLoss(ce_weight=0.3), DistillationLoss(kind="jsd", beta=0.1, ce_weight=0.7)]


def kept(inputs, k, temperature=1.0, **how):
    return teacher_top_k(inputs[2], inputs[3], k, temperature=temperature, **how)


def gradients(value, inputs):
    return torch.autograd.grad(value * 0.7, inputs[:2])


@pytest.mark.parametrize("k", [1, 4, VOCABULARY - 1, VOCABULARY])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_kept_tokens_are_the_most_probable_and_the_ghost_is_the_rest(k, temperature):
    inputs = make_inputs()
    ids, log_probs = kept(inputs, k, temperature, chunk_tokens=4)
    whole = (inputs[2] @ inputs[3].t() / temperature).log_softmax(-1)
    values, places = whole.topk(k, -1)
    assert torch.equal(ids.long(), places)
    torch.testing.assert_close(log_probs[..., :k], values, **EXACT)
    if k < VOCABULARY:
        torch.testing.assert_close(log_probs, joined_ref(whole, ids), **EXACT)
        torch.testing.assert_close(log_probs[..., k].exp(), 1 - values.exp().sum(-1), **EXACT)
    assert log_probs.shape == (5, 3, k + (k < VOCABULARY))


def test_of_equal_tokens_the_lower_id_is_kept():
    hidden, weight = torch.ones(1, 2, 1), torch.tensor([[1.0], [-2.0], [3.0], [1.0], [0.0], [-0.0], [1.0], [-2.0]])
    ids, _ = teacher_top_k(hidden, weight, 7)
    assert ids[0, 0].tolist()[:4] == [2, 0, 3, 6]
    assert ids[0, 0, -1] == 1  # of two equal ones at the edge
    weight[6] += 1e-6
    assert teacher_top_k(hidden, weight, 7)[0][0, 0].tolist()[:4] == [2, 6, 0, 3]


@pytest.mark.parametrize("chunk", [1, 7, None])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chosen", LOSSES, ids=str)
def test_fused_equals_its_reference(chosen, temperature, chunk):
    inputs = make_inputs()
    target = kept(inputs, 4, temperature)
    settings = {"temperature": temperature, "loss": chosen, "labels": make_labels(inputs[4])}
    expected = top_k_kd_loss_ref(*inputs[:2], *target, inputs[4], **settings)
    total = top_k_kd_loss(*inputs[:2], *target, inputs[4], chunk_tokens=chunk, **settings)
    torch.testing.assert_close(total, expected, **EXACT)
    for made, wanted in zip(gradients(total, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(made, wanted, **EXACT)
    with torch.no_grad():
        assert torch.equal(top_k_kd_loss(*inputs[:2], *target, inputs[4], chunk_tokens=chunk, **settings), total)
        other = top_k_kd_loss(*inputs[:2], *kept(inputs, 1, temperature), inputs[4], **settings)
        assert not torch.allclose(other, total, rtol=1e-3)


@pytest.mark.parametrize("chosen", LOSSES, ids=str)
def test_with_every_token_kept_it_is_the_loss_over_all_tokens_and_else_a_part_of_it(chosen):
    inputs = make_inputs()
    settings = {"temperature": 1.5, "loss": chosen, "labels": make_labels(inputs[4])}
    whole, _ = kd_loss(*inputs, **settings)
    wanted, parts = gradients(whole, inputs), []
    for k in (VOCABULARY, 6, 3, 1):
        part = top_k_kd_loss(*inputs[:2], *kept(inputs, k, 1.5), inputs[4], **settings)
        parts.append(part.item())
        made = gradients(part, inputs)
        if k == VOCABULARY:
            torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-12)
            for one, other in zip(made, wanted, strict=True):
                torch.testing.assert_close(one, other, **EXACT)
        else:
            assert not torch.allclose(made[1], wanted[1], rtol=1e-3)
    # Joining outcomes only takes from a divergence.
    assert parts == sorted(parts, reverse=True)
    assert parts[-1] < 0.97 * parts[0]


def test_it_is_what_the_ghost_token_formula_says_of_the_online_logits():
    """Equal to a plain sum over the kept tokens and the rest, from the logits of both models."""
    inputs = make_inputs()
    k, weights = 4, inputs[4]
    p, q = ((inputs[i] @ inputs[i + 1].t()).softmax(-1) for i in (2, 0))
    ids = p.topk(k, -1).indices
    sums = []
    for each in (p, q):
        chosen = each.gather(-1, ids)
        sums.append((chosen, 1 - chosen.sum(-1)))
    (p_kept, p_rest), (q_kept, q_rest) = sums
    each = (p_kept * (p_kept / q_kept).log()).sum(-1) + p_rest * (p_rest / q_rest).log()
    total = top_k_kd_loss(*inputs[:2], *kept(inputs, k), weights)
    torch.testing.assert_close(total, (each * weights).sum(), **EXACT)
    without = ((p_kept * (p_kept / q_kept).log()).sum(-1) * weights).sum()
    assert not torch.allclose(total, without, rtol=1e-3)


def test_it_is_megatrons_top_k_divergence():
    from megatron.training.distillation.cached_logits_loss import topk_kl_div

    inputs = [t.detach().float() for t in make_inputs()]
    ids, log_probs = kept(inputs, 4)
    logits = inputs[0] @ inputs[1].t()
    theirs = topk_kl_div(logits, log_probs[..., :-1], ids.long(), 1, 0, None, add_ghost_token=True)  # type: ignore[arg-type]
    ours = top_k_kd_loss(*inputs[:2], ids, log_probs, inputs[4])
    # fp32, and their ghosts are 1 - sum, whose roundings count as much as it is small.
    torch.testing.assert_close(ours, (theirs.t() * inputs[4]).sum(), rtol=1e-5, atol=1e-5)
    theirs = topk_kl_div(inputs[0] @ inputs[1].t(), log_probs[..., :-1], ids.long(), 1, 0, None)  # type: ignore[arg-type]
    assert not torch.allclose(ours, (theirs.t() * inputs[4]).sum(), rtol=1e-3)


def test_a_teacher_that_is_almost_sure_keeps_its_ghost():
    """`1 - sum` would be 0, or a rounding, in fp32: the rest has 1e-13 of the mass, and the student gives it half."""
    hidden, weight = torch.ones(1, 1, 1), torch.tensor([[30.0], [0.0], [0.0]])
    ids, log_probs = teacher_top_k(hidden, weight, 1)
    assert log_probs[0, 0, 1].item() == pytest.approx(torch.tensor(2.0).log().item() - 30.0, rel=1e-6)
    student = torch.tensor([[0.0], [-2.0], [-2.0]], requires_grad=True)
    total = top_k_kd_loss(hidden, student, ids, log_probs, torch.ones(1, 1))
    total.backward()
    q = student.detach().flatten().softmax(0)
    assert total.item() == pytest.approx(-q[0].log().item(), rel=1e-6)
    torch.testing.assert_close(student.grad.flatten(), q - torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize("chosen", LOSSES[:3], ids=str)
def test_the_teacher_itself_loses_nothing_and_large_logits_stay_finite(chosen):
    hidden, weight, _, _, weights = make_inputs(dtype=torch.float32)
    same = top_k_kd_loss(hidden, weight, *teacher_top_k(hidden, weight, 4), weights, loss=chosen)
    same.backward()
    # The mixture of two equal distributions is rounded: 1e-7 of a log-probability, a token.
    assert same < 1e-5
    assert hidden.grad.abs().max() < 1e-5
    other = [t.detach() * 1e3 for t in (hidden, weight)]
    large = [other[0].requires_grad_(), other[1].requires_grad_()]
    total = top_k_kd_loss(*large, *teacher_top_k(weights[..., None].expand(5, 3, 4), weight, 4), weights, loss=chosen)
    assert all(each.isfinite().all() for each in (total, *torch.autograd.grad(total, large)))


def test_bfloat16_is_summed_in_float32():
    low = [t.detach().bfloat16().requires_grad_(t.requires_grad) for t in make_inputs(dtype=torch.float32)]
    ids, log_probs = kept(low, 4)
    assert log_probs.dtype == torch.float32
    total = top_k_kd_loss(*low[:2], ids, log_probs, low[4], chunk_tokens=4)
    expected = top_k_kd_loss_ref(*low[:2], ids, log_probs, low[4])
    torch.testing.assert_close(total, expected)
    for made, wanted in zip(gradients(total, low), gradients(expected, low), strict=True):
        # Logit gradients and results are rounded to 8 bits.
        torch.testing.assert_close(made, wanted, rtol=3e-2, atol=3e-2)


def test_rounded_log_probabilities_are_normalised():
    inputs = make_inputs()
    ids, log_probs = kept(inputs, 4)
    rounded = log_probs.half().double()
    total = top_k_kd_loss(*inputs[:2], ids, rounded, inputs[4])
    assert rounded.exp().sum(-1).sub(1).abs().max() > 1e-5
    whole = (inputs[0] @ inputs[1].t()).log_softmax(-1)
    each = divergence_ref(joined_ref(whole, ids), rounded - rounded.logsumexp(-1, keepdim=True), DistillationLoss())
    torch.testing.assert_close(total, (each * inputs[4]).sum(), **EXACT)
    exact = top_k_kd_loss(*inputs[:2], ids, log_probs, inputs[4])
    # Eleven bits of log-probabilities of up to 8: 4e-3 of the smallest probabilities, less of those that count.
    torch.testing.assert_close(total, exact, rtol=2e-3, atol=0.0)
    assert total != exact


def test_memory_is_that_of_one_chunk():
    def watched(s, chunk):
        inputs = make_inputs(s, 2, 4, 6, 512, torch.float32)
        target = kept(inputs, 8)
        with TensorWatch().know(*inputs, *target) as watch:
            top_k_kd_loss(*inputs[:2], *target, inputs[4], chunk_tokens=chunk).backward()
        return watch

    short, longer, whole = watched(64, 16), watched(256, 16), watched(64, 128)
    size = 16 * 512 * 4
    assert short.largest == longer.largest == size
    # Per token more: its gradient twice (k numbers, made and scaled), and its weight.
    assert longer.peak - short.peak <= 192 * 2 * 4 * (2 * 4 + 2)
    assert short.peak <= 3 * size
    assert whole.largest == 8 * size


def test_bad_arguments_are_refused():
    hidden, weight, _, _, weights = make_inputs()
    ids, log_probs = teacher_top_k(hidden, weight, 4)
    for k in (0, VOCABULARY + 1):
        with pytest.raises(ValueError, match="keep between 1 and 11 tokens"):
            teacher_top_k(hidden, weight, k)
    with pytest.raises(ValueError, match="temperature is 0"):
        top_k_kd_loss(hidden, weight, ids, log_probs, weights, temperature=0)
    with pytest.raises(ValueError, match=r"give \[s, b, k\] and \[s, b, k \+ 1\]"):
        top_k_kd_loss(hidden, weight, ids, log_probs[..., :-2], weights)
    with pytest.raises(ValueError, match=r"ce_weight is 0.5 and labels are None"):
        top_k_kd_loss(hidden, weight, ids, log_probs, weights, loss=DistillationLoss(ce_weight=0.5))
