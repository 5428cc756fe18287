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
PAUSE = 2.0
"""Seconds between turns, in which the disk gets rid of what was removed."""
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
        folder: with room for five times what is written.
        warm: whether sources are in memory when a run begins.
    """

    def __init__(self, folder: Path, warm: bool) -> None:
        self.family, self.reference = folder / "family", folder / "reference"
        self.targets = {name: folder / name for name in ("copy", "plain", "verified")}
        self.warm = warm

    def write(self, kind: str, budget: str, target: Path, *, verify: bool) -> None:
        """Extracts or exports a budget."""
        if kind == "extract":
            extract_budget(self.family, budget, target, verify=verify)
        else:
            export_model(self.family, target, budget=budget, verify=verify)

    def first(self, kind: str, budget: str, before: int) -> dict[str, int]:
        """Writes what is copied later; returns the most bytes that it takes."""
        shutil.rmtree(self.reference, ignore_errors=True)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        with Allocations() as allocations:
            self.write(kind, budget, self.reference, verify=True)
        return {"allocated": allocations.peak(), "resident": status("VmHWM") - before}

    def turn(self, kind: str, budget: str, number: int) -> dict[str, float]:
        """Seconds of the copy and of both ways to write what it copies, in an order that changes with the turn."""
        names, found = list(self.targets), {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            prepare(self.reference if name == "copy" else self.family, self.warm)
            begun = time.perf_counter()
            if name == "copy":
                copy(self.reference, self.targets[name])
            else:
                self.write(kind, budget, self.targets[name], verify=name == "verified")
            found[name] = time.perf_counter() - begun
        for target in self.targets.values():
            shutil.rmtree(target)
        os.sync()  # what was removed is no part of the next turn
        time.sleep(PAUSE)
        return found


def measure(folder: Path, turns: int, warm: bool) -> dict[str, Any]:
    """Every number, by its name."""
    runs = Runs(folder, warm)
    write_family(runs.family)
    path = find_checkpoint(runs.family)
    before = status("VmRSS")
    largest = max(prod(info.shape) * info.dtype.itemsize for info in tensor_names(path).values())
    report: dict[str, Any] = {"parent_gib": size(path) / 2**30, "largest_tensor_mib": largest / 2**20, "warm": warm}
    for label, kind, budget, count in (
        ("extract", "extract", "p100", turns),
        ("export", "export", "p100", turns),
        ("extract_small", "extract", "small", 1),
    ):
        peaks = runs.first(kind, budget, before)
        done = [runs.turn(kind, budget, number) for number in range(count)]
        report[f"{label}_gib"] = size(runs.reference) / 2**30
        for name, ending in (("plain", ""), ("verified", "_verified")):
            report[f"{label}{ending}_over_copy"] = median(each[name] / each["copy"] for each in done)
        report[f"{label}_peak_over_largest"] = {name: value / largest for name, value in peaks.items()}
        report[f"{label}_within_memory"] = max(peaks.values()) < 2 * largest + CONSTANT
        report[f"{label}_seconds"] = done
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
    parser.add_argument("--folder", type=Path, help="where 12 GiB are free (default: the system's temporary folder)")
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
