"""Runs the cases of one module (`run_all`) under torchrun and writes their errors as JSON.

A launch costs seconds, so one carries all cases of a module: references run on each rank by itself, layouts together.
"""

import argparse
import contextlib
import importlib
import json
import sys
from pathlib import Path


def main() -> None:
    """Runs every comparison and writes the errors as JSON on rank 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", required=True, help="module beside this file")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    from megatron_elastic.cpu import adaptation

    adaptation.install()
    sys.path.insert(0, str(Path(__file__).parent))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = importlib.import_module(arguments.cases).run_all()
    if dist.get_rank() == 0:
        Path(arguments.out).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
