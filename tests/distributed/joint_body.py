"""The joint step on core's schedules against a plain loop: gradients of every weight and of the router, losses, keys.

torchrun --nproc-per-node 2: the reference runs on each rank by itself, then TP=2 and PP=2 run it together.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path


def main() -> None:
    """Runs every comparison and writes the errors as JSON on rank 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    out = parser.parse_args().out
    from megatron_elastic.cpu import adaptation

    adaptation.install()
    sys.path.insert(0, str(Path(__file__).parent))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    from joint_cases import run_all

    results = run_all()
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
