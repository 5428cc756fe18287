"""Writes `torch_dist` checkpoints tensor by tensor."""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as index_format
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo

from megatron_elastic.checkpoint.carried import CARRIED, copy_files
from megatron_elastic.checkpoint.disk import Disk
from megatron_elastic.checkpoint.folders import whole_or_nothing
from megatron_elastic.checkpoint.integrity import file_digests, write_manifest
from megatron_elastic.checkpoint.names import (
    CHECKPOINT_VERSION,
    COMMON_STATE,
    CONFIG,
    FORMAT,
    INDEX,
    STATE_OF_A_RUN,
    TRACKER,
    TensorInfo,
    extra_states,
    stock_name,
    stored_names,
)
from megatron_elastic.checkpoint.plain import plain
from megatron_elastic.checkpoint.reading import index, iteration_folder, tensor_names
from megatron_elastic.errors import CheckpointError
from megatron_elastic.metadata import KEY, Metadata

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DISK_FAULTS = (*_FULL, errno.EIO, errno.EROFS, errno.EFBIG)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be stored: known by shape and dtype, made when its turn comes.

    Attributes:
        shape: of the whole tensor.
        dtype: what it is stored in; `read` must return this dtype.
        read: makes the tensor; it is let go of before the next one is made.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class _Writer:
    """Files of one checkpoint, one tensor or object each, and what the index says of them.

    Attributes:
        digests: file -> SHA-256.
        files: name of a tensor or an object -> its file.
        entries, places: what the index says.
    """

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path, self.disk = path, disk
        self.digests: dict[str, str] = {}
        self.files: dict[str, str] = {}
        self.entries: dict[str, Any] = {}
        self.places: dict[index_format.MetadataIndex, _StorageInfo] = {}

    def file(self, name: str, write: Callable[[Any], object]) -> int:
        """Writes one file; returns its bytes."""
        with self.disk.file(self.path / name) as file:
            write(file)
        self.digests[name] = file.digest()
        return file.size

    def _add(self, key: index_format.MetadataIndex, value: Any) -> None:
        name = f"__0_{len(self.places)}.distcp"
        size = self.file(name, lambda stream: torch.save(value, stream))
        self.files[key.fqn] = name
        self.places[key] = _StorageInfo(name, 0, size)

    def tensor(self, name: str, source: LazyTensor) -> None:
        """Makes and writes one tensor."""
        value = source.read().detach().cpu().contiguous()
        if (tuple(value.shape), value.dtype) != (source.shape, source.dtype):
            raise CheckpointError(
                f"{name} is {tuple(value.shape)} {value.dtype}, where {source.shape} {source.dtype} was announced"
            )
        if value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()  # a view would be stored with all that it is a view of
        whole = index_format.ChunkStorageMetadata(torch.Size([0] * value.dim()), value.shape)
        properties = index_format.TensorProperties(dtype=value.dtype)
        self.entries[name] = index_format.TensorStorageMetadata(properties, value.shape, [whole])
        self._add(index_format.MetadataIndex(name, whole.offsets, 0), value)

    def object(self, name: str, value: Any) -> None:
        """Writes one object, in the list that Megatron wraps it in."""
        self.entries[name] = index_format.BytesStorageMetadata()
        self._add(index_format.MetadataIndex(name), [value])

    def finish(self) -> None:
        """Index and format; with the manifest, which is written when all of this is on the disk, as Megatron does."""
        found = index_format.Metadata(self.entries, storage_data=self.places, version=CURRENT_DCP_VERSION)
        self.file(INDEX, lambda stream: pickle.dump(found, stream))
        self.file(CONFIG, lambda stream: stream.write(json.dumps(FORMAT).encode()))


def disk_fault(error: BaseException | None) -> str | None:
    """What the operating system said where writing failed, from an error or what it came from; None for another one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
            return os.strerror(error.errno)
        for number in _FULL:
            if os.strerror(number) in str(error):  # told by another process, or by torch's writer, in words alone
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


def _space(folder: Path) -> str:
    """What the disk of a folder says about why nothing could be written to it."""
    disk = shutil.disk_usage(folder)
    if disk.free < disk.total / 100:
        return os.strerror(errno.ENOSPC)
    return f"the disk has {disk.free / 1e9:.1f} of {disk.total / 1e9:.1f} GB free, the log says more"


@contextmanager
def save_faults_are_told(save: str | Path) -> Iterator[None]:
    """Turns what a full or faulty disk makes of Megatron's saving into one message.

    Raises:
        CheckpointError: the disk's fault; every other error is left as it is.
    """
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        cause = disk_fault(error)
        if cause is None and isinstance(error, CheckpointException) and error.args[0] == "write":
            cause = _space(Path(save))  # core keeps no more of the fault than that there was one
        if cause is None:
            raise
        raise CheckpointError(
            f"{save}: a checkpoint could not be saved ({cause}); the one before it is whole. Mend the disk or make "
            "space, and run the same command again"
        ) from error


@contextmanager
def write_faults_are_told(target: Path) -> Iterator[None]:
    """Turns what goes wrong while a folder is written into one message.

    Raises:
        CheckpointError: with the cause.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = disk_fault(error) or f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{target} cannot be written ({cause}): nothing was left there; mend the disk, or choose another folder"
        ) from error


