"""Writes a checkpoint whose tensors lie in several shards, as tensor-parallel ranks save them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint import metadata as index_format

from megatron_elastic.checkpoint import Disk, LazyTensor
from megatron_elastic.checkpoint.integrity import write_manifest
from megatron_elastic.checkpoint.reading import iteration_folder
from megatron_elastic.checkpoint.writing import _Writer
from megatron_elastic.metadata import KEY, Metadata


class _ShardedWriter(_Writer):
    """Splits every tensor that divides, along dimension 0, or along the last where its name asks for it."""

    def __init__(self, path: Path, disk: Disk, shards: int) -> None:
        super().__init__(path, disk)
        self.shards = shards

    def tensor(self, name: str, source: LazyTensor) -> None:
        value = source.read()
        dimension = value.dim() - 1 if name.endswith(("out_proj.weight", "linear_proj.weight", "fc2.weight")) else 0
        count = self.shards if value.shape[dimension] % self.shards == 0 else 1
        chunks, start = [], 0
        for piece in value.chunk(count, dimension):
            offset = [0] * value.dim()
            offset[dimension], start = start, start + piece.shape[dimension]
            chunks.append(index_format.ChunkStorageMetadata(torch.Size(offset), piece.shape))
            self._add(index_format.MetadataIndex(name, offset), piece.clone())
        properties = index_format.TensorProperties(dtype=value.dtype)
        self.entries[name] = index_format.TensorStorageMetadata(properties, value.shape, chunks)


def write(folder: Path, tensors: Mapping[str, LazyTensor], *, shards: int, metadata: Metadata | None = None) -> Path:
    """Stored tensors, each in `shards` shards; returns the folder of the iteration, which is 1."""
    path = iteration_folder(folder, 1)
    path.mkdir(parents=True)
    with Disk(read_again=False) as disk:
        writer = _ShardedWriter(path, disk, shards)
        for name, tensor in tensors.items():
            writer.tensor(name, tensor)
        if metadata is not None:
            packed = metadata.to_tensor()
            writer.tensor(KEY, LazyTensor(tuple(packed.shape), packed.dtype, lambda: packed))
        writer.object("common_state/shard_0_1", {"iteration": 1})
        writer.finish()
    write_manifest(path, writer.digests)
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    return path
