"""Peak memory of a joint step over that of the 100 % budget alone, plus the teacher's weights.

    python benchmarks/joint_memory.py [--json] [--stages 1|2]

Runs Megatron's own schedule with several base microbatches on one process, and on two pipeline stages (1F1B). Counted
are weights, gradient buffers and everything that torch's allocator hands out in a step, on the rank where the ratio is
largest.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STAGES = (1, 2)
BASE_MICROBATCHES = 2
PATTERN = "M-*-"
SHARES = (1.0, 0.75, 0.5, 0.25)
LENGTH = 128


def peak_of_step(model: Any, roles: list[dict[str, Any]], data: Mapping[str, Any]) -> int:
    """Most bytes that the allocator holds in one step beyond what was there before it.

    Args:
        model: under DDP.
        roles: what each base microbatch is run by: arguments of the model's forward, none for the teacher's turn.
        data: the batch, as `models.batch` makes it.
    """
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from benchmarks import memory

    chunk, tokens = model.module, data["tokens"].numel()
    where, last = (data["tokens"], data["position_ids"]), chunk.post_process
    kept: dict[str, Any] = {}

    def forward_step(microbatches: Iterator[dict[str, Any]], model: Any) -> tuple[Any, Any]:
        how = next(microbatches)
        zero, whole = (torch.tensor(number, dtype=torch.int, device=where[0].device) for number in (0, tokens))
        if not how:
            hidden = model(*where, run_teacher=True)
            if last:
                kept["target"] = chunk.teacher_target(hidden)
            return hidden, lambda output: (output.sum() * 0.0, zero, {})
        text = how.get("labels") is not None
        teacher = kept["target"] if last and not text else None
        out = model(*where, **how, teacher=teacher, loss_mask=data["loss_mask"])
        return out, lambda output: (output, whole, {})

    step = partial(
        get_forward_backward_func(),
        forward_step_func=forward_step,
        model=[model],
        num_microbatches=BASE_MICROBATCHES * len(roles),
        seq_length=data["tokens"].size(1),
        micro_batch_size=data["tokens"].size(0),
        forward_only=False,
    )

    def run() -> None:
        step(data_iterator=iter(roles * BASE_MICROBATCHES))
        kept.clear()

    return memory.peak_of(run)


def ratios(model: Any, budgets: list[dict[str, Any]], data: Mapping[str, Any]) -> dict[str, float]:
    """Bytes of a joint step, and over those of the full budget alone with the teacher's weights.

    Args:
        model: the family's, under DDP, with its teacher.
        budgets: arguments of the model's forward of every budget, the full one last.
        data: the batch.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    gradients = sum(buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in model.buffers)
    teacher = sum(p.numel() * p.element_size() for p in model.module.teachers[0].parameters())
    # Plain training of the parent: as many of its microbatches in flight as the schedule has.
    plain = [{**budgets[-1], "labels": data["labels"]}]
    peak_of_step(model, plain, data)  # what is made once (the pool of dummy gradients) is then there before the count
    alone = peak_of_step(model, plain, data)
    joint = peak_of_step(model, [{}, *budgets], data)
    held = weights + gradients + teacher
    return {
        "peak_over_single_budget": (held + joint) / (held + alone),
        "activations_over_single_budget": joint / alone,
        "joint": joint,
        "alone": alone,
        "weights": weights,
        "gradients": gradients,
        "teacher": teacher,
    }


def work(stages: int) -> dict[str, float]:
    """One rank's part."""
    from megatron_elastic.cpu import adaptation

    adaptation.install()
    import torch

    from benchmarks import models

    torch.set_num_threads(2 // stages)
    models.start(pp=stages)
    shape = replace(models.SHAPE, pattern=PATTERN)
    model = models.elastic_model(shape, LENGTH)
    budgets = [{"selection": models.selection(share, shape)} for share in sorted(SHARES)]
    measured = ratios(model, budgets, models.batch(length=LENGTH))
    found = torch.tensor(list(measured.values()))
    every = [torch.empty_like(found) for _ in range(stages)]
    torch.distributed.all_gather(every, found)
    return dict(zip(measured, max(every, key=lambda values: float(values[0])).tolist(), strict=True))


def launch(stages: int) -> dict[str, float]:
    """Runs this file on some ranks, and returns what rank 0 found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable]
    if stages > 1:
        words += ["-m", "torch.distributed.run", "--nproc-per-node", str(stages), "--master-port", str(port)]
    words += [str(Path(__file__)), "--stages", str(stages), "--work"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(2 // stages), "PYTHONPATH": path}
    done = subprocess.run(words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Runs what is asked, and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--stages", type=int, choices=STAGES, help="this number of pipeline stages alone")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        found = work(arguments.stages)
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(found))
        return
    runs = {stages: launch(stages) for stages in STAGES if arguments.stages in (None, stages)}
    worst = max(run["peak_over_single_budget"] for run in runs.values())
    report = {"peak_over_single_budget": worst, **{f"stages_{stages}": run for stages, run in runs.items()}}
    if arguments.json:
        print(json.dumps(report))
        return
    for stages, run in runs.items():
        print(
            f"{stages} stage(s): {run['peak_over_single_budget']:.3f}x the 100 % budget alone with the teacher's "
            f"weights ({run['activations_over_single_budget']:.3f}x without any weights and gradient buffers)"
        )


if __name__ == "__main__":
    main()
