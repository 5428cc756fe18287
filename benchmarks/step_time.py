"""Time of an elastic step against the masked mode and against the stock model's plain step.

    python benchmarks/step_time.py [--json] [--profile] [--repeats N] [--ranks 1|2]

Runs on one process with two threads, and on two ranks (TP 2) with one each. A step is forward and backward: of the
teacher once and every budget sliced; of the same budgets masked, with the teacher run for each; of the stock parent.
Keys that begin with `cpu_` count processor time, which other work on the machine changes less than the clock.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = {3: (1.0, 0.75, 0.5), 4: (1.0, 0.75, 0.5, 0.25)}
"""Number of budgets -> their shares of the parent's forward FLOPs."""
RANKS = (1, 2)


def bounds(shares: Mapping[int, list[float]]) -> dict[str, float]:
    """What arithmetic allows, a forward of the parent being 1: speed-ups over masked, and plain steps."""
    found = {}
    for count, sizes in shares.items():
        joint = 1 + 3 * sum(sizes)
        found[f"bound_speedup_{count}_budgets"] = 4 * count / joint
        found[f"bound_plain_steps_{count}_budgets"] = joint / 3
    return found


def steps(profiled: bool) -> dict[str, Callable[[], None]]:
    """Every step to be timed, by name, on models of its own size."""
    from benchmarks import models
    from megatron_elastic.masks import one_hot

    data, elastic, stock = models.batch(), models.elastic_model(), models.stock_model()
    found = {"plain": models.plain_step(stock, data)}
    for count, shares in FAMILIES.items():
        chosen = [models.selection(share) for share in sorted(shares)]
        masks = [one_hot(one, models.family()) for one in chosen]
        found[f"sliced {count}"] = models.elastic_step(elastic, data, [{"selection": one} for one in chosen])
        found[f"masked {count}"] = models.elastic_step(
            elastic, data, [{"probabilities": one} for one in masks], teacher_for_each=True
        )
    if profiled:
        for share in models.SIZES:
            how = [{"selection": models.selection(share)}]
            found[f"budget {share}"] = models.elastic_step(elastic, data, how)
    return found


Seconds = dict[str, list[float]]
"""Name of a step -> its time in each turn."""


def timed(todo: Mapping[str, Callable[[], None]], repeats: int) -> tuple[Seconds, Seconds]:
    """Seconds of every step by the clock and of this process's processors.

    In turns, so that what else the machine does meets all of them alike.
    """
    import torch.distributed as dist

    wall: Seconds = {name: [] for name in todo}
    cpu: Seconds = {name: [] for name in todo}
    for turn in range(repeats + 1):
        for name, step in todo.items():
            dist.barrier()
            start, begun = time.perf_counter(), time.process_time()
            step()
            used = time.process_time() - begun
            dist.barrier()
            if turn:  # the first one warms up
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(used)
    return wall, cpu


def ratios(seconds: Seconds, prefix: str = "") -> dict[str, float]:
    """Medians over the turns of what was measured next to each other."""
    found = {}
    for count in FAMILIES:
        sliced, masked, plain = seconds[f"sliced {count}"], seconds[f"masked {count}"], seconds["plain"]
        found[f"{prefix}speedup_{count}_budgets"] = median(m / s for m, s in zip(masked, sliced, strict=True))
        found[f"{prefix}plain_steps_{count}_budgets"] = median(s / p for s, p in zip(sliced, plain, strict=True))
    return found


def profile(step: Callable[[], None]) -> str:
    """Self CPU time of every operation in one step."""
    import torch

    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as found:
        step()
    return str(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """One rank's part."""
    from megatron_elastic.cpu import adaptation

    adaptation.install()
    import torch

    from benchmarks import models

    torch.set_num_threads(2 // arguments.ranks)
    models.start(tp=arguments.ranks)
    todo = steps(arguments.profile)
    wall, cpu = timed(todo, arguments.repeats)
    result: dict[str, Any] = ratios(wall) | ratios(cpu, "cpu_")
    result["seconds"] = {name: min(values) for name, values in wall.items()}
    result["cpu_seconds"] = {name: min(values) for name, values in cpu.items()}
    if arguments.profile:
        for name in ("plain", "sliced 3"):
            print(f"{name}:\n{profile(todo[name])}", file=sys.stderr)
    return result


def launch(ranks: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs this file on some ranks, and returns what rank 0 found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable]
    if ranks > 1:
        words += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(port)]
    words += [str(Path(__file__)), "--ranks", str(ranks), "--repeats", str(arguments.repeats), "--work"]
    words += ["--profile"] if arguments.profile else []
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(2 // ranks), "PYTHONPATH": path}
    done = subprocess.run(words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Runs what is asked, and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--profile", action="store_true", help="tables of self CPU time by operation, on stderr")
    parser.add_argument("--repeats", type=int, default=2, help="turns, after one that warms up")
    parser.add_argument("--ranks", type=int, choices=RANKS, help="this number of ranks alone")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        found = work(arguments)
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(found))
        return
    runs = {ranks: launch(ranks, arguments) for ranks in RANKS if arguments.ranks in (None, ranks)}
    sys.path.insert(0, str(ROOT))
    from benchmarks import models

    shares = {count: [models.share_of_flops(models.selection(s)) for s in sizes] for count, sizes in FAMILIES.items()}
    limits = bounds(shares)
    report: dict[str, Any] = {"forward_flops": shares, **limits}
    for count in FAMILIES:
        for clock in ("", "cpu_"):  # the worse of one process and two ranks
            faster, steps_made = f"{clock}speedup_{count}_budgets", f"{clock}plain_steps_{count}_budgets"
            report[faster] = min(run[faster] for run in runs.values())
            report[steps_made] = max(run[steps_made] for run in runs.values())
        fraction = report[f"speedup_{count}_budgets"] / limits[f"bound_speedup_{count}_budgets"]
        report[f"fraction_of_bound_{count}_budgets"] = fraction
    report |= {f"ranks_{ranks}": run for ranks, run in runs.items()}
    if arguments.json:
        print(json.dumps(report))
        return
    for count, sizes in shares.items():
        print(f"{count} budgets of forward FLOPs {', '.join(f'{size:.3f}' for size in sizes)}")
        for ranks, run in runs.items():
            print(
                f"  {ranks} rank(s): {run[f'speedup_{count}_budgets']:.3f}x over masked "
                f"(bound {limits[f'bound_speedup_{count}_budgets']:.3f}), "
                f"{run[f'plain_steps_{count}_budgets']:.3f} plain steps "
                f"(arithmetic {limits[f'bound_plain_steps_{count}_budgets']:.3f}); by processor time "
                f"{run[f'cpu_speedup_{count}_budgets']:.3f}x and {run[f'cpu_plain_steps_{count}_budgets']:.3f}"
            )


if __name__ == "__main__":
    main()
