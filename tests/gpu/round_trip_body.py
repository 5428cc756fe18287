"""A family that travels between devices: what test_round_trip.py does in its own process, and on CPU ranks in others.

round_trip_body.py save|load FOLDER        under torchrun, on the CPU
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_elastic import checkpoint

SEED = 11


def elastic_family(jitter: float, device: torch.device) -> Any:
    """The small family's model with its router, both away from what they are built with by `jitter`."""
    from megatron_elastic.metadata import Metadata
    from megatron_elastic.model import FamilyState
    from megatron_elastic.router import Router, RouterConfig, RouterTrainer
    from tests.distributed import elastic_kit as kit

    torch.manual_seed(SEED)
    model = kit.elastic_model(dtype=torch.float32).to(device)
    kit.set_weights(model, kit.FAMILY.layout, kit.full_weights(kit.FAMILY.layout, jitter))
    trainer = RouterTrainer(Router(RouterConfig(iterations=10, width=8), kit.FAMILY).to(device), (0.5, 0.3, 0.2))
    for tensor in trainer.tensors().values():
        tensor.add_(jitter)
    model.states = (FamilyState(Metadata.of_family(kit.FAMILY, {}), trainer),)
    return model


def save(model: Any, path: Path) -> None:
    """Core's own saving."""
    from megatron.core import dist_checkpointing

    path.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(model.sharded_state_dict(), str(path), async_strategy="mcore", verify_integrity=True)


def load(model: Any, path: Path) -> None:
    """Core's own loading, any mismatch an error."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    wanted = {"model": model.sharded_state_dict()}
    found = dist_checkpointing.load(wanted, str(path), strict=StrictHandling.RAISE_ALL)
    model.load_state_dict(found["model"])


def cross_entropy(model: Any, device: torch.device) -> torch.Tensor:
    """Mean over the tokens of a batch, of a selection that is not the parent."""
    from tests.distributed import elastic_kit as kit

    batch = {key: value.to(device) for key, value in kit.batch().items()}
    batch["loss_mask"] = batch["loss_mask"].float()
    total: torch.Tensor = model(
        batch["tokens"], batch["position_ids"], selection=kit.SELECTIONS[1], labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )  # fmt: skip
    return total / batch["loss_mask"].sum()


def stored(path: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, by name."""
    found = checkpoint.find_checkpoint(path)
    return {name: checkpoint.read_tensor(found, name) for name in checkpoint.tensor_names(found)}


def main(what: str, folder: Path) -> None:
    """Saves a family, or loads the one that has been on the device and evaluates it."""
    from tests.distributed import elastic_kit as kit

    kit.layout_of_ranks(tp=torch.distributed.get_world_size())
    model = elastic_family(0.1 if what == "save" else 0.0, torch.device("cpu"))
    if what == "save":
        save(model, folder / "from_cpu")
        return
    load(model, folder / "stepped")
    with torch.no_grad():
        (folder / "loss.json").write_text(json.dumps(float(cross_entropy(model, torch.device("cpu")))))


if __name__ == "__main__":
    from megatron_elastic.cpu import adaptation

    adaptation.install_training()
    torch.distributed.init_process_group("gloo")
    main(sys.argv[1], Path(sys.argv[2]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
