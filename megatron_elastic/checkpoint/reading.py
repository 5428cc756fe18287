"""Reads `torch_dist` checkpoints tensor by tensor, and of a tensor no more than is asked for."""

import functools
import io
import json
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_elastic import metadata
from megatron_elastic.checkpoint.names import (
    COMMON_STATE,
    CONFIG,
    FUSED_NORMS,
    INDEX,
    MANIFEST,
    NOT_OF_THE_MODEL,
    TRACKER,
    TensorInfo,
    stock_name,
    stored_names,
)
from megatron_elastic.checkpoint.plain import load_plain
from megatron_elastic.errors import CheckpointError

_BLOCK_BYTES = 4 << 20
"""Rows that are copied at once hold about as much: reordering needs a copy of them beside the shard and the result."""
_RUN = 8
"""Entries that follow each other, from which on slices are copied faster than entries by their numbers."""

_DAMAGE = (
    *(OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError, LookupError, TypeError),
    *(ValueError, ArithmeticError, AssertionError, MemoryError, RuntimeError),
)
"""What reading pickled bytes raises where a byte of them is wrong."""


def iteration_folder(root: str | Path, iteration: int | None) -> Path:
    """Where Megatron keeps an iteration; None is a release."""
    return Path(root) / ("release" if iteration is None else f"iter_{iteration:07d}")


def find_checkpoint(directory: str | Path) -> Path:
    """The folder of the newest checkpoint under `directory`, or `directory` itself where it is one.

    Raises:
        CheckpointError: where nothing is there, or something that is no `torch_dist` checkpoint.
    """
    root = Path(directory)
    if not root.is_dir():
        raise CheckpointError(f"checkpoint {root} does not exist: give the folder that Megatron's --save wrote")
    path = root
    if not any((root / name).exists() for name in (INDEX, CONFIG, MANIFEST)):
        tracker = root / TRACKER
        if not tracker.exists():
            raise CheckpointError(
                f"{root} holds no checkpoint: there is neither {TRACKER} nor {INDEX} in it. Give the folder that "
                "Megatron's --save wrote, or one iteration's folder in it"
            )
        name = tracker.read_text().strip()
        if name != "release" and not name.isdecimal():
            raise CheckpointError(f"{tracker} says {name!r}, where an iteration or 'release' must stand")
        path = iteration_folder(root, None if name == "release" else int(name))
    missing = [name for name in (INDEX, CONFIG) if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path / missing[0]} is missing: no complete torch_dist checkpoint; copy it again, or save it with "
            "--ckpt-format torch_dist"
        )
    config = path / CONFIG
    try:
        backend = json.loads(config.read_bytes())["sharded_backend"]
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{config} is damaged ({error!r}): copy the checkpoint again") from error
    if backend != "torch_dist":
        raise CheckpointError(f"{path} is in format {backend!r}: save it again with --ckpt-format torch_dist")
    return path


@contextmanager
def _damage_is_told(file: Path, what: str = "") -> Iterator[None]:
    """Turns what a damaged file raises into one message that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except _DAMAGE as error:
        lines = str(error).splitlines() or [""]
        cause = f"{type(error).__name__}: {lines[0]}"
        raise CheckpointError(f"{file} cannot be read{what} ({cause}): copy the checkpoint again") from error


def _check_index(found: Metadata) -> None:
    """Refuses an index that says what no index says: its bytes may be damaged and still make objects."""
    for name, entry in found.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        if not isinstance(name, str) or not isinstance(entry.properties.dtype, torch.dtype):
            raise TypeError(f"{name!r} is of {entry.properties.dtype!r}")
        covered = 0
        for chunk in entry.chunks:
            places = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
            if not all(0 <= start <= start + length <= size for start, length, size in places):
                raise ValueError(f"a shard of {name} lies outside of it")
            covered += prod(chunk.sizes)
        if covered != prod(entry.size) and not NOT_OF_THE_MODEL.match(name):
            raise ValueError(f"the shards of {name} do not cover it")
    for key, place in found.storage_data.items():
        if not isinstance(key, MetadataIndex) or Path(place.relative_path).name != place.relative_path:
            raise ValueError(f"{place.relative_path!r} is no file of this folder")
        if min(place.offset, place.length) < 0:
            raise ValueError(f"{key.fqn} lies before its file")


@functools.lru_cache(maxsize=4)
def _index(path: Path, changed: int) -> Metadata:
    found = FileSystemReader(path).read_metadata()
    if not isinstance(found, Metadata):
        raise TypeError(f"it holds a {type(found).__name__}")
    _check_index(found)
    return found


def index(path: Path) -> Metadata:
    """Torch's index of a checkpoint; kept until its file changes.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    with _damage_is_told(path / INDEX):
        return _index(path, (path / INDEX).stat().st_mtime_ns)


