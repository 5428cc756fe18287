"""Saves, rewrites and loads the plain model on 2 ranks; run by test_checkpoint.py."""

import os
import sys
from pathlib import Path

import pytest
import torch

from megatron_elastic import checkpoint, megatron_compat
from megatron_elastic.checkpoint import FUSED_NORMS, LazyTensor
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
    dist_checkpointing.save(state, str(path), async_strategy="mcore", verify_integrity=True)


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
        else:
            model = plain_model.build(tensor_parallel=1, seed=8)
            load(original, model)
            save(root / "one" / "iter_0000003", model=model.sharded_state_dict(), args=args, iteration=3)
        check_fused_norms(root, original, world, first)
        if world == 2:
            continue
        if torch.distributed.get_rank() == 0:
            torch.save(first, root / "whole.pt")


def check_fused_norms(root: Path, original: Path, world: int, expected: dict[str, torch.Tensor]) -> None:
    """A parent with Transformer Engine's names loads unchanged by its stock names; one changed norm shows."""
    from megatron.core.dist_checkpointing.core import CheckpointingException

    from megatron_elastic.training import load_parent
    from tests.distributed import plain_model

    fused, norm = root / f"fused-{world}", "decoder.layers.0.norm.weight"
    if torch.distributed.get_rank() == 0:
        names = {}
        for name in checkpoint.model_tensor_names(original):
            for end, stock in FUSED_NORMS.items():
                block = end.split(".")[0]
                own = any(each.startswith(name.removesuffix(stock) + block) for each in expected)
                if name.endswith(f".{stock}") and own and f"{block}.{stock}" not in name:
                    names[name] = name.removesuffix(stock) + end
        assert len(names) == len(plain_model.PATTERN), names
        rewrite(original, fused, names=names)
        rewrite(original, root / f"changed-{world}", norm, names)
    torch.distributed.barrier()
    found = checkpoint.find_checkpoint(fused)
    assert "decoder.layers.0.mixer.in_proj.layer_norm_weight" in checkpoint.model_tensor_names(found)
    model = plain_model.build(tensor_parallel=world, seed=9)
    load_parent(model, fused)
    assert not different(expected, dict(model.named_parameters()))
    load_parent(model, root / f"changed-{world}")
    assert different(expected, dict(model.named_parameters())) == [norm]
    load_parent(model, original)
    assert not different(expected, dict(model.named_parameters()))
    with pytest.raises(CheckpointingException, match=r"norm\.weight"):
        load(found, model)  # core itself does not look for them under those names


def check_stock_loading(root: Path) -> None:
    """An extracted model loads in the stock model by Megatron's own parser, builder and `load_checkpoint`, strictly."""
    import megatron.training.global_vars as megatron_globals
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, model_parallel_cuda_manual_seed
    from megatron.training.argument_utils import hybrid_config_from_args
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

    from megatron_elastic import standalone
    from megatron_elastic.budget import Selection
    from megatron_elastic.extraction import cut
    from megatron_elastic.flags import to_argv
    from megatron_elastic.layers.plain import plain_stack_spec
    from megatron_elastic.schedule import CPU_FLAGS, LOCAL_BACKEND_FLAGS
    from tests.distributed import standalone_parent as parent
    from tests.unit import small_parent

    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)  # core keeps the choice of the models before in the environment
    folder = root / "extracted"
    if torch.distributed.get_rank() == 0:
        # With the arguments that Megatron would have saved, which its `load_checkpoint` compares.
        checkpoint.write_checkpoint(
            root / "whole-parent",
            small_parent.stored(parent.weights(), parent.LAYOUT),
            common={"args": standalone._arguments(parent.WHOLE_FLAGS, torch.float32)},
        )
        cut(
            root / "whole-parent", folder, shape=parent.SHAPE, ffn_blocks=parent.BLOCKS, flags=parent.FLAGS,
            selection=Selection.from_dict(
                {**parent.SHAPE.full, "hidden": 15, "ffn": 20, "mamba_heads": 6, "attention_heads": 2}
            ),
        )  # fmt: skip
    torch.distributed.barrier()
    described = checkpoint.read_metadata(checkpoint.find_checkpoint(folder))
    assert described is not None
    text, expected = parent.tokens(), None
    for world in (1, 2):
        of_this_run = {
            **LOCAL_BACKEND_FLAGS, **CPU_FLAGS, "tensor-model-parallel-size": world, "pipeline-model-parallel-size": 1,
            "sequence-parallel": False, "use-distributed-optimizer": False, "bf16": False, "micro-batch-size": 1,
            "seq-length": 37, "max-position-embeddings": 37, "train-iters": 1, "load": folder, "no-load-optim": True,
            "no-load-rng": True, "verify-integrity": True, "dist-ckpt-strictness": "raise_unexpected",
        }  # fmt: skip
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
        model_parallel_cuda_manual_seed(3)
        if expected is None:
            ours = standalone.build_plain_model(described.flags)  # what `evaluate` runs
            standalone.load_weights(ours, folder)
            expected = parent.logits(ours, text)
        sys.argv = ["pretrain", *to_argv({**described.flags, **of_this_run})]
        args = parse_args()
        validate_args(args)
        megatron_globals.set_args(args)
        num_microbatches_calculator.init_num_microbatches_calculator(
            args.rank, None, args.global_batch_size, args.micro_batch_size, args.data_parallel_size
        )
        config = hybrid_config_from_args(args, model_config_cls=HybridModelConfig)
        config.hybrid_stack_spec = plain_stack_spec  # there is no Transformer Engine here
        model = HybridModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
        assert load_checkpoint([model], None, None, strict=True) == (0, 0)
        found = gather_from_tensor_model_parallel_region(parent.logits(model, text))
        # fp32: two ranks sum in another order.
        tolerance = 0.0 if world == 1 else 1e-5
        assert float((found - expected).abs().max() / expected.abs().max()) <= tolerance
        with torch.no_grad():
            model.decoder.layers[0].mixer.A_log += 0.1
        changed = gather_from_tensor_model_parallel_region(parent.logits(model, text))
        assert float((changed - expected).abs().max() / expected.abs().max()) > 1e-3
        num_microbatches_calculator.destroy_num_microbatches_calculator()
        megatron_globals._GLOBAL_ARGS = None


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
    adaptation.install_training()
    torch.distributed.init_process_group("gloo")
    root = Path(sys.argv[1])
    check_rewriting(root)
    check_resuming(root)
    check_stock_loading(root)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
