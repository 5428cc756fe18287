"""A family as declared: the parent's shape, the choices of every axis and the budgets; and the slices that follow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megatron_elastic.axes import BlockOrder, Dimension, Segments
from megatron_elastic.budget import Budget, Selection
from megatron_elastic.cost_model import CostFormula, Deployment
from megatron_elastic.latency import LatencyTable
from megatron_elastic.layout import Layout, ModelShape


@dataclass(frozen=True, kw_only=True)
class Family:
    """What can be narrowed, to what, for which budgets (largest first).

    Attributes:
        shape: the parent.
        ffn_blocks, expert_blocks: see `ModelShape.orders`.
        choices: descending choices of every axis that the parent has; of `depth` the numbers of layers kept.
        heterogeneous: axes whose choice may differ between layers.
        depth_ranking: layer numbers, least important first: the choice `k` of `depth` skips the first `layers - k`.
        budgets: largest first.
        deployment: where memory and FLOPs are counted.
        latency: the user's measured table, for budgets of latency.
    """

    shape: ModelShape
    ffn_blocks: int
    expert_blocks: int = 1
    choices: Mapping[str, tuple[int, ...]]
    heterogeneous: tuple[str, ...] = ()
    depth_ranking: tuple[int, ...] = ()
    budgets: tuple[Budget, ...]
    deployment: Deployment = field(default_factory=Deployment)
    latency: LatencyTable | None = None

    def __post_init__(self) -> None:
        """An axis that is not narrowed need not be named."""
        choices = {axis: tuple(self.choices.get(axis, full)) for axis, full in self.shape.choices.items()}
        object.__setattr__(self, "choices", choices)

    @cached_property
    def layout(self) -> Layout:
        """Dimensions of every parameter of the parent."""
        return Layout(self.shape, self.ffn_blocks, self.expert_blocks)

    @property
    def orders(self) -> Mapping[str, BlockOrder]:
        """Block order of every axis that has one."""
        return self.layout.orders

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that the parent has."""
        return self.shape.axes

    @property
    def full(self) -> Selection:
        """The selection that keeps everything."""
        return Selection.from_dict(self.shape.full)

    def layers_with(self, axis: str) -> tuple[int, ...]:
        """Numbers of the layers that have an axis; all of them for `hidden` and `depth`."""
        return self.shape.layers_with(axis)

    def formula(self, unit: str) -> CostFormula:
        """The cost of submodels of the parent in a unit.

        Raises:
            ElasticError: the unit is `latency`, and the family has no table.
        """
        return CostFormula(self.shape, unit, self.deployment, self.latency)

    def cost(self, sizes: Mapping[str, Any], gates: Sequence[Any] | None, unit: str) -> Any:
        """Cost of a submodel of the parent in a budget's unit; see `cost_model.cost`."""
        return self.formula(unit).of(sizes, gates)

    def full_cost(self, unit: str) -> float:
        """Cost of the parent."""
        return self.selection_cost(self.full, unit)

    def selection_cost(self, selection: Selection, unit: str = "parameters") -> float:
        """Cost of a decided submodel."""
        found: float = self.cost(selection.sizes, selection.gates(len(self.shape.pattern)), unit)
        return found

    def uses(self, axis: str) -> int:
        """How many times the choice of an axis is made: once, or for every layer that has it."""
        return len(self.layers_with(axis)) if axis in self.heterogeneous else 1

    def skipped(self, depth: int) -> tuple[int, ...]:
        """The layers that a choice of `depth` skips, ascending."""
        return tuple(sorted(self.depth_ranking[: len(self.shape.pattern) - depth]))

    @property
    def ever_skipped(self) -> tuple[int, ...]:
        """The layers that the smallest choice of `depth` skips."""
        return self.skipped(min(self.choices["depth"]))

    def select(self, sizes: Mapping[str, int | tuple[int, ...]]) -> Selection:
        """The selection of a choice on every axis; one for `depth` skips the least important layers."""
        kept = {axis: size for axis, size in sizes.items() if axis != "depth"}
        depth = sizes.get("depth", len(self.shape.pattern))
        assert isinstance(depth, int)
        return Selection.from_dict({**kept, "skipped": self.skipped(depth)})


SegmentsOf = Mapping[str, tuple[Segments | None, ...]]
"""Parameter name -> kept ranges of each dimension (None: all of it)."""


@dataclass(frozen=True)
class LayerPlan:
    """Everything a rank needs to run one layer at its own size.

    Attributes:
        hidden: kept hidden channels.
        sizes: axis of the layer -> kept entries on this rank (of `experts` those of this expert-parallel rank).
        segments: by name without the layer's prefix; rank-local ranges.
        skipped: the layer does not run.
    """

    hidden: int
    sizes: Mapping[str, int]
    segments: SegmentsOf
    skipped: bool = False


@dataclass(frozen=True)
class SlicePlan:
    """Everything a rank needs to run one selection at its own size.

    Attributes:
        hidden: kept hidden channels.
        layers: of the whole model, by global layer number.
        segments: of what belongs to no layer, by stock name.
    """

    hidden: int
    layers: tuple[LayerPlan, ...]
    segments: SegmentsOf


class SlicePlans:
    """The slice plans of one rank's layout, each made once; layers with the same sizes share theirs.

    Args:
        family: what is narrowed.
        tp_size: tensor-parallel size.
        ep_size: expert-parallel size.
        etp_size: expert tensor-parallel size; None for `tp_size`.
    """

    def __init__(self, family: Family, tp_size: int, ep_size: int = 1, etp_size: int | None = None) -> None:
        self.family = family
        self.worlds = {"": 1, "tp": tp_size, "ep": ep_size, "etp": tp_size if etp_size is None else etp_size}
        self._made: dict[Selection, SlicePlan] = {}
        self._layers: dict[tuple[str, tuple[tuple[str, int], ...], bool], LayerPlan] = {}

    def of(self, selection: Selection) -> SlicePlan:
        """The plan of a selection."""
        if selection not in self._made:
            self._made[selection] = self._make(selection)
        return self._made[selection]

    def _segments(self, parameters: Mapping[str, tuple[Dimension, ...]], kept: Mapping[str, int]) -> SegmentsOf:
        found: dict[str, tuple[Segments | None, ...]] = {}
        for name, dimensions in parameters.items():
            ranges: list[Segments | None] = []
            for dimension in dimensions:
                world = self.worlds[dimension.sharded]
                segments = dimension.segments(kept, self.family.shape.full, world)
                ranges.append(None if segments == ((0, dimension.size // world),) else segments)
            found[name] = tuple(ranges)
        return found

    def _layer(self, number: int, selection: Selection) -> LayerPlan:
        kind = self.family.shape.pattern[number]
        kept = selection.layer(self.family.shape.pattern, number)
        key = kind, tuple(sorted(kept.items())), number in selection.skipped
        if key not in self._layers:
            layout = self.family.layout
            sizes = {axis: size // self.worlds[layout.sharded[axis]] for axis, size in kept.items() if axis != "hidden"}
            segments = self._segments(layout.of_kind(kind), kept)
            self._layers[key] = LayerPlan(kept["hidden"], sizes, segments, number in selection.skipped)
        return self._layers[key]

    def _make(self, selection: Selection) -> SlicePlan:
        layers = tuple(self._layer(number, selection) for number in range(len(self.family.shape.pattern)))
        outside = self._segments(self.family.layout.outside_layers(), {"hidden": selection.hidden})
        return SlicePlan(selection.hidden, layers, outside)
