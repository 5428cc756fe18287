"""A small parent's checkpoint for tests that need torch alone: every weight differs from every other."""

from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

from megatron_elastic.checkpoint import LazyTensor, stored_names, write_checkpoint
from megatron_elastic.layout import Layout, ModelShape
from megatron_elastic.metadata import Metadata

SHAPE = ModelShape(
    pattern="M-*", vocab=10, hidden=12, ffn=16, attention_heads=8, query_groups=2, head_dim=3,
    mamba_heads=8, mamba_head_dim=2, mamba_groups=2, mamba_state=3,
)  # fmt: skip
BLOCKS = 4
LAYOUT = Layout(SHAPE, BLOCKS)
FLAGS = {
    "hybrid-layer-pattern": "M-*", "vocab-size": 10, "hidden-size": 12, "ffn-hidden-size": 16, "num-attention-heads": 8,
    "group-query-attention": True, "num-query-groups": 2, "kv-channels": 3, "mamba-num-heads": 8, "mamba-head-dim": 2,
    "mamba-num-groups": 2, "mamba-state-dim": 3, "squared-relu": True, "normalization": "RMSNorm",
}  # fmt: skip


def weights(layout: Layout = LAYOUT) -> dict[str, Tensor]:
    """Every parameter filled with numbers that occur nowhere else (exact in fp32)."""
    found, start = {}, 1
    for name, dimensions in layout.parameters().items():
        size = [dimension.size for dimension in dimensions]
        count = torch.Size(size).numel()
        found[name] = torch.arange(start, start + count, dtype=torch.float32).view(size)
        start += count
    assert start < 2**24
    return found


def stored(tensors: dict[str, Tensor], layout: Layout) -> dict[str, LazyTensor]:
    """Parameters by stock name -> what is stored of them: Mamba's in parts."""
    dimensions, found = layout.parameters(), {}
    for stock, tensor in tensors.items():
        names = stored_names(stock)
        parts = tensor.split(dimensions[stock][0].part_sizes()) if len(names) > 1 else [tensor]
        for name, part in zip(names, parts, strict=True):
            found[name] = LazyTensor(tuple(part.shape), part.dtype, lambda part=part: part)  # type: ignore[misc]
    return found


def write(
    folder: Path, tensors: dict[str, Tensor], *, metadata: Metadata | None = None, layout: Layout = LAYOUT
) -> Path:
    """A checkpoint as Megatron writes it, with the arguments of a run."""
    args = Namespace(hidden_size=SHAPE.hidden, consumed_train_samples=640, iteration=20, num_layers=3, lr=0.1)
    return write_checkpoint(folder, stored(tensors, layout), common={"args": args}, metadata=metadata, iteration=20)
