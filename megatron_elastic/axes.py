"""Block order: the one owner of which entries of an axis a choice keeps.

An axis of `size` entries is laid out in `blocks` equal blocks, and the choice `k` keeps the first `k / blocks` entries
of every block. That set does not depend on the parallel layout, gives every tensor-parallel rank equal work, and nests.
Masks, slices, sorting, extraction, cost and checkpoint metadata all ask the classes here; nothing else computes an
index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is imported where a tensor is made: planning needs none, and its import takes seconds
    from torch import Tensor

AXES = (
    *("hidden", "ffn", "mamba_heads", "mamba_head_dim", "attention_heads"),
    *("experts", "expert_ffn", "shared_expert_ffn", "depth"),
)
"""The elastic axes, in the order in which they are stored and printed."""

AXES_OF_KIND = {
    "M": ("mamba_heads", "mamba_head_dim"),
    "*": ("attention_heads",),
    "-": ("ffn",),
    "E": ("experts", "expert_ffn", "shared_expert_ffn"),
}
"""The axes that a layer of each kind has, besides `hidden` and `depth`."""

PER_LAYER_AXES = ("ffn", "mamba_heads", "attention_heads", "experts", "expert_ffn")
"""The axes whose choice may differ from layer to layer (heterogeneous)."""

Segments = tuple[tuple[int, int], ...]
"""Half-open ranges `(start, stop)` kept along one tensor dimension, ascending and not touching."""

LAYER_KINDS = {"M": "Mamba-2", "*": "attention", "-": "MLP", "E": "MoE"}
"""The layer symbols of Megatron's hybrid pattern that have an elastic layer."""


def layer_kinds(pattern: str) -> str:
    """The layers of a hybrid pattern, without pipeline separators: `"M-|*-"` -> `"M-*-"`."""
    return pattern.replace("|", "")


def index_in_kind(pattern: str, number: int) -> int:
    """Which layer of its own kind the layer `number` is, from 0: layer 3 of `"M-M-"` is MLP layer 1."""
    return pattern[:number].count(pattern[number])


