"""Folders of safetensors files, read and written tensor by tensor.

A file is the length of its header (8 bytes), the header (JSON: name -> dtype, shape, place), and the numbers. It is
read and written here and not by the `safetensors` package, which writes a file from all of its tensors at once.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_elastic.checkpoint import Disk, LazyTensor, file_digests, told
from megatron_elastic.errors import HFError
from megatron_elastic.hf.config import load_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Name in a header -> dtype, of those that weights are trained in."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_LONGEST_HEADER = 100_000_000
"""Bytes, as the format says."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        name: of the tensor.
        file: that it is in.
        start: byte of the file.
        dtype: as the header names it.
    """

    name: str
    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    def read(self, first: int = 0, rows: int | None = None) -> Tensor:
        """The tensor, or `rows` entries of its first dimension from `first` on; on the CPU.

        Raises:
            HFError: the file is shorter than its header says, or cannot be read.
        """
        dtype = DTYPES[self.dtype]
        shape = self.shape if rows is None else (rows, *self.shape[1:])
        out = torch.empty(shape, dtype=dtype)
        skip = first * prod(self.shape[1:]) * dtype.itemsize
        raw = memoryview(out.view(-1).view(torch.uint8).numpy())
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.start + skip)
                done = 0
                while done < len(raw):
                    count = file.readinto(raw[done:])
                    if not count:
                        raise HFError([f"it ends inside {self.name}: copy it again"], str(self.file))
                    done += count
        except OSError as error:
            raise HFError([f"{self.name} cannot be read ({error})"], str(self.file)) from error
        return out


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file.

    Raises:
        HFError: the file is damaged, or is no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        return {
            name: _entry(path, name, value, 8 + length, size)
            for name, value in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise HFError([f"no safetensors file, or a damaged one ({error!r}): copy it again"], str(path)) from error


def _entry(path: Path, name: str, value: Mapping[str, Any], data: int, size: int) -> Entry:
    start, stop = value["data_offsets"]
    shape = tuple(value["shape"])
    if not all(isinstance(each, int) and each >= 0 for each in (*shape, start, stop)) or data + stop > size:
        raise ValueError(f"{name} lies outside of the file")
    if value["dtype"] in DTYPES and stop - start != prod(shape) * DTYPES[value["dtype"]].itemsize:
        raise ValueError(f"{name} is {shape} {value['dtype']} in {stop - start} bytes")
    return Entry(name, path, data + start, str(value["dtype"]), shape)


def read_folder(folder: Path) -> dict[str, Entry]:
    """The tensors of a model, from one file or from shards with an index.

    Raises:
        HFError: with every file that is missing or damaged, and every tensor that is not where the index says.
    """
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise HFError([f"neither {SINGLE} nor {INDEX} is there: weights in safetensors are read"], str(folder))
        return read_header(folder / SINGLE)
    places = load_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(Path(str(file)).name == file for file in places.values()):
        raise HFError(["weight_map must say for every tensor the file in this folder"], str(folder / INDEX))
    found: dict[str, Entry] = {}
    faults: list[str] = []
    for file in sorted(set(places.values())):
        try:
            entries = read_header(folder / file)
        except HFError as error:
            faults.extend(f"{file}: {fault}" for fault in error.faults)
            continue
        wrong = [name for name in entries if places.get(name) != file]
        wrong += [name for name, place in places.items() if place == file and name not in entries]
        faults.extend(f"{name}: {INDEX} and {file} disagree on where it is" for name in wrong)
        found.update(entries)
    if faults:
        raise HFError(faults, str(folder))
    return found


def _shards(tensors: Mapping[str, LazyTensor], limit: int) -> list[dict[str, LazyTensor]]:
    """Tensors in their order, as many a shard as its size allows; a larger one is alone in its shard."""
    shards: list[dict[str, LazyTensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        size = _bytes(tensor)
        if shards[-1] and used + size > limit:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += size
    return shards


def _bytes(tensor: LazyTensor) -> int:
    return prod(tensor.shape) * tensor.dtype.itemsize


def _header(tensors: Mapping[str, LazyTensor]) -> bytes:
    values: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        stop = start + _bytes(tensor)
        values[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    raw = json.dumps(values, separators=(",", ":")).encode()
    raw = raw.ljust(-(-len(raw) // 8) * 8)  # the numbers begin at a multiple of 8
    return len(raw).to_bytes(8, "little") + raw


def write_folder(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    shard_bytes: int,
    *,
    verify: bool = True,
    progress: bool = False,
) -> int:
    """Writes the tensors of a model, one in memory at a time, and reads them back to compare.

    Args:
        folder: an existing one.
        tensors: by name; each is asked for once, in this order.
        shard_bytes: the most bytes of numbers that a file has, where it is more than one tensor.
        verify: whether to read them back.
        progress: whether to show bars.

    Returns:
        Bytes of all numbers.

    Raises:
        HFError: a tensor is not what was announced, or the disk does not give back what was written.
    """
    shards = _shards(tensors, shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    digests: dict[str, str] = {}
    order = [(name, shard) for name, shard in zip(names, shards, strict=True)]
    bar = iter(told(tensors, f"writing {folder.name}", progress))
    with Disk(read_again=verify) as disk:
        for name, shard in order:
            with disk.file(folder / name) as file:
                file.write(_header(shard))
                for key in shard:
                    next(bar)
                    value = shard[key].read().detach().cpu().contiguous()
                    if (tuple(value.shape), value.dtype) != (shard[key].shape, shard[key].dtype):
                        wanted = f"{shard[key].shape} {shard[key].dtype}"
                        raise HFError([f"{key} is {tuple(value.shape)} {value.dtype}, not {wanted}"], str(folder))
                    file.write(value.view(-1).view(torch.uint8).numpy())
                    del value  # before the next one is made
            digests[name] = file.digest()
    next(bar, None)
    total = sum(map(_bytes, tensors.values()))
    if len(shards) > 1:
        places = {key: name for name, shard in order for key in shard}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2))
    if verify:
        _compare(folder, set(tensors), digests, progress)
    return total


def _name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _compare(folder: Path, names: set[str], digests: Mapping[str, str], progress: bool) -> None:
    """Reads what was written from the disk again: the names of the tensors, and every byte."""
    if set(read_folder(folder)) != names:
        raise HFError(["other tensors than were written: check the disk, and write it again"], str(folder))
    read = file_digests(folder, list(digests), f"verifying {folder.name}" if progress else None)
    for name, digest in digests.items():
        if read[name] != digest:
            raise HFError([f"{name} is not what was written: check the disk, and write it again"], str(folder))
