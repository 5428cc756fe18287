"""Saves, rewrites and loads the plain model on 2 ranks; run by test_checkpoint.py."""

import sys
from pathlib import Path

import torch

from megatron_elastic import checkpoint, megatron_compat
from megatron_elastic.checkpoint import LazyTensor
from megatron_elastic.cpu import adaptation

CHANGED = "decoder.layers.2.mixer.in_proj.weight"
CHANGED_PART = f"{CHANGED}.x"


def rewrite(source: Path, target: Path, changed: str = "", names: dict[str, str] | None = None) -> None:
    """Reads a checkpoint and writes it again; adds 1 to the tensor `changed`, and renames by `names`."""

    def read(name: str) -> torch.Tensor:
        return checkpoint.read_tensor(source, name) + (1 if name == changed else 0)

    tensors = {
        (names or {}).get(name, name): LazyTensor(info.shape, info.dtype, lambda name=name: read(name))
        for name, info in checkpoint.model_tensor_names(source).items()
    }
    checkpoint.write_checkpoint(target, tensors, common=checkpoint.read_common(source))


def save(path: Path, **state) -> None:
    """Core's own saving; `path` is made on rank 0."""
    from megatron.core import dist_checkpointing

    if torch.distributed.get_rank() == 0:
        path.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(path), async_strategy="mcore")


def load(path: Path, model) -> dict[str, torch.Tensor]:
    """Loads the model, with every mismatch an error; returns its parameters."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    found = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(path), strict=StrictHandling.RAISE_ALL)
    model.load_state_dict(found["model"])
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def different(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names of the parameters that are not bitwise equal."""
    assert left.keys() == right.keys()
    return [name for name, tensor in left.items() if not torch.equal(tensor, right[name])]


def check_rewriting(root: Path) -> None:
    """A model saved on TP2, rewritten tensor by tensor, loads on TP2 and TP1 bit for bit."""
    from tests.distributed import plain_model

    args = {"tensor_model_parallel_size": 2, "hidden_size": 48}
    model = plain_model.build(tensor_parallel=2)
    saved = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    original = root / "original" / "iter_0000003"
    save(original, model=model.sharded_state_dict(), args=args, iteration=3)
    if torch.distributed.get_rank() == 0:
        rewrite(original, root / "again")
        rewrite(original, root / "changed", CHANGED_PART)
    torch.distributed.barrier()
    again, changed = (checkpoint.find_checkpoint(root / name) for name in ("again", "changed"))
    for world in (2, 1):
        first = load(original, plain_model.build(tensor_parallel=world, seed=5))
        assert not different(first, load(again, plain_model.build(tensor_parallel=world, seed=6)))
        assert different(first, load(changed, plain_model.build(tensor_parallel=world, seed=7))) == [CHANGED]
        if world == 2:
            assert not different(first, saved)
        elif torch.distributed.get_rank() == 0:
            torch.save(first, root / "whole.pt")


def trainer(seed: int):
    """The model under core's DDP with its distributed optimizer, fp32, DP2."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from tests.distributed import plain_model

    model = plain_model.build(seed=seed)
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-2, weight_decay=0.1, use_distributed_optimizer=True), [ddp]
    )

    def step(number: int) -> None:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        ddp(*plain_model.batch(seed=2 * number + torch.distributed.get_rank())).logsumexp(-1).mean().backward()
        finalize_model_grads([ddp], None)
        optimizer.step()

    return model, optimizer, step


def check_resuming(root: Path) -> None:
    """The distributed optimizer on torch's AdamW resumes bit for bit, with the mends and not without."""
    from megatron.core import dist_checkpointing, parallel_state

    names = [defect.name for defect in megatron_compat.DEFECTS if defect.present()]
    assert len(names) == len(megatron_compat.DEFECTS), names
    assert megatron_compat.install() == tuple(names)
    for kind in ("dp_reshardable", "fully_reshardable"):
        model, optimizer, step = trainer(seed=3)
        for number in range(2):
            step(number)
        metadata = {
            "distrib_optim_sharding_type": kind,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        state = model.sharded_state_dict(metadata=metadata)
        save(root / kind, model=state, optimizer=optimizer.sharded_state_dict(state, metadata=metadata))
        step(2)
        expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for skip in (False, True):
            model, optimizer, step = trainer(seed=4)
            state = model.sharded_state_dict(metadata=metadata)
            wanted = {"model": state}
            if not skip:
                wanted["optimizer"] = optimizer.sharded_state_dict(state, is_loading=True, metadata=metadata)
            found = dist_checkpointing.load(wanted, str(root / kind))
            model.load_state_dict(found["model"])
            if skip:
                optimizer.reload_model_params()
            else:
                optimizer.load_state_dict(found["optimizer"])
            step(2)
            resumed = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            assert bool(different(expected, resumed)) is skip, (kind, skip, different(expected, resumed))


def main() -> None:
    """All checks in one launch: the imports cost more than the checks."""
    adaptation.install()
    torch.distributed.init_process_group("gloo")
    root = Path(sys.argv[1])
    check_rewriting(root)
    check_resuming(root)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
