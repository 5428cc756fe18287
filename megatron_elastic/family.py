"""A family as declared: the parent's shape, the choices of every axis and the budgets; and the slices that follow."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from megatron_elastic.axes import AXES, BlockOrder, Segments
from megatron_elastic.budget import Budget, Selection
from megatron_elastic.layout import Layout, ModelShape


@dataclass(frozen=True, kw_only=True)
class Family:
    """What can be narrowed, to what, for which budgets (largest first)."""

    shape: ModelShape
    ffn_blocks: int
    choices: Mapping[str, tuple[int, ...]]
    budgets: tuple[Budget, ...]

    @cached_property
    def layout(self) -> Layout:
        """Dimensions of every parameter of the parent."""
        return Layout(self.shape, self.ffn_blocks)

    @property
    def orders(self) -> Mapping[str, BlockOrder]:
        """Block order of every axis."""
        return self.layout.orders

    @property
    def full(self) -> Selection:
        """The selection that keeps everything."""
        return Selection.from_dict(self.shape.full)


@dataclass(frozen=True)
class SlicePlan:
    """Everything a rank needs to run one selection at its own size.

    Attributes:
        hidden: kept hidden channels.
        ffn, mamba_heads, attention_heads: kept entries on this tensor-parallel rank.
        segments: parameter name without its layer prefix -> kept ranges of each dimension (None: all of it).
    """

    hidden: int
    ffn: int
    mamba_heads: int
    attention_heads: int
    segments: Mapping[str, tuple[Segments | None, ...]]


class SlicePlans:
    """The slice plans of one tensor-parallel size, each made once."""

    def __init__(self, family: Family, tp_size: int) -> None:
        self.family = family
        self.tp_size = tp_size
        self._made: dict[Selection, SlicePlan] = {}

    def of(self, selection: Selection) -> SlicePlan:
        """The plan of a selection."""
        if selection not in self._made:
            self._made[selection] = self._make(selection)
        return self._made[selection]

    def _make(self, selection: Selection) -> SlicePlan:
        layout, kept, full = self.family.layout, selection.as_dict(), self.family.shape.full
        segments: dict[str, tuple[Segments | None, ...]] = {}
        for name, dimensions in layout.parameters().items():
            short = name.split(".", 3)[3] if name.startswith("decoder.layers.") else name
            if short in segments:
                continue
            ranges = []
            for dimension in dimensions:
                world = self.tp_size if dimension.sharded else 1
                found = dimension.segments(kept, full, self.tp_size)
                whole = found == ((0, dimension.size // world),)
                ranges.append(None if whole else found)
            segments[short] = tuple(ranges)
        sizes = {axis: kept[axis] if axis == "hidden" else kept[axis] // self.tp_size for axis in AXES}
        return SlicePlan(**sizes, segments=segments)
