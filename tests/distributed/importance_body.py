"""Measures importance on every layout of `importance_kit`, one after the other in one launch; rank 0 writes it."""

import argparse
import contextlib
import pickle
from pathlib import Path


def main() -> None:
    """Layouts in the order of the kit; then one where a rank reads another rank's text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    from megatron_elastic.cpu import adaptation

    adaptation.install_training()
    import torch
    import torch.distributed as dist

    from megatron_elastic import megatron_compat, standalone
    from tests.distributed import importance_kit as kit

    megatron_compat.install()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, (flags, layout, checkpoint, samples) in kit.LAYOUTS.items():
        with standalone.split_groups({**flags, **layout}):
            scores = kit.measure(folder, {**flags, **layout}, checkpoint, samples)
        everywhere: list[bytes | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, pickle.dumps((scores.hidden.tolist(), scores.depth)))
        assert len(set(everywhere)) == 1, name
        if dist.get_rank() == 0:
            scores.save(folder / f"{name}.pt")
        if name == "EP 2 x PP 2":
            with standalone.split_groups({**flags, **layout}):
                again = kit.interrupted(folder, {**flags, **layout}, checkpoint, samples)
            assert scores.depth is not None
            assert (again.order, again.rounds) == (scores.depth.order, scores.depth.rounds)  # bit for bit
            assert again.layer_forwards > scores.depth.layer_forwards
    wrong = {**kit.EXPERT_FLAGS, **kit.EXPERT_LAYOUTS["EP 4"]}
    with standalone.split_groups(wrong):
        scores = kit.measure(folder, wrong, "experts", kit.SAMPLES, data_rank=max(0, dist.get_rank() - 1))
    if dist.get_rank() == 0:
        scores.save(folder / "another rank's text.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
