"""Extraction: cuts a submodel out of a parent or a family into a standalone checkpoint, without further training."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_elastic import cost_model
from megatron_elastic.asked import asked_selection
from megatron_elastic.axes import Dimension
from megatron_elastic.budget import Selection
from megatron_elastic.checkpoint import (
    LazyTensor,
    carried_files,
    find_verified,
    read_entries,
    read_family,
    require_free,
    write_checkpoint,
)
from megatron_elastic.errors import CheckpointError
from megatron_elastic.flags import LAYOUT_FLAGS, shape_flags
from megatron_elastic.layout import BUFFERS, LAYER, Layout, ModelShape, layer_number
from megatron_elastic.metadata import Metadata
from megatron_elastic.sorting import Orders, Stored, common_state, stored_tensors


def kept_entries(
    dimension: Dimension, kept: Mapping[str, int], full: Mapping[str, int], orders: Mapping[str, Tensor]
) -> Tensor | None:
    """Entries of one dimension that a selection keeps, in the new order, int64; None: all of them, as they are.

    Args:
        dimension: of a stored tensor, at full size.
        kept, full: entries of each axis, in the submodel and in the parent.
        orders: sorts the parent first.
    """
    order, segments = dimension.permutation(orders), dimension.segments(kept, full)
    if order is None and segments == ((0, dimension.size),):
        return None
    entries = torch.cat([torch.arange(start, stop) for start, stop in segments])
    return entries if order is None else order[entries]


def cut_tensors(path: Path, layout: Layout, selection: Selection, orders: Orders | None) -> dict[str, LazyTensor]:
    """Every stored tensor of the submodel, made when its turn comes; the layers that are left are numbered anew.

    Args:
        path: checkpoint of the parent.
        layout: of the parent.
        selection: what to keep; it fits the parent (`check_selection`).
        orders: sorts the parent first.
    """
    full, pattern = layout.shape.full, layout.shape.pattern
    numbers = {old: new for new, old in enumerate(n for n in range(len(pattern)) if n not in selection.skipped)}

    def lazy(stored: Stored, kept: Mapping[str, int]) -> LazyTensor:
        def read() -> Tensor:
            own = {} if orders is None else orders.of(stored.stock)
            return read_entries(
                path, stored.source, [kept_entries(each, kept, full, own) for each in stored.dimensions]
            )

        return LazyTensor(tuple(each.kept_size(kept, full) for each in stored.dimensions), stored.dtype, read)

    found = {}
    for stored in stored_tensors(path, layout):
        old = layer_number(stored.name)
        if old is None:
            found[stored.name] = lazy(stored, {"hidden": selection.hidden})
        elif old in numbers:
            name = stored.name.replace(f"{LAYER}{old}.", f"{LAYER}{numbers[old]}.", 1)
            found[name] = lazy(stored, selection.layer(pattern, old))
    return found


def check_selection(layout: Layout, selection: Selection) -> None:
    """Refuses a selection that the parent's blocks cannot give.

    Raises:
        CheckpointError: with every reason.
    """
    faults = []
    pattern = layout.shape.pattern
    for axis, choice in selection.sizes.items():
        if axis not in layout.orders:
            faults.append(f"{axis}: the parent {pattern!r} has no such axis")
            continue
        order = layout.orders[axis]
        for each in sorted(set(choice) if isinstance(choice, tuple) else {choice}):
            sizes = [order.size] if each == order.size else [order.size, each]
            faults += [f"{axis}: {fault}" for fault in order.faults(sizes)]
    faults += [f"skipped: {n} is no layer of {pattern!r}" for n in selection.skipped if not 0 <= n < len(pattern)]
    if len(set(selection.skipped)) >= len(pattern):
        faults.append("skipped: no layer is left")
    if faults:
        raise CheckpointError(f"{selection.as_dict()} cannot be cut: {'; '.join(faults)}")


def submodel_flags(submodel: ModelShape, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a submodel: nothing of the layout that the parent was trained on, so that all give the same bytes.

    Args:
        submodel: its shape.
        flags: the parent's.
    """
    kept = {flag: value for flag, value in flags.items() if flag not in LAYOUT_FLAGS}
    # The vocabulary is padded already: on another layout Megatron would pad it to another size.
    return shape_flags(submodel, {**kept, "vocab-size": submodel.vocab, "make-vocab-size-divisible-by": 1})


