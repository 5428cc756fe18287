"""Memory and time of the distillation loss, against its unfused reference and modelopt's.

    python benchmarks/kd_loss.py [--json] [--kind KIND] [--beta B] [--ce-weight C] [--hidden K] [--repeats N]

Memory is in units of one fp32 tensor `[s, V]`, on one process, over what goes in and the gradients that come out. Into
our loss go hidden states and LM heads; into modelopt's go the logits of both models, two such tensors more, and out of
it comes the gradient of one, a third: what ends in `from_hidden` counts these too.
"""

import argparse
import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import Allocations, available
from megatron_elastic.curriculum import DIVERGENCES, DistillationLoss
from megatron_elastic.ops.kd_loss import kd_loss, kd_loss_ref
from megatron_elastic.ops.sliced_parameter import ExactGradient, dummy_gradient, sliced_parameter

VOCABULARY = 131072
TOKENS = 8192
TIMED_TOKENS = 512
"""For the time beside the unfused reference, which holds all logits of them."""
WIDTHS = (1.0, 0.75, 0.5)
"""Shares of the teacher's hidden size of the budgets; the first one alone, then all."""
UNFUSED_TENSORS = 16
"""Of `[s, V]`, a generous bound on what an unfused loss holds: it runs where three quarters of the free memory do."""


def inputs(tokens: int, hidden: int, width: float = 1.0) -> list[Tensor]:
    """Student's hidden states and head, the teacher's, the loss mask; logits have a spread of about two."""
    generator = torch.Generator().manual_seed(0)
    kept = int(hidden * width)
    shapes = [(tokens, 1, kept), (VOCABULARY, kept), (tokens, 1, hidden), (VOCABULARY, hidden)]
    made = [torch.randn(*shape, generator=generator) for shape in shapes]
    for head in made[1::2]:
        head *= 2.0 / head.size(1) ** 0.5
    return [made[0].requires_grad_(), made[1].requires_grad_(), *made[2:], torch.ones(tokens, 1)]


def labels(tokens: int) -> Tensor:
    """Labels all over the vocabulary, `[s, 1]`."""
    return (torch.arange(tokens) * 7919 % VOCABULARY)[:, None]


def ours(budgets: list[list[Tensor]], loss: DistillationLoss) -> list[float]:
    """Peaks of the loss and its gradients after each budget in turn, one teacher's log-sum-exp for all."""
    tokens, made, known, ends = budgets[0][0].size(0), list[Tensor](), None, list[Tensor]()
    targets = labels(tokens)
    with Allocations() as allocations:
        for budget in budgets:
            total, known = kd_loss(*budget, loss=loss, labels=targets, teacher_lse=known)
            made += torch.autograd.grad(total * 0.5, budget[:2])
            ends.append(torch.empty(1))
    return [allocations.peak(made, until=end) / (tokens * VOCABULARY * 4) for end in ends]


def in_bfloat16(tokens: int, hidden: int, loss: DistillationLoss) -> float:
    """The peak of one budget in bf16, on a slice of a parameter as in training.

    What comes out is the gradient of the hidden states in bf16 and that of the weight in fp32, which the slice takes.
    The zeros that autograd carries in the latter's place are the process' own, and were there before.
    """
    student, head, teacher, teacher_head, mask = (tensor.detach().bfloat16() for tensor in inputs(tokens, hidden))
    student.requires_grad_()
    head.requires_grad_()
    dummy_gradient(head)
    with Allocations() as allocations:
        kept = sliced_parameter(head)
        total, _ = kd_loss(student, kept, teacher, teacher_head, mask, loss=loss, labels=labels(tokens))
        made = [*torch.autograd.grad(total * 0.5, (student, kept)), ExactGradient.of(kept).value]
    assert made[-1].dtype == torch.float32
    return allocations.peak(made) / (tokens * VOCABULARY * 4)


def modelopt_losses() -> dict[str, Callable[..., Any]]:
    """modelopt's losses by the ending of their names here."""
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss, TopKLogitsKLLoss

    config = SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False)
    return {"": LogitsKLLoss(config), "_topk": TopKLogitsKLLoss(config, top_k=1024)}


