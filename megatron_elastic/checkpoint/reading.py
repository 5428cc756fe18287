"""Reads `torch_dist` checkpoints tensor by tensor."""

import functools
import io
import json
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from megatron_elastic import metadata
from megatron_elastic.checkpoint.names import (
    COMMON_STATE,
    FUSED_NORMS,
    NOT_OF_THE_MODEL,
    STORED_IN_PARTS,
    TRACKER,
    TensorInfo,
)
from megatron_elastic.checkpoint.plain import load_plain
from megatron_elastic.errors import CheckpointError


def find_checkpoint(directory: str | Path) -> Path:
    """The folder of the newest checkpoint under `directory`, or `directory` itself where it is one.

    Raises:
        CheckpointError: where nothing is there, or something that is no `torch_dist` checkpoint.
    """
    root = Path(directory)
    if not root.is_dir():
        raise CheckpointError(f"checkpoint {root} does not exist: give the folder that Megatron's --save wrote")
    path = root
    if not (root / ".metadata").exists():
        tracker = root / TRACKER
        if not tracker.exists():
            raise CheckpointError(
                f"{root} holds no checkpoint: there is neither {TRACKER} nor .metadata in it. Give the folder that "
                "Megatron's --save wrote, or one iteration's folder in it"
            )
        name = tracker.read_text().strip()
        if name != "release" and not name.isdecimal():
            raise CheckpointError(f"{tracker} says {name!r}, where an iteration or 'release' must stand")
        path = root / (name if name == "release" else f"iter_{int(name):07d}")
    config = path / "metadata.json"
    if not (path / ".metadata").exists() or not config.exists():
        raise CheckpointError(
            f"{path} is no complete torch_dist checkpoint (.metadata or metadata.json is missing): save it again with "
            "--ckpt-format torch_dist"
        )
    backend = json.loads(config.read_text()).get("sharded_backend")
    if backend != "torch_dist":
        raise CheckpointError(f"{path} is in format {backend!r}: save it again with --ckpt-format torch_dist")
    return path


@contextmanager
def alone() -> Iterator[None]:
    """Silences torch's remark that there is no process group: none is wanted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@functools.lru_cache(maxsize=4)
def _index(path: Path, changed: int) -> Metadata:
    return FileSystemReader(path).read_metadata()


def _storage(path: Path) -> Metadata:
    """The index of a checkpoint; kept until its file changes."""
    try:
        return _index(path, (path / ".metadata").stat().st_mtime_ns)
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{path / '.metadata'} cannot be read ({error}): copy the checkpoint again") from error


class _Reader(FileSystemReader):
    """Torch's reader with an index that has been read already."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The known index."""
        return _storage(Path(self.path))


def tensor_names(path: Path) -> dict[str, TensorInfo]:
    """Every stored tensor, optimizer included, by stored name."""
    return {
        name: TensorInfo(tuple(entry.size), entry.properties.dtype)
        for name, entry in _storage(path).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def model_tensor_names(path: Path) -> dict[str, TensorInfo]:
    """Every stored tensor that belongs to the model, by stored name."""
    return {name: info for name, info in tensor_names(path).items() if not NOT_OF_THE_MODEL.match(name)}


class _KeepBytes(DefaultLoadPlanner):
    """Loads tensors into place, and leaves stored objects as bytes."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Keeps the bytes, where torch would unpickle whatever they say."""
        self.state_dict[read_item.dest_index.fqn] = value


def _load(path: Path, state: dict[str, Any]) -> None:
    planner = _KeepBytes(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with alone():
            state_dict_loader.load(state, storage_reader=_Reader(path), planner=planner, no_dist=True)
    except CheckpointException as error:
        names = ", ".join(state)
        causes = "; ".join(str(cause) for cause, _ in error.failures.values())
        raise CheckpointError(f"{names} cannot be read from {path} ({causes}): copy the checkpoint again") from error


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One stored tensor, whole, on the CPU.

    Raises:
        CheckpointError: where there is no tensor of that stored name, or its file is damaged.
    """
    entry = _storage(path).state_dict_metadata.get(name)
    if not isinstance(entry, TensorStorageMetadata):
        raise CheckpointError(f"{path} has no tensor {name!r}: it is not a checkpoint of this model")
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
    _load(path, state)
    return state[name]


def _stored_names(path: Path) -> dict[str, tuple[str, ...]]:
    """Stock name of each parameter -> the stored tensors that it is made of, in order."""
    found: dict[str, tuple[str, ...]] = {}
    names = model_tensor_names(path)
    for name in names:
        parent, _, part = name.rpartition(".")
        for stock, (stored, parts) in STORED_IN_PARTS.items():
            if parent.endswith(f".{stored}") and part in parts:
                whole = f"{parent.removesuffix(stored)}{stock}"
                found.setdefault(whole, tuple(f"{parent}.{each}" for each in parts))
                break
        else:
            fused = next((end for end in FUSED_NORMS if name.endswith(f".{end}")), None)
            found[name if fused is None else f"{name.removesuffix(fused)}{FUSED_NORMS[fused]}"] = (name,)
    missing = [each for stored in found.values() for each in stored if each not in names]
    if missing:
        raise CheckpointError(f"{path} lacks {missing}: it is incomplete")
    return found


def parameters(path: Path) -> dict[str, TensorInfo]:
    """Every parameter (and buffer) of the model by stock name, parts joined; without `elastic.metadata`."""
    names, found = model_tensor_names(path), {}
    for stock, stored in _stored_names(path).items():
        if stock != metadata.KEY:
            infos = [names[each] for each in stored]
            shape = (sum(info.shape[0] for info in infos), *infos[0].shape[1:]) if len(infos) > 1 else infos[0].shape
            found[stock] = TensorInfo(shape, infos[0].dtype)
    return found


def read_parameter(path: Path, name: str) -> torch.Tensor:
    """One parameter by stock name, its parts joined along dimension 0, on the CPU.

    Raises:
        CheckpointError: where there is no such parameter.
    """
    stored = _stored_names(path).get(name)
    if stored is None:
        raise CheckpointError(f"{path} has no parameter {name!r}: it is not a checkpoint of this model")
    parts = [read_tensor(path, each) for each in stored]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def read_metadata(path: Path) -> metadata.Metadata | None:
    """What the checkpoint says about itself; None where it says nothing (a checkpoint of Megatron's own)."""
    if metadata.KEY not in tensor_names(path):
        return None
    return metadata.Metadata.from_tensor(read_tensor(path, metadata.KEY))


def read_common(path: Path) -> dict[str, Any]:
    """What Megatron keeps beside the tensors (`args`, a Namespace, `iteration`, ...): plain values, others left out.

    Raises:
        CheckpointError: where the checkpoint has none.
    """
    legacy = path / "common.pt"
    if isinstance(_storage(path).state_dict_metadata.get(COMMON_STATE), BytesStorageMetadata):
        state = {COMMON_STATE: io.BytesIO()}
        _load(path, state)
        state[COMMON_STATE].seek(0)
        values = load_plain(state[COMMON_STATE])[0]
    elif legacy.exists():
        values = load_plain(io.BytesIO(legacy.read_bytes()))
    else:
        raise CheckpointError(
            f"{path} lacks the arguments it was trained with ({COMMON_STATE} or common.pt): save it again with Megatron"
        )
    found: dict[str, Any] = values
    return found
