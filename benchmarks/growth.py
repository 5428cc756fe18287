"""How the time of an elastic step grows: with budgets, sequence length, depth and ranks, each against its arithmetic.

    python benchmarks/growth.py [--json] [--plot PATH] [--repeats N]

A step is forward and backward of every budget, sliced, and the teacher once. Its arithmetic is in forward FLOPs of
`cost_model`, LM head, causal attention and SSD included: of the teacher, three times those of each budget, and of the
teacher's LM head once more for every further budget. Budgets, lengths and depths run on one process with two threads;
one rank and two (TP 2) have one thread each. Everything is a ratio to the first of its series, whose steps are measured
in turns; `cpu_time` is processor time (on several ranks that of rank 0).
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATTERN = "M-*-"
LENGTH = 512
SHARES = (1.0, 0.75, 0.5, 0.25)
TWO = (1.0, 0.5)
"""Budgets where their number is not what grows."""
BUDGETS, LENGTHS, DEPTHS, RANKS = (1, 2, 3, 4), (256, 512, 1024, 2048), (4, 8, 12), (1, 2)
Series = dict[str, dict[int, Any]]
"""What grows -> how much of it -> a value."""


def points() -> dict[str, dict[int, tuple[tuple[float, ...], int, int]]]:
    """What grows -> how much of it -> budgets, sequence length, layers."""
    layers = len(PATTERN)
    return {
        "budgets": {count: (SHARES[:count], LENGTH, layers) for count in BUDGETS},
        "length": {length: (TWO, length, layers) for length in LENGTHS},
        "depth": {depth: (TWO, LENGTH, depth) for depth in DEPTHS},
    }


def arithmetic(shares: tuple[float, ...], length: int, layers: int) -> float:
    """Forward FLOPs of a step."""
    from benchmarks import models
    from megatron_elastic.cost_model import forward_flops_per_token

    shape = replace(models.SHAPE, pattern=PATTERN * (layers // len(PATTERN)))
    whole = forward_flops_per_token(shape, shape.full, length)
    sizes = sum(models.share_of_flops(models.selection(share, shape), shape, length) for share in shares)
    head = 2 * shape.vocab * shape.hidden
    return float(length * (whole * (1 + 3 * sizes) + head * (len(shares) - 1)))


def steps(series: dict[int, tuple[tuple[float, ...], int, int]]) -> dict[str, Callable[[], None]]:
    """The steps of a series, by how much of it there is."""
    from benchmarks import models

    made: dict[int, Any] = {}

    def step(shares: tuple[float, ...], length: int, layers: int) -> Callable[[], None]:
        shape = replace(models.SHAPE, pattern=PATTERN * (layers // len(PATTERN)))
        if layers not in made:
            made[layers] = models.elastic_model(shape, max(LENGTHS))
        how = [{"selection": models.selection(share, shape)} for share in sorted(shares)]
        return models.elastic_step(made[layers], models.batch(shape, length), how)

    return {str(much): step(*how) for much, how in series.items()}


def work(ranks: int, repeats: int) -> dict[str, list[list[Any]]]:
    """One rank's part: clock -> `[what grows, how much, seconds of each turn]`."""
    from megatron_elastic.cpu import adaptation

    adaptation.install()
    import torch

    from benchmarks import models, step_time

    alone = "ELASTIC_GROWTH_ALONE" in os.environ
    torch.set_num_threads(1 if alone else 2)
    models.start(tp=ranks)
    made: dict[str, list[list[Any]]] = {"time": [], "cpu_time": []}
    for what, series in ({"ranks": {ranks: (TWO, LENGTH, len(PATTERN))}} if alone else points()).items():
        for clock, found in zip(made, step_time.timed(steps(series), repeats), strict=True):
            made[clock] += [[what, much, seconds] for much, seconds in found.items()]
    return made


def launch(ranks: int, repeats: int, alone: bool) -> dict[str, list[list[Any]]]:
    """Runs this file on some ranks, `alone` one thread and one step each, and returns what rank 0 found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable]
    if ranks > 1:
        words += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(port)]
    words += [str(Path(__file__)), "--ranks", str(ranks), "--repeats", str(repeats), "--work"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment |= {"ELASTIC_GROWTH_ALONE": "1"} if alone else {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(repeats: int) -> dict[str, Series]:
    """`arithmetic`, `time` and `cpu_time`: what grows -> how much of it -> ratio to the first one."""
    found: dict[str, Series] = {"arithmetic": {}, "time": {}, "cpu_time": {}}
    for what, series in points().items():
        flops = {much: arithmetic(*how) for much, how in series.items()}
        found["arithmetic"][what] = {much: value / flops[min(flops)] for much, value in flops.items()}
    seconds = launch(1, repeats, alone=False)
    ranks = {count: launch(count, repeats, alone=True) for count in RANKS}
    for clock, values in seconds.items():
        for what in points():
            turns = {int(much): each for name, much, each in values if name == what}
            first = turns[min(turns)]
            found[clock][what] = {
                much: median(a / b for a, b in zip(each, first, strict=True)) for much, each in turns.items()
            }
        alone = {count: median(each[clock][0][2]) for count, each in ranks.items()}
        found[clock]["ranks"] = {count: value / alone[1] for count, value in alone.items()}
    found["arithmetic"]["ranks"] = {count: 1 / count for count in RANKS}
    return found


def plot(found: dict[str, Series], path: Path) -> None:
    """A panel for each of what grows: measured and arithmetic."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = {"budgets": "budgets", "length": "tokens of a sequence", "depth": "layers", "ranks": "ranks (TP)"}
    figure, panels = plt.subplots(1, len(names), figsize=(11, 2.8), layout="constrained")
    for panel, (what, label) in zip(panels, names.items(), strict=True):
        for kind, style in (("arithmetic", "k--"), ("time", "C0o-"), ("cpu_time", "C1.:")):
            series = found[kind][what]
            panel.plot(list(series), list(series.values()), style, label=kind.replace("_", " "))
        panel.set_xticks(list(found["time"][what]), list(map(str, found["time"][what])))
        panel.set_xlabel(label)
        panel.set_ylim(bottom=0)
    panels[0].set_ylabel("step, first = 1")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Runs what is asked, and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        made = work(arguments.ranks, arguments.repeats)
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(made))
        return
    sys.path.insert(0, str(ROOT))
    found = measure(arguments.repeats)
    if arguments.plot is not None:
        plot(found, arguments.plot)
    if arguments.json:
        print(json.dumps(found))
        return
    for what, series in found["arithmetic"].items():
        for much, value in series.items():
            over = found["time"][what][much] / value
            print(
                f"{what:<8} {much:>5}: {found['time'][what][much]:6.3f} (processor time "
                f"{found['cpu_time'][what][much]:6.3f}), arithmetic {value:6.3f}: {over:.3f}x"
            )


if __name__ == "__main__":
    main()