def cut(
    source: str | Path,
    out: str | Path,
    *,
    shape: ModelShape,
    ffn_blocks: int,
    expert_blocks: int = 1,
    flags: Mapping[str, Any],
    selection: Selection,
    orders: Orders | None = None,
    budget: str = "",
    iteration: int = 0,
    verify: bool = True,
    progress: bool = False,
) -> int:
    """Writes a submodel as a standalone checkpoint, stored tensor by stored tensor, and reads it back to compare.

    Beside the tensor that is written no more than one shard of the source is in memory.

    Args:
        source: checkpoint of a parent in block order, or with `orders` of any parent.
        out: folder to write; must not exist, or be empty. It is there whole and verified, or not at all.
        shape: of the parent.
        ffn_blocks, expert_blocks: of the parent, see `ModelShape.orders`.
        flags: the parent's Megatron flags; the submodel's follow from them.
        selection: what to keep.
        orders: sorts the parent first, as `sort_checkpoint` would.
        budget: name of the budget, kept in the description.
        iteration: optimizer steps that the source has made in elastic training, kept in the description.
        verify: whether to compare the source with its manifest first, and to read back what was written.
        progress: whether to show bars.

    Returns:
        Number of parameters written.

    Raises:
        CheckpointError: the source is damaged or not this parent, the selection does not fit its blocks, `out` is
            taken, or the disk is full.
    """
    target, layout = Path(out), Layout(shape, ffn_blocks, expert_blocks)
    require_free(target)
    check_selection(layout, selection)
    path = find_verified(source, progress=progress, digests=verify)
    tensors = cut_tensors(path, layout, selection, orders)
    count = sum(prod(each.shape) for name, each in tensors.items() if not name.endswith(BUFFERS))
    cost = cost_model.parameters(shape, selection.sizes, selection.gates(len(shape.pattern)))
    if count != cost:
        raise CheckpointError(f"{target}: {count} parameters, the cost model says {cost}: report this as a defect")
    submodel = selection.submodel(layout.shape)
    description = Metadata(
        kind="extracted",
        shape=submodel,
        ffn_blocks=ffn_blocks,
        expert_blocks=expert_blocks,
        flags=submodel_flags(submodel, flags),
        iteration=iteration,
        budget=budget,
    )
    write_checkpoint(
        target,
        tensors,
        common=common_state(path, submodel),
        metadata=description,
        files=carried_files(path),
        verify=verify,
        progress=progress,
    )
    return count


def extract_budget(
    checkpoint: str | Path, budget: str, out: str | Path, *, verify: bool = True, progress: bool = False
) -> dict[str, Any]:
    """Cuts one budget's submodel out of a family.

    Args:
        checkpoint: folder of the family.
        budget: name of the budget, whose selection must be decided; or a fraction between two budgets.
        out: folder to write; must not exist, or be empty.
        verify: as in `cut`.
        progress: whether to show bars.

    Returns:
        `budget`, `parameters`, `selection` (axis -> kept entries) and `checkpoint` (the folder written).

    Raises:
        CheckpointError: damaged, not a family, no such budget, not decided yet, or `out` is taken.
    """
    require_free(Path(out))
    path = find_verified(checkpoint, progress=progress, digests=verify)
    family = read_family(path)
    selection = asked_selection(path, family, budget)
    count = cut(
        path,
        out,
        shape=family.shape,
        ffn_blocks=family.ffn_blocks,
        expert_blocks=family.expert_blocks,
        flags=family.flags,
        selection=selection,
        budget=budget,
        iteration=family.iteration,
        verify=verify,
        progress=progress,
    )
    return {"budget": budget, "parameters": count, "selection": selection.as_dict(), "checkpoint": str(out)}
