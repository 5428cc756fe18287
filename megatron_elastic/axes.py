"""Block order: the one owner of which entries of an axis a choice keeps.

An axis of `size` entries is laid out in `blocks` equal blocks, and the choice `k` keeps the first `k / blocks` entries
of every block. That set does not depend on the parallel layout, gives every tensor-parallel rank equal work, and nests.
Masks, slices, sorting, extraction, cost and checkpoint metadata all ask the classes here; nothing else computes an
index.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

AXES = ("hidden", "ffn", "mamba_heads", "attention_heads")
"""The elastic axes, in the order in which they are stored and printed."""

Segments = tuple[tuple[int, int], ...]
"""Half-open ranges `(start, stop)` kept along one tensor dimension, ascending and not touching."""

LAYER_KINDS = {"M": "Mamba-2", "*": "attention", "-": "MLP"}
"""The layer symbols of Megatron's hybrid pattern that have an elastic layer."""


def layer_kinds(pattern: str) -> str:
    """The layers of a hybrid pattern, without pipeline separators: `"M-|*-"` -> `"M-*-"`."""
    return pattern.replace("|", "")


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
        width = self.size // self.blocks
        scores = scores.detach().double().cpu()
        if self.pinned:
            inside = scores.view(self.blocks, width).argsort(dim=1, descending=True, stable=True)
            return (inside + torch.arange(self.blocks)[:, None] * width).flatten()
        return scores.argsort(descending=True, stable=True).view(width, self.blocks).t().flatten()


@dataclass(frozen=True)
class Item:
    """Part of one block: `entries` entries of `axis` (or of nothing elastic), each `width` rows of the tensor."""

    axis: str | None
    entries: int
    width: int = 1

    @property
    def size(self) -> int:
        """Rows at full size."""
        return self.entries * self.width


@dataclass(frozen=True)
class Part:
    """`blocks` equal blocks, each a sequence of items; tensor parallelism gives every rank `blocks / world` of them."""

    blocks: int
    items: tuple[Item, ...]

    @property
    def size(self) -> int:
        """Rows at full size."""
        return self.blocks * sum(item.size for item in self.items)


@dataclass(frozen=True)
class Dimension:
    """One dimension of a parameter: parts laid one after the other (Mamba's packed `z|x|B|C|dt` has five)."""

    parts: tuple[Part, ...]
    sharded: bool = False

    @property
    def size(self) -> int:
        """Rows of the whole dimension (all ranks)."""
        return sum(part.size for part in self.parts)

    @staticmethod
    def _kept_rows(item: Item, kept: Mapping[str, int], full: Mapping[str, int]) -> int:
        if item.axis is None:
            return item.size
        return kept[item.axis] * item.entries // full[item.axis] * item.width

    def segments(self, kept: Mapping[str, int], full: Mapping[str, int], world: int = 1) -> Segments:
        """Ranges of the rank-local dimension that a selection keeps (the same on every rank).

        Args:
            kept: entries kept on each axis.
            full: entries of each axis at full size.
            world: tensor-parallel size; it divides the blocks of every part when the dimension is sharded.
        """
        found: list[tuple[int, int]] = []
        start = 0
        for part in self.parts:
            share = world if self.sharded else 1
            items = part.items
            if all(item.axis is None for item in items):  # nothing elastic: one run of rows, whatever its blocks
                items, repeat = (Item(None, part.size // share),), 1
            else:
                repeat = part.blocks // share
            for item in items * repeat:
                rows = self._kept_rows(item, kept, full)
                if rows and found and found[-1][1] == start:
                    found[-1] = (found[-1][0], start + rows)
                elif rows:
                    found.append((start, start + rows))
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
        if not any(item.axis in orders for part in self.parts for item in part.items):
            return None
        rows = torch.arange(self.size)
        start = 0
        for part in self.parts:
            view = rows[start : start + part.size].view(part.blocks, part.size // part.blocks)
            offset = 0
            for item in part.items:
                if item.axis is not None and item.axis in orders:
                    entry_rows = view[:, offset : offset + item.size].reshape(-1, item.width)
                    view[:, offset : offset + item.size] = entry_rows[orders[item.axis]].view(part.blocks, item.size)
                offset += item.size
            start += part.size
        return rows
