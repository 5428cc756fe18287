"""Sorting: one permutation of a parent into block order, which changes no output, and the checkpoint of it."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_elastic.axes import BlockOrder, Dimension
from megatron_elastic.checkpoint import (
    LazyTensor,
    TensorInfo,
    carried_files,
    find_verified,
    parameters,
    read_common,
    read_entries,
    require_free,
    stored_names,
    stored_parameters,
    write_checkpoint,
)
from megatron_elastic.config import Recipe
from megatron_elastic.errors import CheckpointError
from megatron_elastic.flags import LAYOUT_FLAGS, shape_flags
from megatron_elastic.importance.scores import Scores, sizes
from megatron_elastic.layout import Layout, ModelShape
from megatron_elastic.metadata import Metadata

_LAYER = "decoder.layers."
_OF_THE_RANKS = (
    *("world_size", "rank", "local_rank", "data_parallel_size", "inprocess_active_world_size"),
    *("transformer_pipeline_model_parallel_size", "tensor_parallel_num_weight_shards"),
    *("expert_tensor_parallel_num_weight_shards", "align_param_gather", "overlap_p2p_comm"),
)
"""Arguments that Megatron derives from the layout of a run."""


@dataclass(frozen=True)
class Orders:
    """The order of every axis: entry `i` of the sorted parent is entry `order[i]` of the parent.

    Attributes:
        hidden: `[h]` int64, shared by all layers.
        layers: layer number -> axis -> `[size of the axis]` int64; of `expert_ffn` `[experts, width]`, the experts in
            the parent's order: nothing outside of an expert knows its neurons, so each has an order of its own.
    """

    hidden: Tensor
    layers: Mapping[int, Mapping[str, Tensor]]

    def of(self, name: str) -> dict[str, Tensor]:
        """The orders that concern a parameter, by axis."""
        own = self.layers.get(int(name.removeprefix(_LAYER).split(".")[0]), {}) if name.startswith(_LAYER) else {}
        return {"hidden": self.hidden, **own}


def _permutation(order: BlockOrder, scores: Tensor) -> Tensor:
    """The order of one axis, or of each row of scores."""
    if scores.dim() == 1:
        return order.permutation(scores)
    return torch.stack([order.permutation(row) for row in scores])


def orders_from_scores(layout: Layout, scores: Scores) -> Orders:
    """Block order by importance, most important first.

    Raises:
        CheckpointError: the scores are another parent's.
    """
    faults = scores.faults(layout.shape)
    if faults:
        raise CheckpointError(f"these scores are another parent's: {'; '.join(faults[:5])}: rank this parent")
    layers = {
        number: {axis: _permutation(layout.orders[axis], tensor) for axis, tensor in axes.items()}
        for number, axes in scores.layers.items()
    }
    return Orders(layout.orders["hidden"].permutation(scores.hidden), layers)


def random_orders(layout: Layout, seed: int) -> Orders:
    """An order drawn at random, heads inside their groups: what a cut is compared with."""
    generator = torch.Generator().manual_seed(seed)

    def draw(axis: str, size: tuple[int, ...]) -> Tensor:
        return _permutation(layout.orders[axis], torch.rand(size, generator=generator, dtype=torch.float64))

    hidden = draw("hidden", (layout.shape.hidden,))
    layers = {
        number: {axis: draw(axis, size) for axis, size in sizes(layout.shape, number).items()}
        for number in range(len(layout.shape.pattern))
    }
    return Orders(hidden, layers)


def _sorted(tensor: Tensor, dimensions: Sequence[Dimension], own: Mapping[str, Tensor]) -> Tensor:
    """Sorts the neurons of routed experts, which have been read in their new order: each by its own order."""
    places = [place for place, dimension in enumerate(dimensions) if "expert_ffn" in dimension.axes]
    if places and "expert_ffn" in own:
        (place,), numbers = places, own["experts"] if "experts" in own else torch.arange(len(tensor))
        for expert, before in zip(tensor, own["expert_ffn"][numbers], strict=True):
            rows = dimensions[place].permutation({"expert_ffn": before})
            assert rows is not None
            expert.copy_(expert.index_select(place - 1, rows))
    return tensor


def source_parameters(path: Path, layout: Layout) -> dict[str, TensorInfo]:
    """The parameters of a checkpoint, every one accounted for by the layout.

    Raises:
        CheckpointError: one is missing, of another shape, or unknown (it would be lost).
    """
    found = {name: info for name, info in parameters(path).items() if not name.startswith("elastic.")}
    wanted = {name: tuple(d.size for d in dimensions) for name, dimensions in layout.parameters().items()}
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} has no place in the family's shape" for name in sorted(set(found) - set(wanted))]
    for name, shape in wanted.items():
        if name in found and found[name].shape != shape:
            faults.append(f"{name} is {found[name].shape}, the shape says {shape}")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{path}: not a checkpoint of this parent: {'; '.join(faults[:3])}{more}")
    return {name: found[name] for name in wanted}


@dataclass(frozen=True)
class Stored:
    """One stored tensor of a checkpoint that is rewritten: where it comes from, and how it is laid out.

    Attributes:
        name: in the rewritten checkpoint.
        source: in the old one, where a norm may be fused into a linear layer.
        stock: the parameter that it is, or is a part of.
        dimensions: of this tensor, before anything is cut.
        dtype: in both.
    """

    name: str
    source: str
    stock: str
    dimensions: tuple[Dimension, ...]
    dtype: torch.dtype


def stored_tensors(path: Path, layout: Layout) -> list[Stored]:
    """Every stored tensor of a parent's model.

    Raises:
        CheckpointError: the checkpoint is not this parent's.
    """
    dimensions, sources, found = layout.parameters(), stored_parameters(path), []
    for stock, info in source_parameters(path, layout).items():
        first, *others = dimensions[stock]
        names = stored_names(stock)
        parts = [first] if len(names) == 1 else [Dimension((part,), first.sharded) for part in first.parts]
        for name, source, part in zip(names, sources[stock], parts, strict=True):
            found.append(Stored(name, source, stock, (part, *others), info.dtype))
    return found


def common_state(path: Path, shape: ModelShape | None = None) -> dict[str, Any]:
    """What a rewritten checkpoint keeps beside its tensors: the arguments, of a run that has not begun, on no layout.

    Args:
        path: the source.
        shape: sizes to put into the arguments; None leaves them.
    """
    args = read_common(path).get("args")
    kept = vars(args) if isinstance(args, Namespace) else {}
    layout = {flag.replace("-", "_") for flag in LAYOUT_FLAGS} | set(_OF_THE_RANKS)
    kept = {name: value for name, value in kept.items() if name not in layout}
    # Megatron asks for these two by name.
    changed: dict[str, Any] = {"iteration": 0, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    changed.update((name, 0) for name in kept if name.startswith("consumed_") or name == "skipped_train_samples")
    if shape is not None:
        changed.update((flag.replace("-", "_"), value) for flag, value in shape_flags(shape, {}).items())
    return {"args": Namespace(**{**kept, **changed})}


def sort_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    shape: ModelShape,
    ffn_blocks: int,
    expert_blocks: int = 1,
    flags: Mapping[str, Any],
    orders: Orders,
    depth_ranking: Sequence[int] = (),
    progress: bool = False,
) -> Path:
    """Writes the sorted parent, tensor by tensor, and verifies it; its outputs are the parent's up to rounding.

    Args:
        source: checkpoint of the parent.
        out: folder for the sorted one; must not exist, or be empty.
        shape: of the parent.
        ffn_blocks, expert_blocks: see `ModelShape.orders`.
        flags: Megatron's model flags, kept in the description.
        orders: as made by `orders_from_scores`.
        depth_ranking: layer numbers, least important first, kept in the description.
        progress: whether to show bars.

    Returns:
        The folder written.

    Raises:
        CheckpointError: the source is damaged or not this parent, or `out` is taken.
    """
    require_free(Path(out))
    path = find_verified(source, progress=progress)

    def lazy(stored: Stored) -> LazyTensor:
        def read() -> Tensor:
            own = orders.of(stored.stock)
            shared = {axis: order for axis, order in own.items() if order.dim() == 1}
            tensor = read_entries(path, stored.source, [each.permutation(shared) for each in stored.dimensions])
            return _sorted(tensor, stored.dimensions, own)

        return LazyTensor(tuple(each.size for each in stored.dimensions), stored.dtype, read)

    return write_checkpoint(
        out,
        {stored.name: lazy(stored) for stored in stored_tensors(path, Layout(shape, ffn_blocks, expert_blocks))},
        common=common_state(path),
        metadata=Metadata(
            kind="sorted",
            shape=shape,
            ffn_blocks=ffn_blocks,
            expert_blocks=expert_blocks,
            depth_ranking=tuple(depth_ranking),
            flags=flags,
        ),
        files=carried_files(path),
        progress=progress,
    )


def sort_parent(
    recipe: Recipe, checkpoint: str | Path, scores: str | Path, out: str | Path, *, progress: bool = False
) -> Path:
    """Sorts the parent of a recipe by scores, and writes it.

    Args:
        recipe: for the parent's shape, its blocks and flags.
        checkpoint: of the parent.
        scores: file written by `rank_parent`.
        out: folder to write; must not exist, or be empty.
        progress: whether to show bars.

    Returns:
        The folder written.

    Raises:
        CheckpointError: the checkpoint or the scores are not this parent's, the scores lack the order of the layers
            that the recipe needs, or `out` is taken.
    """
    family, found = recipe.family, Scores.load(scores)
    ranking = family.depth_ranking or (() if found.depth is None else found.depth.order)
    if not ranking and len(family.choices["depth"]) > 1:
        raise CheckpointError(
            f"scores {scores}: the recipe's depth is elastic, and these have no order of the layers: rank the parent "
            "with --depth iterative, or give elastic.depth_ranking"
        )
    return sort_checkpoint(
        checkpoint,
        out,
        shape=family.shape,
        ffn_blocks=family.ffn_blocks,
        expert_blocks=family.expert_blocks,
        flags=recipe.megatron,
        orders=orders_from_scores(family.layout, found),
        depth_ranking=ranking,
        progress=progress,
    )
