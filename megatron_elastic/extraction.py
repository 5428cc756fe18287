"""Extraction: cuts a submodel out of a parent or a family into a standalone checkpoint, without further training."""

import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_elastic import cost_model
from megatron_elastic.axes import Segments
from megatron_elastic.budget import Selection
from megatron_elastic.checkpoint import (
    LazyTensor,
    TensorInfo,
    find_checkpoint,
    parameters,
    read_metadata,
    read_parameter,
    write_checkpoint,
)
from megatron_elastic.errors import CheckpointError
from megatron_elastic.flags import shape_flags
from megatron_elastic.layout import Layout, ModelShape
from megatron_elastic.metadata import Metadata
from megatron_elastic.sorting import Orders, common_state, permuted, source_parameters, stored_parts


@dataclass(frozen=True)
class _Cut:
    """Where a submodel's parameters come from, and what they become."""

    path: Path
    layout: Layout
    selection: Selection
    orders: Orders | None

    @property
    def shape(self) -> ModelShape:
        """Of the submodel."""
        return self.layout.shape.resized(self.selection.as_dict())

    def read(self, name: str) -> Tensor:
        """One parameter of the submodel."""
        dimensions, tensor = self.layout.parameters()[name], read_parameter(self.path, name)
        if self.orders is not None:
            tensor = permuted(tensor, dimensions, self.orders.of(name))
        kept, full = self.selection.as_dict(), self.layout.shape.full
        for number, dimension in enumerate(dimensions):
            tensor = _kept(tensor, number, dimension.segments(kept, full))
        return tensor.contiguous()

    def tensors(self, ffn_blocks: int) -> dict[str, LazyTensor]:
        """Every parameter of the submodel, made when its turn comes."""
        source = source_parameters(self.path, self.layout)

        def lazy(name: str, info: TensorInfo) -> LazyTensor:
            shape = tuple(dimension.size for dimension in target[name])
            return LazyTensor(shape, info.dtype, lambda: self.read(name), stored_parts(name, target[name][0]))

        target = Layout(self.shape, ffn_blocks).parameters()
        return {name: lazy(name, info) for name, info in source.items()}


def _kept(tensor: Tensor, dimension: int, segments: Segments) -> Tensor:
    """The given ranges of one dimension, one after the other."""
    if segments == ((0, tensor.shape[dimension]),):
        return tensor
    return torch.cat([tensor.narrow(dimension, start, stop - start) for start, stop in segments], dim=dimension)


def _check_selection(layout: Layout, selection: Selection) -> None:
    faults = []
    for axis, choice in selection.as_dict().items():
        order = layout.orders[axis]
        sizes = [order.size] if choice == order.size else [order.size, choice]
        faults += [f"{axis}: {fault}" for fault in order.faults(sizes)]
    if faults:
        raise CheckpointError(f"{selection.as_dict()} cannot be cut: {'; '.join(faults)}")


def _verify(path: Path, made: _Cut, tensors: Mapping[str, LazyTensor]) -> int:
    """Reads back what was written: names, shapes, bytes and the number of parameters, which is returned."""
    found = parameters(path)
    if set(found) != set(tensors):
        raise CheckpointError(f"{path}: names differ after writing: {sorted(set(found) ^ set(tensors))[:3]}")
    for name, wanted in tensors.items():
        written, expected = read_parameter(path, name), wanted.read()
        same = written.shape == expected.shape == wanted.shape and written.dtype == expected.dtype
        if not same or not torch.equal(_bytes(written), _bytes(expected)):
            raise CheckpointError(f"{path}: {name} is not what was written: check the disk and extract again")
    count = sum(prod(info.shape) for info in found.values())
    cost = cost_model.parameters(made.layout.shape, made.selection.as_dict())
    if count != cost:
        raise CheckpointError(f"{path}: {count} parameters, the cost model says {cost}: report this as a defect")
    return count


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _require_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already: remove it, or choose another folder")


def cut(
    source: str | Path,
    out: str | Path,
    *,
    shape: ModelShape,
    ffn_blocks: int,
    flags: Mapping[str, Any],
    selection: Selection,
    orders: Orders | None = None,
    budget: str = "",
    iteration: int = 0,
) -> int:
    """Writes a submodel as a standalone checkpoint, parameter by parameter, and reads it back to compare.

    Args:
        source: checkpoint of a parent in block order, or with `orders` of any parent.
        out: folder to write; must not exist, or be empty. It is there whole and verified, or not at all.
        shape: of the parent.
        ffn_blocks: blocks of the parent's `ffn` axis.
        flags: the parent's Megatron flags; the submodel's follow from them.
        selection: what to keep.
        orders: sorts the parent first, as `sort_checkpoint` would.
        budget: name of the budget, kept in the description.
        iteration: optimizer steps that the source has made in elastic training, kept in the description.

    Returns:
        Number of parameters written.

    Raises:
        CheckpointError: the source is not this parent, the selection does not fit its blocks, or `out` is taken.
    """
    target, layout = Path(out), Layout(shape, ffn_blocks)
    _require_free(target)
    _check_selection(layout, selection)
    made = _Cut(find_checkpoint(source), layout, selection, orders)
    tensors = made.tensors(ffn_blocks)
    description = Metadata(
        kind="extracted",
        shape=made.shape,
        ffn_blocks=ffn_blocks,
        flags=shape_flags(made.shape, flags),
        iteration=iteration,
        budget=budget,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    unverified = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.unverified")
    try:
        written = write_checkpoint(
            unverified, tensors, common=common_state(made.path, made.shape), metadata=description
        )
        count = _verify(written, made, tensors)
        _require_free(target)
        unverified.replace(target)
    finally:
        shutil.rmtree(unverified, ignore_errors=True)
    return count


def family_metadata(checkpoint: str | Path) -> tuple[Path, Metadata]:
    """The folder of a family's checkpoint, and what it says about itself.

    Raises:
        CheckpointError: there is no checkpoint, or it is not a family.
    """
    path = find_checkpoint(checkpoint)
    found = read_metadata(path)
    if found is None:
        raise CheckpointError(f"{path} is no family, it has no description: give what `megatron-elastic train` saved")
    if found.kind != "family":
        raise CheckpointError(f"{path} is {found.kind!r}, not a family: give what `megatron-elastic train` saved")
    return path, found


def extract_budget(checkpoint: str | Path, budget: str, out: str | Path) -> dict[str, Any]:
    """Cuts one budget's submodel out of a family.

    Args:
        checkpoint: folder of the family.
        budget: name of the budget; its selection must be decided.
        out: folder to write; must not exist, or be empty.

    Returns:
        `budget`, `parameters`, `selection` (axis -> kept entries) and `checkpoint` (the folder written).

    Raises:
        CheckpointError: not a family, no such budget, not decided yet, or `out` is taken.
    """
    path, family = family_metadata(checkpoint)
    selection = family.selection_of(budget)
    count = cut(
        path,
        out,
        shape=family.shape,
        ffn_blocks=family.ffn_blocks,
        flags=family.flags,
        selection=selection,
        budget=budget,
        iteration=family.iteration,
    )
    return {"budget": budget, "parameters": count, "selection": selection.as_dict(), "checkpoint": str(out)}