def _compare(writer: _Writer, tensors: Mapping[str, LazyTensor], progress: bool) -> None:
    """Reads what was written from the disk again: names, shapes, places, and every byte."""
    path, wanted = writer.path, {name: TensorInfo(each.shape, each.dtype) for name, each in tensors.items()}
    found = tensor_names(path)
    if found != wanted:
        different = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise CheckpointError(f"{path}: {different[:3]} differ after writing: check the disk, and write it again")
    digests = file_digests(path, list(writer.digests), f"verifying {path.parent.name}" if progress else None)
    places = {key.fqn: place.relative_path for key, place in index(path).storage_data.items()}
    wrong = [name for name, file in writer.files.items() if places.get(name) != file]
    wrong += [name for name, file in writer.files.items() if digests[file] != writer.digests[file]]
    wrong += [file for file in (INDEX, CONFIG) if digests[file] != writer.digests[file]]
    if wrong:
        raise CheckpointError(f"{path}: {wrong[0]} is not what was written: check the disk, and write it again")


def told[T](items: Iterable[T], label: str, progress: bool) -> Iterable[T]:
    """The items, with a bar under a label where `progress` asks for one."""
    if not progress:
        return items
    from tqdm import tqdm

    bar: Iterable[T] = tqdm(items, desc=label, unit="tensor")
    return bar


def write_checkpoint(
    directory: str | Path,
    tensors: Mapping[str, LazyTensor],
    *,
    common: Mapping[str, Any],
    metadata: Metadata | None = None,
    iteration: int | None = None,
    files: Mapping[str, Path] | None = None,
    verify: bool = True,
    progress: bool = False,
) -> Path:
    """Writes a checkpoint that Megatron's `--load` and `dist_checkpointing.load` read, and reads it back to compare.

    All of it is there at the end, verified and with Megatron's integrity manifest, or nothing: also after a signal that
    can be caught. One tensor is in memory at a time.

    Args:
        directory: what `--load` will be given; must not exist, or be empty.
        tensors: by stored name, made one at a time.
        common: `args` (Namespace), `iteration`, as `read_common` returns them; what is not plain, or belongs to an
            optimizer, is left out.
        metadata: what the checkpoint says about itself.
        iteration: number of the iteration; None writes a release, which Megatron starts from iteration 0.
        files: what is carried beside the tensors, relative name -> source (`carried_files`).
        verify: whether to read it back.
        progress: whether to show bars.

    Returns:
        The folder of the iteration.

    Raises:
        CheckpointError: the folder is taken, a tensor is not what was announced, or the disk is full or faulty.
    """
    target = Path(directory)
    whole = [name for name in tensors if len(stored_names(name)) > 1]
    if whole:
        raise CheckpointError(f"{whole[0]} is stored in parts: give each of {stored_names(whole[0])}")
    written = dict(tensors)
    if metadata is not None:
        packed = metadata.to_tensor()
        written[KEY] = LazyTensor(tuple(packed.shape), packed.dtype, lambda: packed)
    stocks = {stock_name(name): tensor.shape for name, tensor in tensors.items()}
    kept = {key: value for key, value in common.items() if key not in STATE_OF_A_RUN}
    state = {"checkpoint_version": CHECKPOINT_VERSION, "iteration": iteration or 0, **kept}
    with write_faults_are_told(target), whole_or_nothing(target) as partial:
        path = iteration_folder(partial, iteration)
        path.mkdir()
        with Disk(read_again=verify) as disk:
            writer = _Writer(path, disk)
            for name, tensor in told(written.items(), f"writing {target.name}", progress):
                writer.tensor(name, tensor)
            for stock, shape in stocks.items():
                for key in extra_states(stock, shape):
                    writer.object(key, None)
            writer.object(COMMON_STATE, plain(state))
            writer.finish()
        write_manifest(path, writer.digests)
        (partial / TRACKER).write_text("release" if iteration is None else str(iteration))
        if verify:
            _compare(writer, written, progress)
        copy_files(files or {}, partial / CARRIED)
    return iteration_folder(target, iteration)
