"""Time and memory of extraction and export, against a plain copy of the files that they write.

    python benchmarks/extraction.py [--json] [--folder DIR] [--turns N] [--warm]

A family of 2.3 GiB in bf16 is written first. Extraction and export of its 100 % budget, with and without verification,
are compared with copying what they wrote file by file: read, written, synchronised. Before each of them the operating
system is made to forget every file (with --warm it is made to read the sources): all begin alike, and end with an fsync
of every file. Memory is what comes on top of the process after its imports, by torch's allocator and as resident pages.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import Allocations
from megatron_elastic.budget import Budget, Selection
from megatron_elastic.checkpoint import LazyTensor, find_checkpoint, stored_names, tensor_names, write_checkpoint
from megatron_elastic.extraction import extract_budget
from megatron_elastic.family import Family
from megatron_elastic.hf.exporting import export_model
from megatron_elastic.layout import ModelShape
from megatron_elastic.metadata import Metadata

SHAPE = ModelShape(
    pattern="M-M-M*-M-" * 4, vocab=16384, hidden=2048, ffn=10752, attention_heads=32, query_groups=8, head_dim=64,
    mamba_heads=64, mamba_head_dim=64, mamba_groups=2, mamba_state=128,
)  # fmt: skip
HALF = {"hidden": 1536, "ffn": 6656, "mamba_heads": 40, "attention_heads": 24}
FLAGS: dict[str, Any] = {
    "squared-relu": True, "normalization": "RMSNorm", "position-embedding-type": "none", "bf16": True,
    "untie-embeddings-and-output-weights": True, "disable-bias-linear": True, "hybrid-layer-pattern": SHAPE.pattern,
    "max-position-embeddings": 8192, "seq-length": 8192,
}  # fmt: skip
BLOCK = 4 << 20
"""Bytes that the copy reads and writes at once."""
CONSTANT = 64 << 20
"""Bytes beside twice the largest tensor: blocks that are copied at once, buffers, what the C library keeps."""


def write_family(folder: Path) -> None:
    """The family, two budgets, its weights made of one block of noise."""
    choices = {axis: tuple(sorted({size, SHAPE.full[axis]}, reverse=True)) for axis, size in HALF.items()}
    family = Family(shape=SHAPE, ffn_blocks=8, choices=choices, budgets=(Budget("p100", 1.0), Budget("small", 0.55)))
    selections = tuple(Selection.from_dict({**SHAPE.full, **kept}) for kept in ({}, HALF))
    described = Metadata.of_family(family, FLAGS, selections=selections, stage=1)
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(1)).bfloat16()

    def lazy(shape: tuple[int, ...]) -> LazyTensor:
        def made() -> Tensor:
            return noise.repeat(-(-prod(shape) // noise.numel()))[: prod(shape)].view(shape)

        return LazyTensor(shape, torch.bfloat16, made)

    tensors = {}
    for stock, dimensions in family.layout.parameters().items():
        names, rest = stored_names(stock), tuple(dimension.size for dimension in dimensions[1:])
        rows = dimensions[0].part_sizes() if len(names) > 1 else [dimensions[0].size]
        tensors.update({name: lazy((count, *rest)) for name, count in zip(names, rows, strict=True)})
    write_checkpoint(folder, tensors, common={}, metadata=described, iteration=1, verify=False)


def files(folder: Path) -> list[Path]:
    """Every file under a folder."""
    return sorted(file for file in folder.rglob("*") if file.is_file())


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in files(folder))


def prepare(folder: Path, warm: bool) -> None:
    """Makes the operating system forget the files, which are on the disk already; or read them."""
    for file in files(folder):
        with file.open("rb", buffering=0) as stream:
            if warm:
                while stream.read(BLOCK):
                    pass
            else:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, target: Path) -> None:
    """Copies every file: read, written, on the disk."""
    buffer = memoryview(bytearray(BLOCK))
    for file in files(source):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb", buffering=0) as read, place.open("wb", buffering=0) as written:
            while count := read.readinto(buffer):  # type: ignore[attr-defined]
                done = 0
                while done < count:
                    done += written.write(buffer[done:count])
            os.fsync(written.fileno())


def status(field: str) -> int:
    """A field of this process's memory, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Runs:
    """What is timed, in a folder of its own.

    Args:
        folder: with room for four times what is written.
        warm: whether sources are in memory when a run begins.
    """

    def __init__(self, folder: Path, warm: bool) -> None:
        self.family, self.out, self.copied = (folder / name for name in ("family", "out", "copied"))
        self.warm = warm

    def made(self, kind: str, budget: str, verify: bool) -> Callable[[], object]:
        """Extraction or export of a budget."""
        if kind == "extract":
            return lambda: extract_budget(self.family, budget, self.out, verify=verify)
        return lambda: export_model(self.family, self.out, budget=budget, verify=verify)

    def timed(self, run: Callable[[], object], source: Path, target: Path) -> float:
        """Seconds of a run that reads `source` and writes `target`, which must not be there."""
        shutil.rmtree(target, ignore_errors=True)
        os.sync()  # what was removed before is no part of the run
        prepare(source, self.warm)
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun

    def turn(self, kind: str, budget: str = "p100", verified: bool = True) -> dict[str, float]:
        """Seconds of one turn: the plain copy, and both ways to write what it copies."""
        found = {kind: self.timed(self.made(kind, budget, False), self.family, self.out)}
        found["copy"] = self.timed(lambda: copy(self.out, self.copied), self.out, self.copied)
        shutil.rmtree(self.copied)
        if verified:
            found[f"{kind} verified"] = self.timed(self.made(kind, budget, True), self.family, self.out)
        found["bytes"] = size(self.out)
        shutil.rmtree(self.out)
        return found

    def peaks(self, kind: str, before: int) -> dict[str, int]:
        """Most bytes that writing the 100 % budget takes, verified."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        with Allocations() as allocations:
            self.made(kind, "p100", True)()
        found = {"allocated": allocations.peak(), "resident": status("VmHWM") - before}
        shutil.rmtree(self.out)
        return found


def measure(folder: Path, turns: int, warm: bool) -> dict[str, Any]:
    """Every number, by its name."""
    runs = Runs(folder, warm)
    write_family(runs.family)
    path = find_checkpoint(runs.family)
    before = status("VmRSS")
    stored = tensor_names(path).values()
    largest = max(prod(info.shape) * info.dtype.itemsize for info in stored)
    report: dict[str, Any] = {"parent_gib": size(path) / 2**30, "largest_tensor_mib": largest / 2**20, "warm": warm}
    for kind in ("extract", "export"):
        peaks = runs.peaks(kind, before)  # the first run, which warms up
        done = [runs.turn(kind) for _ in range(turns)]
        report[f"{kind}_gib"] = done[0]["bytes"] / 2**30
        for ending in ("", " verified"):
            ratio = median(each[kind + ending] / each["copy"] for each in done)
            report[f"{kind}{ending.replace(' ', '_')}_over_copy"] = ratio
        report[f"{kind}_peak_over_largest"] = {name: value / largest for name, value in peaks.items()}
        report[f"{kind}_within_memory"] = max(peaks.values()) < 2 * largest + CONSTANT
        report[f"{kind}_seconds"] = [{name: value for name, value in each.items() if name != "bytes"} for each in done]
    small = runs.turn("extract", "small", verified=False)
    report["extract_small_over_copy"] = small["extract"] / small["copy"]
    report["extract_small_gib"] = small["bytes"] / 2**30
    return report


def rounded(value: Any) -> Any:
    """With four digits after the point."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object on one line")
    parser.add_argument("--folder", type=Path, help="where 10 GiB are free (default: the system's temporary folder)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="sources are in memory, not on the disk alone")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        begun = time.perf_counter()
        found = measure(Path(folder), asked.turns, asked.warm)
        found["seconds"] = time.perf_counter() - begun
    if asked.json:
        print(json.dumps(rounded(found)))
        return
    for name, value in rounded(found).items():
        print(f"{name:<32} {value}")


if __name__ == "__main__":
    sys.exit(main())
