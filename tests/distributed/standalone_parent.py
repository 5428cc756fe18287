"""A small parent for tests of whole models in one process, described by a recipe's flags."""

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_elastic.checkpoint import write_checkpoint
from megatron_elastic.flags import LAYOUT_FLAGS, model_shape
from megatron_elastic.layout import Layout
from tests.unit import small_parent

BLOCKS = 4
FLAGS = {
    "hybrid-layer-pattern": "M-*|M-", "vocab-size": 60, "make-vocab-size-divisible-by": 8, "hidden-size": 24,
    "ffn-hidden-size": 32, "num-attention-heads": 8, "group-query-attention": True, "num-query-groups": 2,
    "kv-channels": 4, "mamba-num-heads": 8, "mamba-head-dim": 4, "mamba-num-groups": 2, "mamba-state-dim": 6,
    "squared-relu": True, "normalization": "RMSNorm", "position-embedding-type": "none",
    "untie-embeddings-and-output-weights": True, "disable-bias-linear": True, "hidden-dropout": 0.0,
    "attention-dropout": 0.0, "calculate-per-token-loss": True, "tensor-model-parallel-size": 2,
    "pipeline-model-parallel-size": 2, "sequence-parallel": True, "use-distributed-optimizer": True, "lr": 1e-3,
    "lr-warmup-iters": 10, "bf16": True,
}  # fmt: skip
WHOLE_FLAGS = {flag: value for flag, value in FLAGS.items() if flag not in LAYOUT_FLAGS}
"""Those of the model alone: on several ranks each holds all of it."""
SHAPE = model_shape(FLAGS, [])
assert SHAPE is not None
LAYOUT = Layout(SHAPE, BLOCKS)


def weights(layout: Layout = LAYOUT) -> dict[str, Tensor]:
    """Every parameter in fp64, as a function of its name."""
    found = {}
    for name, dimensions in layout.parameters().items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        value = torch.randn([d.size for d in dimensions], generator=generator, dtype=torch.float64)
        positive = any(key in name for key in ("norm", "A_log", "dt_bias", "mixer.D"))
        found[name] = torch.sigmoid(value) * 0.5 + 0.75 if positive else value * 0.3
    return found


def write(folder: Path, tensors: dict[str, Tensor], **other: Any) -> Path:
    """The parent's checkpoint."""
    return write_checkpoint(folder, small_parent.stored(tensors, LAYOUT), common={}, **other)


def tokens(seed: int = 3, *, samples: int = 2, length: int = 37) -> Tensor:
    """Tokens `[b, s]`."""
    return torch.randint(60, (samples, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: torch.nn.Module, text: Tensor, **other: Any) -> Tensor:
    """Logits `[b, s, V]` in evaluation mode."""
    model.eval()
    return model(text, torch.arange(text.shape[1]).expand(len(text), -1), None, **other)
