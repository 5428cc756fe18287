"""Writes `torch_dist` checkpoints tensor by tensor."""

import io
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem

from megatron_elastic.checkpoint.names import (
    CHECKPOINT_VERSION,
    COMMON_STATE,
    FORMAT,
    LINEAR,
    STATE_OF_A_RUN,
    STORED_IN_PARTS,
    TRACKER,
)
from megatron_elastic.checkpoint.plain import plain
from megatron_elastic.checkpoint.reading import alone
from megatron_elastic.errors import CheckpointError
from megatron_elastic.metadata import KEY, Metadata


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written: known by shape and dtype, made when its turn comes.

    Attributes:
        shape: of the whole tensor.
        dtype: what it is stored in; `read` must return this dtype.
        read: makes the tensor; called once for a tensor in parts as well.
        parts: sizes along dimension 0 of what is stored in parts (`STORED_IN_PARTS`), in that order; else empty.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    parts: tuple[int, ...] = ()


class _LazyPlanner(DefaultSavePlanner):
    """Makes each tensor when it is written, so that one parameter is alive at a time."""

    def __init__(self, sources: Mapping[str, tuple[str, LazyTensor, int]]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.sources = sources
        self.last: tuple[str, torch.Tensor] | None = None

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The data of one item: the parts of a parameter follow each other and share one `read`."""
        stored = write_item.index.fqn
        if stored not in self.sources:
            return super().resolve_data(write_item)
        name, source, part = self.sources[stored]
        if self.last is None or self.last[0] != name:
            self.last = None
            self.last = (name, _checked(name, source))
        whole = self.last[1]
        return torch.split(whole, list(source.parts))[part] if source.parts else whole


def _checked(name: str, source: LazyTensor) -> torch.Tensor:
    tensor = source.read().detach().cpu()
    if (tuple(tensor.shape), tensor.dtype) != (source.shape, source.dtype):
        raise CheckpointError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype}, where {source.shape} {source.dtype} was announced"
        )
    return tensor


def _sources(tensors: Mapping[str, LazyTensor]) -> dict[str, tuple[str, LazyTensor, int]]:
    """Stored name -> stock name, tensor, number of its part."""
    found: dict[str, tuple[str, LazyTensor, int]] = {}
    for name, tensor in tensors.items():
        stock = next((end for end in STORED_IN_PARTS if name.endswith(f".{end}")), None)
        if stock is None:
            if tensor.parts:
                raise CheckpointError(f"{name} is stored whole: give it no parts")
            found[name] = (name, tensor, 0)
            continue
        end, parts = STORED_IN_PARTS[stock]
        if len(tensor.parts) != len(parts) or sum(tensor.parts) != tensor.shape[0]:
            raise CheckpointError(
                f"{name} is stored in parts {parts}: their sizes {tensor.parts} must be as many and add up to "
                f"{tensor.shape[0]}"
            )
        for number, part in enumerate(parts):
            found[f"{name.removesuffix(stock)}{end}.{part}"] = (name, tensor, number)
    return found


def _state(sources: Mapping[str, tuple[str, LazyTensor, int]], common: Mapping[str, Any]) -> dict[str, Any]:
    """What is to be written, by stored name: tensors without data, objects in the list that Megatron wraps them in."""
    state: dict[str, Any] = {}
    for stored, (name, tensor, part) in sources.items():
        shape = (tensor.parts[part], *tensor.shape[1:]) if tensor.parts else tensor.shape
        state[stored] = torch.empty(shape, dtype=tensor.dtype, device="meta")
        if LINEAR.search(name):
            state[f"{name.removesuffix('weight')}_extra_state/shard_0_1"] = [None]
    kept = {key: value for key, value in common.items() if key not in STATE_OF_A_RUN}
    state[COMMON_STATE] = [plain({"checkpoint_version": CHECKPOINT_VERSION, **kept})]
    return state


@contextmanager
def _replacing(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `target` that takes its place at the end, or is gone after a failure."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not overwrite:
        raise CheckpointError(f"{target} exists already: remove it, or choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    partial, old = (target.with_name(f".{target.name}.{mark}.{end}") for end in ("partial", "old"))
    partial.mkdir()
    try:
        yield partial
        if target.exists():
            target.rename(old)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def write_checkpoint(
    directory: str | Path,
    tensors: Mapping[str, LazyTensor],
    *,
    common: Mapping[str, Any],
    metadata: Metadata | None = None,
    iteration: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a checkpoint that Megatron's `--load` and `dist_checkpointing.load` read; all of it, or nothing.

    Args:
        directory: what `--load` will be given; must not exist, or be empty.
        tensors: parameters by stock name, made one at a time.
        common: `args` (Namespace), `iteration`, as `read_common` returns them; what is not plain, or belongs to an
            optimizer, is left out.
        metadata: what the checkpoint says about itself.
        iteration: number of the iteration; None writes a release, which Megatron starts from iteration 0.
        overwrite: whether to replace what is in `directory`.

    Returns:
        The folder of the iteration.

    Raises:
        CheckpointError: where the folder is taken, or a tensor is not what was announced.
    """
    target = Path(directory)
    written = dict(tensors)
    if metadata is not None:
        packed = metadata.to_tensor()
        written[KEY] = LazyTensor(tuple(packed.shape), packed.dtype, lambda: packed)
    sources = _sources(written)
    folder = "release" if iteration is None else f"iter_{iteration:07d}"
    state = _state(sources, {"iteration": iteration or 0, **common})
    with _replacing(target, overwrite=overwrite) as partial:
        (partial / folder).mkdir()
        # One file a tensor: within a file, torch's writer keeps every tensor alive until the file is closed.
        writer = FileSystemWriter(partial / folder, single_file_per_rank=False)
        try:
            with alone():
                state_dict_saver.save(state, storage_writer=writer, planner=_LazyPlanner(sources), no_dist=True)
        except CheckpointException as error:
            for cause, _ in error.failures.values():
                if isinstance(cause, CheckpointError | KeyboardInterrupt):
                    raise cause from None
            raise CheckpointError(f"{target} cannot be written: {error}") from error
        (partial / folder / "metadata.json").write_text(json.dumps(FORMAT))
        (partial / TRACKER).write_text("release" if iteration is None else str(iteration))
    return target / folder
