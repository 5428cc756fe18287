"""Memory and time of the distillation loss on a GPU, against its unfused reference and modelopt's.

    python benchmarks/gpu_kd_loss.py [--json] [--tokens N] [--hidden H]

In bf16, from hidden states: into each go hidden states and LM heads, out of each come the gradients of the student's.
Bytes are those of the allocator's peak beyond what goes in, the gradients included, in units of one fp32 tensor
`[s, V]`. Times are medians, and ratios to ours. LM heads are not quantised: there is no `--fp8` here.
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from benchmarks import gpu_common, kd_loss, memory
from megatron_elastic.ops.kd_loss import kd_loss as fused
from megatron_elastic.ops.kd_loss import kd_loss_ref as unfused

SMOKE_VOCABULARY = 512


def losses(tokens: int, hidden: int, vocabulary: int) -> dict[str, Callable[[], object]]:
    """Each loss with its gradients on the same numbers, by name."""
    device = torch.device(torch.cuda.current_device())
    made = [t.detach().bfloat16().to(device) for t in kd_loss.inputs(tokens, hidden, vocabulary=vocabulary)]
    student, head, teacher, teacher_head, mask = made
    of = student.requires_grad_(), head.requires_grad_()

    def ours() -> object:
        return torch.autograd.grad(fused(*of, teacher, teacher_head, mask)[0], of)

    def reference() -> object:
        return torch.autograd.grad(unfused(*of, teacher, teacher_head, mask)[0], of)

    def modelopts(loss: Callable[..., tuple[Tensor, ...]]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                target = teacher @ teacher_head.t()
            return torch.autograd.grad(loss(student @ head.t(), target)[0].sum(), of)

        return run

    theirs = {f"modelopt{ending}": modelopts(loss) for ending, loss in kd_loss.modelopt_losses(vocabulary).items()}
    return {"ours": ours, "reference": reference, **theirs}


def start_groups(asked: argparse.Namespace) -> None:
    """modelopt's losses ask for Megatron's groups."""
    gpu_common.start(asked)
    from benchmarks import models

    models.start()


def main() -> None:
    """Measures, and prints."""
    parser = gpu_common.parser(__doc__)
    parser.add_argument("--hidden", type=int, default=4096, help="the models' hidden size")
    asked = parser.parse_args()
    if asked.fp8:
        parser.error("--fp8: LM heads are not quantised")
    start_groups(asked)
    hidden, vocabulary = (32, SMOKE_VOCABULARY) if asked.smoke else (asked.hidden, kd_loss.VOCABULARY)
    todo = losses(asked.tokens, hidden, vocabulary)
    report = {"card": gpu_common.card(), "s": asked.tokens, "hidden": hidden, "vocabulary": vocabulary}
    for name, run in todo.items():
        run()
        report[f"peak_over_logits {name}"] = memory.peak_of(run) / (asked.tokens * vocabulary * 4)
    found = {name: median(values) for name, values in gpu_common.seconds(todo, asked.repeats).items()}
    for name, value in found.items():
        report[f"seconds {name}"] = value
        report[f"time_over_ours {name}"] = value / found["ours"]
    gpu_common.show(asked, report)


if __name__ == "__main__":
    main()