def tensor_names(path: Path) -> dict[str, TensorInfo]:
    """Every stored tensor, optimizer included, by stored name."""
    return {
        name: TensorInfo(tuple(entry.size), entry.properties.dtype)
        for name, entry in index(path).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def model_tensor_names(path: Path) -> dict[str, TensorInfo]:
    """Every stored tensor that belongs to the model, by stored name."""
    return {name: info for name, info in tensor_names(path).items() if not NOT_OF_THE_MODEL.match(name)}


def _read_stored(path: Path, key: MetadataIndex) -> Any:
    """A shard of a tensor, or the bytes of an object."""
    place = index(path).storage_data.get(key)
    if place is None:
        raise CheckpointError(f"{path / INDEX} does not say where {key.fqn} lies: copy the checkpoint again")
    file = path / place.relative_path
    if getattr(place, "transform_descriptors", None):
        raise CheckpointError(f"{file} is compressed or encrypted: save it again without torch's stream extensions")
    with _damage_is_told(file, f", where {key.fqn} lies"), file.open("rb") as stream:
        if hasattr(os, "posix_fadvise"):
            # All of it at once: small reads would each wait behind what is being written at the same time.
            os.posix_fadvise(stream.fileno(), place.offset, place.length, os.POSIX_FADV_WILLNEED)
        view = _create_file_view(stream, place.offset, place.length)
        if key.offset is None:
            return io.BytesIO(view.read(-1))
        return torch.load(cast(IO[bytes], view), map_location="cpu", weights_only=True)


Entries = slice | Tensor
"""Some entries of a dimension: those that follow each other, or their numbers."""


def _run(entries: Tensor) -> Entries:
    """A slice where the entries follow each other, else the entries."""
    first, count = int(entries[0]), len(entries)
    follows = int(entries[-1]) - first == count - 1 and bool((entries.diff() == 1).all())
    return slice(first, first + count) if follows else entries


def _runs(source: Tensor, target: Tensor) -> list[tuple[Entries, Entries]]:
    """Entries of a dimension and where they go, as pairs of slices where these are long, else as one pair."""
    breaks = ((source.diff() != 1) | (target.diff() != 1)).nonzero().flatten().add_(1)
    if len(breaks) and len(source) < _RUN * (len(breaks) + 1):
        return [(_run(source), _run(target))]
    starts = [0, *breaks.tolist()]
    froms, tos = source[starts].tolist(), target[starts].tolist()
    lengths = [stop - start for start, stop in pairwise([*starts, len(source)])]
    return [(slice(s, s + n), slice(t, t + n)) for s, t, n in zip(froms, tos, lengths, strict=True)]


def _copy(shard: Tensor, out: Tensor, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copies entries `sources` of each dimension of a shard to entries `targets` of `out`, some rows at a time."""
    rows = max(1, _BLOCK_BYTES // max(1, shard[:1].numel() * shard.element_size()))
    columns = [_runs(*pair) for pair in zip(sources[1:], targets[1:], strict=True)]
    for pair in zip(sources[0].split(rows), targets[0].split(rows), strict=True):
        for block in product(_runs(*pair), *columns):
            piece = shard
            # Slices first: they copy nothing.
            for dimension, (wanted, _) in sorted(enumerate(block), key=lambda each: isinstance(each[1][0], Tensor)):
                if isinstance(wanted, slice):
                    piece = piece.narrow(dimension, wanted.start, wanted.stop - wanted.start)
                else:
                    piece = piece.index_select(dimension, wanted)
            where = [target for _, target in block]
            if all(isinstance(each, slice) for each in where):
                out[tuple(where)] = piece
            else:
                numbers = [torch.arange(each.start, each.stop) if isinstance(each, slice) else each for each in where]
                out[torch.meshgrid(*numbers, indexing="ij")] = piece


def read_entries(path: Path, name: str, entries: Sequence[Tensor | None]) -> Tensor:
    """Some entries of a stored tensor, on the CPU. Beside the result no more than one shard is in memory.

    Args:
        path: the checkpoint.
        name: stored name.
        entries: for each dimension the wanted entries in the wanted order, int64 without repetition; None is all.

    Raises:
        CheckpointError: where there is no tensor of that stored name, or its file is damaged.
    """
    entry = index(path).state_dict_metadata.get(name)
    if not isinstance(entry, TensorStorageMetadata):
        raise CheckpointError(f"{path} has no tensor {name!r}: it is not a checkpoint of this model")
    wanted = [torch.arange(size) if kept is None else kept for size, kept in zip(entry.size, entries, strict=True)]
    out: Tensor | None = None  # made where the one shard is not the result itself
    if len(entry.chunks) > 1 or any(kept is not None for kept in entries):
        out = torch.empty([len(kept) for kept in wanted], dtype=entry.properties.dtype)
    for chunk in entry.chunks:
        targets = [
            ((kept >= start) & (kept < start + length)).nonzero().flatten()
            for kept, start, length in zip(wanted, chunk.offsets, chunk.sizes, strict=True)
        ]
        if not all(map(len, targets)):
            continue
        shard = _read_stored(path, MetadataIndex(name, chunk.offsets))
        if (tuple(shard.shape), shard.dtype) != (tuple(chunk.sizes), entry.properties.dtype):
            raise CheckpointError(
                f"{path}: {name} is stored as {tuple(shard.shape)} {shard.dtype}, {INDEX} says {tuple(chunk.sizes)} "
                f"{entry.properties.dtype}: copy the checkpoint again"
            )
        if out is None:
            result: Tensor = shard
            return result
        sources = [kept[t] - start for kept, t, start in zip(wanted, targets, chunk.offsets, strict=True)]
        _copy(shard, out, sources, targets)
        del shard  # before the next one is read
    assert out is not None
    return out


def read_tensor(path: Path, name: str) -> Tensor:
    """One stored tensor, whole, on the CPU.

    Raises:
        CheckpointError: where there is no tensor of that stored name, or its file is damaged.
    """
    info = tensor_names(path).get(name)
    return read_entries(path, name, () if info is None else (None,) * len(info.shape))


def stored_parameters(path: Path) -> dict[str, tuple[str, ...]]:
    """Stock name of each parameter -> the stored tensors that it is made of, in order; without `elastic.metadata`.

    Raises:
        CheckpointError: a part of a parameter is missing.
    """
    names = model_tensor_names(path)
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        stock = stock_name(name)
        parts = stored_names(stock)
        found[stock] = parts if len(parts) > 1 else (name,)
    found.pop(metadata.KEY, None)
    missing = [each for stored in found.values() for each in stored if each not in names]
    if missing:
        raise CheckpointError(f"{path / INDEX} lacks {missing}: the checkpoint is incomplete")
    return found


def fused_norms(path: Path) -> dict[str, str]:
    """Stock name -> stored name of the norms that Transformer Engine fused into the linear layer after them."""
    found = {stock_name(name): name for name in model_tensor_names(path)}
    return {stock: name for stock, name in found.items() if name.endswith(tuple(f".{end}" for end in FUSED_NORMS))}


def parameters(path: Path) -> dict[str, TensorInfo]:
    """Every parameter (and buffer) of the model by stock name, parts joined; without `elastic.metadata`."""
    names, found = model_tensor_names(path), {}
    for stock, stored in stored_parameters(path).items():
        infos = [names[each] for each in stored]
        shape = (sum(info.shape[0] for info in infos), *infos[0].shape[1:]) if len(infos) > 1 else infos[0].shape
        found[stock] = TensorInfo(shape, infos[0].dtype)
    return found


def read_parameter(path: Path, name: str) -> Tensor:
    """One parameter by stock name, its parts joined along dimension 0, on the CPU.

    Raises:
        CheckpointError: where there is no such parameter.
    """
    stored = stored_parameters(path).get(name)
    if stored is None:
        raise CheckpointError(f"{path} has no parameter {name!r}: it is not a checkpoint of this model")
    parts = [read_tensor(path, each) for each in stored]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def read_metadata(path: Path) -> metadata.Metadata | None:
    """What the checkpoint says about itself; None where it says nothing (a checkpoint of Megatron's own).

    Raises:
        CheckpointError: it is damaged, or of a newer schema.
    """
    if metadata.KEY not in tensor_names(path):
        return None
    stored = read_tensor(path, metadata.KEY)
    try:
        return metadata.Metadata.from_tensor(stored)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_family(path: Path) -> metadata.Metadata:
    """What a family's checkpoint says about itself.

    Raises:
        CheckpointError: it is no family, or lacks the router that has still to decide its selections.
    """
    found = read_metadata(path)
    if found is None:
        raise CheckpointError(f"{path} is no family, it has no description: give what `megatron-elastic train` saved")
    if found.kind != "family":
        raise CheckpointError(f"{path} is {found.kind!r}, not a family: give what `megatron-elastic train` saved")
    if not found.selections and not has_router(path):
        raise CheckpointError(
            f"{path}: its selections are not decided yet, and the router that decides them is missing "
            f"(no {metadata.ROUTER_PREFIX}* in {INDEX}): take another iteration, or train anew"
        )
    return found


def has_router(path: Path) -> bool:
    """Whether a family was saved with a router."""
    return any(name.startswith(metadata.ROUTER_PREFIX) for name in tensor_names(path))


def read_common(path: Path) -> dict[str, Any]:
    """What Megatron keeps beside the tensors (`args`, a Namespace, `iteration`, ...): plain values, others left out.

    Raises:
        CheckpointError: where the checkpoint has none.
    """
    legacy = path / "common.pt"
    if isinstance(index(path).state_dict_metadata.get(COMMON_STATE), BytesStorageMetadata):
        stored = _read_stored(path, MetadataIndex(COMMON_STATE))
        with _damage_is_told(path, f", where {COMMON_STATE} lies"):
            values = load_plain(stored)[0]
    elif legacy.exists():
        with _damage_is_told(legacy):
            values = load_plain(io.BytesIO(legacy.read_bytes()))
    else:
        raise CheckpointError(
            f"{path} lacks the arguments it was trained with ({COMMON_STATE} or common.pt): save it again with Megatron"
        )
    found: dict[str, Any] = values
    return found
