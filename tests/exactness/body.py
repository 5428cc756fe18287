"""One launch of the table of exactness: all layouts of the launch's number of ranks. Run under torchrun."""

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Writes rows as JSON on rank 0, and says on stderr how far it is."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--only", default="", help="part of a layout's name")
    parser.add_argument("--modes", nargs="+", required=True)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from megatron_elastic.cpu import adaptation

    adaptation.install()
    import torch
    import torch.distributed as dist

    from tests.exactness import layouts, model, run

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    wanted = {
        name: layout
        for name, layout in layouts.LAYOUTS.items()
        if layout.ranks == int(os.environ["WORLD_SIZE"]) and arguments.only in name
    }

    def kind(layout: layouts.Layout, mode: str) -> tuple[Any, ...]:
        return mode, layout.micro, torch.float32 if layout.distributed_optimizer else torch.float64

    # All references first: they run on each rank by itself, in other groups than the layouts.
    kinds = dict.fromkeys(kind(layout, mode) for layout in wanted.values() for mode in arguments.modes)
    references = {key: model.reference(*key) for key in kinds}
    rows = []
    # Layouts with the same groups follow each other.
    for name, layout in sorted(wanted.items(), key=lambda one: (one[1].tp, one[1].pp, one[1].vp, one[1].cp)):
        for mode in arguments.modes:
            start = time.monotonic()
            for quantity, found in run.errors(mode, layout, references[kind(layout, mode)]).items():
                limit, reason = layouts.tolerance(layout, quantity)
                ok = found["worst_error"] <= limit and found["fault_error"] > 0 and found["fault_error"] >= 100 * limit
                rows.append(
                    {"layout": name, "mode": mode, "quantity": quantity, **found, "tolerance": limit, "ok": ok,
                     "reason": reason}
                )  # fmt: skip
            if dist.get_rank() == 0:
                print(f"exactness: {name}, {mode}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        Path(arguments.out).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
