"""Divergences between a student's and a teacher's distribution, with their gradients, on one chunk of logits.

Each takes logits over the temperature, `[c, V / TP]`, as `(student, teacher, teacher_lse, group)`, and returns the
divergence and the teacher's log-sum-exp, `[c]` each, over the whole vocabulary. The gradient of the student's logits is
left in `student`; `teacher` is overwritten. `teacher_lse` is None where it is not known yet.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_elastic.curriculum import DistillationLoss
from megatron_elastic.ops.fused_head import all_reduce

Divergence = Callable[[Tensor, Tensor, Tensor | None, dist.ProcessGroup | None], tuple[Tensor, Tensor]]


def divergence_of(loss: DistillationLoss) -> Divergence:
    """The divergence of a setting."""
    if loss.kind == "forward_kl":
        return _forward_kl
    if loss.kind == "reverse_kl":
        return _reverse_kl
    return partial(_jensen_shannon, beta=loss.beta)


def tensors_alive(loss: DistillationLoss) -> int:
    """Tensors of a chunk's logits that are alive together: the divergence's, and the cross entropy's gradient."""
    return (4 if loss.kind == "jsd" else 3) + (loss.ce_weight > 0)


def divergence_ref(student: Tensor, teacher: Tensor, loss: DistillationLoss) -> Tensor:
    """The same of log-probabilities over a whole vocabulary `[..., V]`, by its definition: `[...]`."""
    if loss.kind == "forward_kl":
        return _kl_ref(teacher, student)
    if loss.kind == "reverse_kl":
        return _kl_ref(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(loss.beta), student + math.log1p(-loss.beta))
    return loss.beta * _kl_ref(teacher, mixture) + (1 - loss.beta) * _kl_ref(student, mixture)


def _kl_ref(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities."""
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def _forward_kl(
    student: Tensor, teacher: Tensor, teacher_lse: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """KL(teacher || student). Two collectives: the maxima, then the sums."""
    maxima, shift = _maxima(student, teacher, teacher_lse, group)
    student -= maxima[0, :, None]
    teacher -= shift[:, None]
    difference = teacher - student
    p_teacher, p_student = teacher.exp_(), student.exp_()
    sums = [p_student.sum(-1), difference.mul_(p_teacher).sum(-1)]
    if teacher_lse is None:
        sums.append(p_teacher.sum(-1))
    reduced = all_reduce(torch.stack(sums), dist.ReduceOp.SUM, group)
    divergence, lse = reduced[1] + reduced[0].log(), shift
    if teacher_lse is None:
        divergence = reduced[1] / reduced[2] + reduced[0].log() - reduced[2].log()
        lse = shift + reduced[2].log()
        p_teacher /= reduced[2, :, None]
    p_student.div_(reduced[0, :, None]).sub_(p_teacher)
    # It is never negative but by rounding, and metrics drop negative losses.
    return divergence.clamp_min_(0.0), lse


def _reverse_kl(
    student: Tensor, teacher: Tensor, teacher_lse: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """KL(student || teacher). Its gradient is `q * (log(q / p) - KL)`."""
    lse = _log_softmax_(student, teacher, teacher_lse, group)
    ratio = torch.sub(student, teacher, out=teacher)
    q = student.exp_()
    divergence = all_reduce((q * ratio).sum(-1), dist.ReduceOp.SUM, group)
    q.mul_(ratio.sub_(divergence[:, None]))
    return divergence.clamp_min_(0.0), lse


def _jensen_shannon(
    student: Tensor, teacher: Tensor, teacher_lse: Tensor | None, group: dist.ProcessGroup | None, *, beta: float
) -> tuple[Tensor, Tensor]:
    """`beta KL(p || m) + (1 - beta) KL(q || m)`, `m = beta p + (1 - beta) q`; p is the teacher, q the student.

    Its gradient is `(1 - beta) q * (log(q / m) - KL(q || m))`.
    Source: Agarwal et al. (arXiv 2306.13649), section 2.
    """
    lse = _log_softmax_(student, teacher, teacher_lse, group)
    of_teacher, of_student = math.log(beta), math.log1p(-beta)
    teacher += of_teacher
    student += of_student
    mixture = torch.logaddexp(teacher, student)
    ratio = (teacher - mixture).sub_(of_teacher)
    parts = [ratio.mul_(teacher.exp_()).sum(-1)]
    torch.sub(student, mixture, out=ratio).sub_(of_student)
    q = student.exp_()  # times 1 - beta
    parts.append(torch.mul(q, ratio, out=teacher).sum(-1))
    reduced = all_reduce(torch.stack(parts), dist.ReduceOp.SUM, group)
    q.mul_(ratio.sub_(reduced[1, :, None] / (1 - beta)))
    return reduced.sum(0).clamp_min_(0.0), lse


def _maxima(
    student: Tensor, teacher: Tensor, teacher_lse: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The largest logits, the student's in row 0; and what to take off the teacher's: its largest, or its known sum."""
    if teacher_lse is None:
        maxima = all_reduce(torch.stack([student.amax(-1), teacher.amax(-1)]), dist.ReduceOp.MAX, group)
        return maxima, maxima[1]
    return all_reduce(student.amax(-1)[None], dist.ReduceOp.MAX, group), teacher_lse


def _log_softmax_(
    student: Tensor, teacher: Tensor, teacher_lse: Tensor | None, group: dist.ProcessGroup | None
) -> Tensor:
    """Turns both into log-probabilities in place; returns the teacher's log-sum-exp."""
    maxima, shift = _maxima(student, teacher, teacher_lse, group)
    student -= maxima[0, :, None]
    teacher -= shift[:, None]
    sums = [student.exp().sum(-1)]
    if teacher_lse is None:
        sums.append(teacher.exp().sum(-1))
    logs = all_reduce(torch.stack(sums), dist.ReduceOp.SUM, group).log_()
    student -= logs[0, :, None]
    if teacher_lse is not None:
        return teacher_lse
    teacher -= logs[1, :, None]
    return shift + logs[1]
