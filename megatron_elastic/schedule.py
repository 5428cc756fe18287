"""The curriculum in Megatron's terms: the flags of each stage's own `pretrain()` run.

A recipe speaks of base samples; Megatron counts every base sample once a role. The factor is applied here and nowhere
else.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_elastic.backend import FLAG, LOCAL, TRANSFORMER_ENGINE, chosen_backend
from megatron_elastic.checkpoint import tracked
from megatron_elastic.config import Stage
from megatron_elastic.flags import to_argv

VERIFY_FLAG = "verify-integrity"
"""Megatron's flag for a manifest of SHA-256 digests beside every checkpoint, checked when it is loaded."""

LOCAL_BACKEND_FLAGS: Mapping[str, Any] = {
    FLAG: LOCAL,
    "no-persist-layer-norm": True,
    "no-gradient-accumulation-fusion": True,
    "no-masked-softmax-fusion": True,
    "no-bias-dropout-fusion": True,
    "no-bias-swiglu-fusion": True,
    "no-rope-fusion": True,
    "attention-backend": "unfused",
    "no-create-attention-mask-in-dataloader": True,
    "ckpt-format": "torch_dist",
}
"""What the local backend needs, unless a recipe says otherwise."""

ENGINE_BACKEND_FLAGS: Mapping[str, Any] = {
    **{flag: value for flag, value in LOCAL_BACKEND_FLAGS.items() if flag != "attention-backend"},
    FLAG: TRANSFORMER_ENGINE,
}
"""What Transformer Engine's backend needs: everything else is as on the local one, and it chooses its attention."""

BACKEND_FLAGS: Mapping[str, Mapping[str, Any]] = {LOCAL: LOCAL_BACKEND_FLAGS, TRANSFORMER_ENGINE: ENGINE_BACKEND_FLAGS}

STOP_FLAGS: Mapping[str, Any] = {"exit-signal-handler": True}
"""SIGTERM ends a run after the step it is in, with a checkpoint; a recipe may turn that off."""

ASYNC_SAVE_FLAGS: Mapping[str, Any] = {"async-strategy": "mcore", "use-persistent-ckpt-worker": True}
"""What a recipe's `async-save` needs, unless the recipe says otherwise: core's default strategy is a package apart, and
without the worker core saves synchronously after all."""

RESHARD_FLAGS: Mapping[str, Any] = {"dist-ckpt-optim-fully-reshardable": True}
"""What a recipe's `use-distributed-optimizer` needs to go on on another layout, unless the recipe says otherwise."""

CPU_FLAGS: Mapping[str, Any] = {"distributed-backend": "gloo", "use-cpu-initialization": True, "num-workers": 0}


def stage_flags(
    flags: Mapping[str, Any],
    stages: Sequence[Stage],
    number: int,
    *,
    roles: int,
    evaluation_roles: int,
    save: str,
    save_interval: int,
    eval_interval: int,
    eval_iterations: int,
    cuda: bool,
) -> dict[str, Any]:
    """All flags of one stage.

    Args:
        flags: the recipe's own.
        stages: the whole curriculum.
        number: the stage, from 1.
        roles: microbatches each base microbatch becomes (1 for plain training).
        evaluation_roles: the same in evaluation.
        save: checkpoint folder; loaded from when it holds a checkpoint.
        save_interval, eval_interval: optimizer steps.
        eval_iterations: global batches of base samples an evaluation.
        cuda: whether the ranks have GPUs.

    Raises:
        RecipeError: the flags ask for a backend that cannot be had here.
    """
    stage = stages[number - 1]
    total = sum(s.iterations * s.global_batch_size for s in stages)
    warmup = int(flags.get("lr-warmup-iters", 0)) * stages[0].global_batch_size
    made = {
        **BACKEND_FLAGS[chosen_backend(flags, cuda=cuda)],
        **STOP_FLAGS,
        **(ASYNC_SAVE_FLAGS if flags.get("async-save") else {}),
        **(RESHARD_FLAGS if flags.get("use-distributed-optimizer") else {}),
        **({} if cuda else CPU_FLAGS),
        VERIFY_FLAG: True,
        **flags,
        "train-iters": sum(s.iterations for s in stages[:number]),
        "seq-length": stage.sequence_length,
        "max-position-embeddings": max(s.sequence_length for s in stages),
        "global-batch-size": stage.global_batch_size * roles,
        "micro-batch-size": stage.micro_batch_size,
        "eval-global-batch-size": stage.global_batch_size * evaluation_roles,
        # The schedule runs over consumed samples: the same horizon in every stage, whatever its batch.
        "lr-decay-iters": max(1, round(total / stage.global_batch_size)),
        "lr-warmup-iters": round(warmup / stage.global_batch_size),
        "override-opt_param-scheduler": True,
        "eval-interval": eval_interval,
        "eval-iters": eval_iterations,
        "save": save,
        "save-interval": save_interval,
        "tensorboard-dir": flags.get("tensorboard-dir", str(Path(save) / "tensorboard")),
        "tensorboard-log-interval": flags.get("tensorboard-log-interval", 1),
    }
    if tracked(save):
        made["load"] = save
    if made[FLAG] == LOCAL:
        # Core leaves FP8 to Transformer Engine, and refuses experts in it without. The local stack quantises by itself.
        made["fp8-format"] = None
    return made


def stage_argv(*args: Any, **kwargs: Any) -> list[str]:
    """`stage_flags` as a command line."""
    return to_argv(stage_flags(*args, **kwargs))
