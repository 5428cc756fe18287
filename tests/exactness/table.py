"""Runs the table of exactness and writes it: what `bash tests/exactness.sh` starts."""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_elastic.flags import REFUSALS
from tests.exactness.layouts import LAYOUTS, MODES, REASONS

ROOT = Path(__file__).resolve().parents[2]
KEYS = ("layout", "mode", "quantity", "worst_error", "tolerance", "fault_error", "ok")
LAYOUT_FLAGS = (
    *("use-megatron-fsdp", "use-torch-fsdp2", "tp-comm-overlap"),
    *("defer-embedding-wgrad-compute", "delay-wgrad-compute", "cuda-graph-impl", "dataloader-type"),
    *("rampup-batch-size", "full-validation", "fp16", "cp-comm-type", "hierarchical-context-parallel-sizes"),
    *("hybrid-context-parallel", "num-experts"),
)
"""Refused flags that are about a layout."""

HEAD = """\
# Exactness: the same step on every layout

Made by `bash tests/exactness.sh`. A small family (pattern `{pattern}`, {parameters:,} parameters, two budgets, a
teacher that differs from the parent) makes {steps} optimizer steps of {samples} base samples on each layout,
through core's own schedules, DDP and optimizer, with the product's forward step; and a plain loop on one process
makes them too, without schedule, DDP, leaf copies or any code of a parallel layout. Same weights, same data
(through the role data set and Megatron's sampler arithmetic), same noise. Every axis of dense layers is narrowed,
depth included; MLPs and Mamba heads are chosen layer by layer, and the smaller slice leaves a layer out. Where
reductions overlap, DDP's buckets are smaller than a layer.

- Error: max|a - b| / max|b| of the worst tensor over all ranks. Gradients, penalty, selections and the first losses
  are those of the first step; Adam has a large epsilon, so that roundings of tiny gradients do not become steps of
  full size.
- Fault: the error of the same run when its last rank holds weights that are 20 % off and another router. It must be
  at least 100 times the tolerance, or the row could not fail.
- Soft: the router learns, with its noise. Sliced: selections are decided, and the router is frozen: it must not move,
  and has no gradient to compare. Joint: every budget on every batch. Sampled: one budget drawn for each base
  microbatch.
- Tolerances, by the word beside each:
{reasons}
- A tolerance of 0 asks for the same bits. "DP1" rows run core's schedule and DDP on one process.

Not on a GPU: every row ran on CPU ranks over gloo.
"""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def launch(ranks: int, *, modes: Sequence[str], only: str) -> list[dict[str, Any]]:
    """The rows of all layouts on so many ranks, from one start of the engine.

    Raises:
        SystemExit: the run failed; its output has been shown.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(ranks)]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(_free_port())]
        command += [str(Path(__file__).with_name("body.py")), "--out", str(out), "--only", only, "--modes", *modes]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        print("\n".join(line for line in done.stdout.splitlines() if line.startswith("exactness: ")), file=sys.stderr)
        if done.returncode:
            raise SystemExit(f"{ranks} rank(s): status {done.returncode}\n{done.stdout[-6000:]}")
        found: list[dict[str, Any]] = json.loads(out.read_text())
        return found


def rows(*, modes: Sequence[str] = MODES, ranks: Sequence[int] = (1, 2, 4), only: str = "") -> list[dict[str, Any]]:
    """The table, in the order of the layouts."""
    found: list[dict[str, Any]] = []
    for count in ranks:
        if any(layout.ranks == count and only in name for name, layout in LAYOUTS.items()):
            found += launch(count, modes=modes, only=only)
    order = {name: number for number, name in enumerate(LAYOUTS)}
    return sorted(found, key=lambda row: order[row["layout"]])


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """The table as a document."""
    from megatron_elastic.cost_model import parameters
    from tests.exactness import sizes

    reasons = "\n".join(f"  - *{key}*: {value}" for key, value in REASONS.items())
    text = HEAD.format(
        pattern=sizes.SHAPE.pattern,
        parameters=parameters(sizes.SHAPE, sizes.SHAPE.full),
        steps=sizes.STEPS,
        samples=sizes.SAMPLES,
        reasons=reasons,
    )
    good = sum(row["ok"] for row in table)
    lines = [text, f"{good} of {len(table)} rows hold.", ""]
    for name in dict.fromkeys(row["layout"] for row in table):
        lines += [f"## {name}", "", "| mode | quantity | worst error | tolerance | fault | holds |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in (row for row in table if row["layout"] == name):
            numbers = f"{row['worst_error']:.1e} | {row['tolerance']:.0e} ({row['reason']}) | {row['fault_error']:.1e}"
            lines.append(f"| {row['mode']} | {row['quantity']} | {numbers} | {'yes' if row['ok'] else '**no**'} |")
        lines.append("")
    lines += ["## Refused", "", "Flags about layouts that a recipe may not have, with the reason it is told:", ""]
    refused = [row for row in REFUSALS if row.flag in LAYOUT_FLAGS]
    lines += ["| flag | reason |", "|---|---|", *(f"| `{row.flag}` | {row.reason} |" for row in refused), ""]
    return "\n".join(lines)


def main() -> None:
    """Runs what is asked for; status 1 where a row does not hold."""
    parser = argparse.ArgumentParser(prog="tests/exactness.sh", description="Make the table of exactness.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="default: docs/exactness.md, for a whole table")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--ranks", nargs="+", type=int, default=(1, 2, 4))
    parser.add_argument("--only", default="", metavar="TEXT", help="layouts with this in their name")
    arguments = parser.parse_args()
    table = rows(modes=arguments.modes, ranks=arguments.ranks, only=arguments.only)
    whole = len(arguments.modes) == len(MODES) and {1, 2, 4} <= set(arguments.ranks) and not arguments.only
    target = arguments.markdown or (ROOT / "docs" / "exactness.md" if whole else None)
    if arguments.json:
        arguments.json.write_text(json.dumps([{key: row[key] for key in KEYS} for row in table], indent=1))
    if target:
        target.parent.mkdir(exist_ok=True)
        target.write_text(markdown(table))
    bad = [row for row in table if not row["ok"]]
    for row in bad:
        print({key: row[key] for key in KEYS})
    print(f"{len(table) - len(bad)} of {len(table)} rows hold" + (f"; written to {target}" if target else ""))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
