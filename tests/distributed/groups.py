"""Megatron's parallel groups in one process after another layout's: kept where they are the same, else made anew."""

import os
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

_MADE: list[dict[str, Any]] = []


def make_groups(**sizes: Any) -> None:
    """The groups of a layout, and Megatron's random states from their beginning.

    Groups that are only forgotten keep their threads, and every one of them costs time on two cores. So all of
    torch.distributed is made anew, on the launcher's own store.

    Args:
        sizes: as `initialize_model_parallel` takes them.
    """
    world = torch.distributed.get_world_size()
    if not _MADE or _MADE[-1] != sizes or not parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
        if _MADE and world > 1:
            rank = torch.distributed.get_rank()
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = torch.distributed.TCPStore(*address, is_master=False)
            fresh = torch.distributed.PrefixStore(f"groups-{len(_MADE)}", store)
            torch.distributed.init_process_group("gloo", store=fresh, rank=rank, world_size=world)
        parallel_state.initialize_model_parallel(**sizes)
        _MADE.append(sizes)
    model_parallel_cuda_manual_seed(7)