def modelopts(tokens: int, hidden: int) -> dict[str, float]:
    """Peaks of modelopt's losses: on given logits, and with the LM heads that make them."""
    found: dict[str, float] = {}
    for ending, loss in modelopt_losses().items():
        student, head, teacher, teacher_head, _ = inputs(tokens, hidden)
        with torch.no_grad():
            logits, targets = student @ head.t(), teacher @ teacher_head.t()
        logits.requires_grad_()
        with Allocations() as allocations:
            made = torch.autograd.grad(loss(logits, targets)[0].sum(), logits)
        size = logits.untyped_storage().nbytes()
        found[f"peak_over_logits_modelopt{ending}"] = allocations.peak(made) / size
        found[f"peak_with_gradient_over_logits_modelopt{ending}"] = allocations.peak() / size
        del logits, targets, made, allocations
        with Allocations() as allocations:
            with torch.no_grad():
                targets = teacher @ teacher_head.t()
            made = torch.autograd.grad(loss(student @ head.t(), targets)[0].sum(), (student, head))
        found[f"peak_over_logits_modelopt{ending}_from_hidden"] = allocations.peak(made) / size
        del targets, made, allocations
    return found


def over_reference(tokens: int, hidden: int, loss: DistillationLoss, repeats: int) -> dict[str, float]:
    """Least time of the loss and its gradients over the unfused reference's, run in turns.

    By the clock, and by what this process had of the processors: where others use the machine, only the latter says
    anything.
    """
    budget, targets, best = inputs(tokens, hidden), labels(tokens), dict[tuple[str, Any], float]()
    clocks = {"time": time.perf_counter, "cpu_time": time.process_time}
    for _ in range(repeats):
        for function in (kd_loss, kd_loss_ref):
            start = {name: clock() for name, clock in clocks.items()}
            total, _ = function(*budget, loss=loss, labels=targets)
            made = torch.autograd.grad(total, budget[:2])
            for name, clock in clocks.items():
                passed = clock() - start[name]
                best[name, function] = min(best.get((name, function), passed), passed)
            del total, made
    return {f"{name}_over_reference": best[name, kd_loss] / best[name, kd_loss_ref] for name in clocks}


def measure(hidden: int, loss: DistillationLoss, repeats: int) -> dict[str, Any]:
    """Every number, by its name."""
    fits = [tokens for tokens in (1024, 512, 256) if UNFUSED_TENSORS * tokens * VOCABULARY * 4 < 0.75 * available()]
    unfused = fits[0] if fits else 128
    budgets = [inputs(TOKENS, hidden, width) for width in WIDTHS]
    peaks = ours(budgets, loss)
    del budgets
    found: dict[str, Any] = {
        "s": TOKENS,
        "vocabulary": VOCABULARY,
        "hidden": hidden,
        "loss": vars(loss),
        "peak_over_logits": peaks[0],
        f"peak_over_logits_{len(WIDTHS)}_budgets": peaks[-1],
        "peak_over_logits_bf16": in_bfloat16(TOKENS, hidden, loss),
    }
    return {
        **found,
        **over_reference(TIMED_TOKENS, hidden, loss, repeats),
        "s_time": TIMED_TOKENS,
        "s_modelopt": unfused,
        **modelopts(unfused, hidden),
    }


def main() -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object on one line")
    parser.add_argument("--kind", choices=DIVERGENCES, default="forward_kl")
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--ce-weight", type=float, default=0.0)
    parser.add_argument("--hidden", type=int, default=256, help="the teacher's hidden size")
    parser.add_argument("--repeats", type=int, default=5, help="of the timed runs")
    asked = parser.parse_args()
    loss = DistillationLoss(kind=asked.kind, beta=asked.beta, ce_weight=asked.ce_weight)
    start = time.perf_counter()
    found = measure(asked.hidden, loss, asked.repeats)
    found["seconds"] = time.perf_counter() - start
    found = {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}
    if asked.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:<50} {value}")


if __name__ == "__main__":
    main()
