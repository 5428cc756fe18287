"""Measures the memory that extraction and sorting take; run by test_extraction_memory.py in a process of its own."""

import functools
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_elastic.budget import Selection
from megatron_elastic.checkpoint import LazyTensor, parameters, read_parameter, stored_names
from megatron_elastic.extraction import cut
from megatron_elastic.layout import Layout, ModelShape
from megatron_elastic.sorting import random_orders, sort_checkpoint
from tests.unit import sharded

MIB = 1 << 20


def shape(size: int) -> ModelShape:
    """Embedding `[size, 512]`, and z and x of `in_proj` as large."""
    return ModelShape(
        pattern="M", vocab=size, hidden=512, ffn=8, attention_heads=2, query_groups=1, head_dim=2,
        mamba_heads=8, mamba_head_dim=size // 8, mamba_groups=2, mamba_state=4,
    )  # fmt: skip


def status(field: str) -> int:
    """A field of this process's memory, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak(run: Callable[[], object]) -> int:
    """Bytes of memory that `run` takes at its peak, on top of what is there before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def write(folder: Path, size: int, shards: int) -> None:
    """A parent of that shape, tensors made when their turn comes."""
    tensors = {}
    for stock, dimensions in Layout(shape(size), 1).parameters().items():
        names, rest = stored_names(stock), [dimension.size for dimension in dimensions[1:]]
        rows = dimensions[0].part_sizes() if len(names) > 1 else [dimensions[0].size]
        for name, count in zip(names, rows, strict=True):
            one = (count, *rest)
            tensors[name] = LazyTensor(one, torch.float32, lambda one=one: torch.full(one, 1.0))  # type: ignore[misc]
    sharded.write(folder, tensors, shards=shards)


def extract(source: Path, out: Path, size: int, kept: dict[str, int]) -> None:
    """Cuts a submodel."""
    full = shape(size)
    cut(source, out, shape=full, ffn_blocks=1, flags={}, selection=Selection.from_dict({**full.full, **kept}))


def sort(source: Path, out: Path, size: int) -> None:
    """Sorts into a random order."""
    layout = Layout(shape(size), 1)
    sort_checkpoint(source, out, shape=shape(size), ffn_blocks=1, flags={}, orders=random_orders(layout, 1))


def main() -> None:
    """Prints what was measured: name -> bytes, and `largest`, the bytes of the largest stored tensor."""
    size, half = int(sys.argv[1]), {"hidden": 256, "mamba_heads": 4}
    found = {"largest": size * 512 * 4}
    with tempfile.TemporaryDirectory(dir=sys.argv[2]) as folder:
        root = Path(folder)
        write(root / "tiny", 64, 2)
        extract(root / "tiny", root / "tiny-half", 64, half)  # what is imported and made once is no peak
        sort(root / "tiny", root / "tiny-sorted", 64)
        for shards in (2, 1):
            source = root / f"parent-{shards}"
            write(source, size, shards)
            out = root / f"half-{shards}"
            found[f"half of {shards}"] = peak(functools.partial(extract, source, out, size, half))
            if shards == 2:
                shutil.rmtree(source)
        found["sorted"] = peak(lambda: sort(source, root / "sorted", size))
        path, name = source / "iter_0000001", "decoder.layers.0.mixer.in_proj.weight"
        found["joined parameter"] = peak(lambda: read_parameter(path, name))
        found["whole model"] = peak(lambda: [read_parameter(path, name) for name in parameters(path)])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