@dataclass(frozen=True)
class BlockOrder:
    """How one axis is laid out, and what each choice keeps.

    Attributes:
        size: entries of the axis at full size.
        blocks: number of equal blocks; a multiple of every tensor-parallel size to be used.
        pinned: entries never change their block (heads inside their SSM or KV group); otherwise sorting deals them.
    """

    size: int
    blocks: int
    pinned: bool = False

    def faults(self, choices: Sequence[int]) -> list[str]:
        """Every reason why `choices` cannot be used on this axis (empty when they can)."""
        found = []
        if self.size % self.blocks:
            found.append(f"size {self.size} does not divide into {self.blocks} blocks: take a divisor of {self.size}")
        if not choices or choices[0] != self.size:
            found.append(f"choices {list(choices)} must begin with the full size {self.size}")
        if any(a <= b for a, b in pairwise(choices)):
            found.append(f"choices {list(choices)} must be strictly descending")
        for choice in choices:
            if not 0 < choice <= self.size:
                found.append(f"choice {choice} must lie in 1..{self.size}")
            elif choice % self.blocks:
                near = max(self.blocks, choice - choice % self.blocks)
                found.append(f"choice {choice} does not divide by its {self.blocks} blocks: {near} would")
        return found

    def per_block(self, choice: int) -> int:
        """Entries that `choice` keeps in each block."""
        return choice // self.blocks

    def mask_table(self, choices: Sequence[int], world: int = 1) -> Tensor:
        """The 0/1 mask of each choice on a tensor-parallel shard, `[choices, size / world]`.

        A shard has whole blocks, so every shard has the same mask.
        """
        import torch

        width = self.size // self.blocks
        inside = torch.arange(self.size // world) % width
        kept = torch.tensor([self.per_block(choice) for choice in choices])
        return (inside[None, :] < kept[:, None]).float()

    def permutation(self, scores: Tensor) -> Tensor:
        """Sorts the axis into block order, most important first inside every block.

        Args:
            scores: importance of each entry, `[size]`.

        Returns:
            `[size]` int64: entry `i` of the new order is entry `permutation[i]` of the old one. For a dealt axis the
            rank `r` of the importance order goes to block `r mod blocks`, position `r div blocks`, so that a prefix of
            every block is the global top-k; for a pinned axis each block is sorted in place.
        """
        import torch

        width = self.size // self.blocks
        scores = scores.detach().double().cpu()
        if self.pinned:
            inside = scores.view(self.blocks, width).argsort(dim=1, descending=True, stable=True)
            return (inside + torch.arange(self.blocks)[:, None] * width).flatten()
        return scores.argsort(descending=True, stable=True).view(width, self.blocks).t().flatten()


@dataclass(frozen=True)
class Item:
    """Part of one block: `entries` entries of `axis` (or of nothing elastic), each `width` rows of the tensor.

    With `width_axis` the rows of an entry are themselves an axis (the channels of a head), of which every entry keeps
    the same prefix.
    """

    axis: str | None
    entries: int
    width: int = 1
    width_axis: str | None = None

    @property
    def size(self) -> int:
        """Rows at full size."""
        return self.entries * self.width

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that it lies along."""
        return tuple(axis for axis in (self.axis, self.width_axis) if axis is not None)

    def runs(self, kept: Mapping[str, int], full: Mapping[str, int]) -> list[tuple[int, int]]:
        """Kept ranges of rows, counted from the item's first."""
        entries = self.entries if self.axis is None else kept[self.axis] * self.entries // full[self.axis]
        width = self.width if self.width_axis is None else kept[self.width_axis]
        if width == self.width:
            return [(0, entries * width)]
        return [(entry * self.width, entry * self.width + width) for entry in range(entries)]


@dataclass(frozen=True)
class Part:
    """`blocks` equal blocks, each a sequence of items; tensor (or expert) parallelism gives a rank
    `blocks / world` of them.
    """

    blocks: int
    items: tuple[Item, ...]

    @property
    def size(self) -> int:
        """Rows at full size."""
        return self.blocks * sum(item.size for item in self.items)


@dataclass(frozen=True)
class Dimension:
    """One dimension of a parameter: parts laid one after the other (Mamba's packed `z|x|B|C|dt` has five).

    Attributes:
        parts: in their order.
        sharded: the ranks it is split over: `tp`, `etp` (expert tensor parallel), `ep`, or `` for none.
    """

    parts: tuple[Part, ...]
    sharded: str = ""

    @property
    def size(self) -> int:
        """Rows of the whole dimension (all ranks)."""
        return sum(part.size for part in self.parts)

    @property
    def axes(self) -> set[str]:
        """The axes that it lies along."""
        return {axis for part in self.parts for item in part.items for axis in item.axes}

    def segments(self, kept: Mapping[str, int], full: Mapping[str, int], world: int = 1) -> Segments:
        """Ranges of the rank-local dimension that a selection keeps (the same on every rank).

        Args:
            kept: entries kept on each axis.
            full: entries of each axis at full size.
            world: ranks that it is split over where it is sharded; they divide the blocks of every part.
        """
        found: list[tuple[int, int]] = []
        start = 0
        for part in self.parts:
            share = world if self.sharded else 1
            items = part.items
            if not any(item.axes for item in items):  # nothing elastic: one run of rows, whatever its blocks
                items, repeat = (Item(None, part.size // share),), 1
            else:
                repeat = part.blocks // share
            for item in items * repeat:
                for first, last in item.runs(kept, full):
                    if last > first and found and found[-1][1] == start + first:
                        found[-1] = (found[-1][0], start + last)
                    elif last > first:
                        found.append((start + first, start + last))
                start += item.size
        return tuple(found)

    def kept_size(self, kept: Mapping[str, int], full: Mapping[str, int]) -> int:
        """Rows of the whole dimension that a selection keeps."""
        return sum(stop - start for start, stop in self.segments(kept, full))

    def part_sizes(self) -> tuple[int, ...]:
        """Rows of each part at full size."""
        return tuple(part.size for part in self.parts)

    def permutation(self, orders: Mapping[str, Tensor]) -> Tensor | None:
        """The row permutation that sorting the axes asks of this dimension; None where no axis of it is sorted.

        Args:
            orders: per axis, `[size]` int64 as made by `BlockOrder.permutation`.
        """
        if not self.axes & set(orders):
            return None
        import torch

        rows = torch.arange(self.size)
        start = 0
        for part in self.parts:
            view = rows[start : start + part.size].view(part.blocks, part.size // part.blocks)
            offset = 0
            for item in part.items:
                # A copy: where neither axis is sorted the rows would be written onto themselves.
                entry_rows = view[:, offset : offset + item.size].reshape(-1, item.width).clone()
                if item.axis is not None and item.axis in orders:
                    entry_rows = entry_rows[orders[item.axis]]
                if item.width_axis is not None and item.width_axis in orders:
                    entry_rows = entry_rows[:, orders[item.width_axis]]
                view[:, offset : offset + item.size] = entry_rows.reshape(part.blocks, item.size)
                offset += item.size
            start += part.size
        return rows
