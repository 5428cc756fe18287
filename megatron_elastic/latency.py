"""Measured latency: a user's table of points for every kind of layer, interpolated linearly between them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from megatron_elastic.axes import AXES_OF_KIND, LAYER_KINDS
from megatron_elastic.errors import ElasticError

_ROUNDING = 1e-6
"""How far outside the measured range, relatively, a size may lie: an expected size carries the rounding of its sum."""


@dataclass(frozen=True)
class Grid:
    """Points on a full grid: every combination of the sizes that occur on each axis was measured.

    Attributes:
        name: for messages.
        axes: that the points name; the others do not matter.
        ticks: ascending sizes of each axis.
        values: latency by the number of the tick on each axis.
    """

    name: str
    axes: tuple[str, ...]
    ticks: tuple[tuple[int, ...], ...]
    values: Mapping[tuple[int, ...], float]

    def at(self, sizes: Mapping[str, Any], corner: tuple[int, ...] = ()) -> Any:
        """The latency at sizes between the points, linear in each axis, and exact at a point.

        Args:
            sizes: axis -> size, a number or a 0-dim tensor.
            corner: ticks that are chosen already, of the first axes.

        Raises:
            ElasticError: a size lies outside what was measured.
        """
        if len(corner) == len(self.axes):
            return self.values[corner]
        axis, ticks = self.axes[len(corner)], self.ticks[len(corner)]
        size = sizes[axis]
        if not ticks[0] * (1 - _ROUNDING) <= size <= ticks[-1] * (1 + _ROUNDING):
            raise ElasticError(
                f"latency table, {self.name}: {axis} {float(size):g} lies outside {ticks[0]}..{ticks[-1]}, what was "
                "measured: measure the smallest and the largest choice too"
            )
        lower = min(max(bisect_right(ticks, size) - 1, 0), max(len(ticks) - 2, 0))
        at_lower = self.at(sizes, (*corner, lower))
        if len(ticks) == 1:
            return at_lower
        share = (size - ticks[lower]) / (ticks[lower + 1] - ticks[lower])
        # In this form a share of 0 or 1 gives the measured number itself, without rounding.
        return (1 - share) * at_lower + share * self.at(sizes, (*corner, lower + 1))


@dataclass(frozen=True)
class LatencyTable:
    """What one layer of each kind takes, and what belongs to no layer (embedding, final norm, LM head).

    A submodel takes the sum over its layers. As YAML or JSON, each a list of points that form a full grid over the axes
    that they name (an axis that no point names does not matter), all in one unit of time:

        outside: [{hidden: 5120, latency: 1.9}, {hidden: 2560, latency: 1.0}]
        layers:
          M: [{hidden: 5120, mamba_heads: 128, latency: 0.31}, {hidden: 5120, mamba_heads: 64, latency: 0.18}, ...]
          "-": [{hidden: 5120, ffn: 20480, latency: 0.40}, ...]

    Other keys (the device, the batch) are left to the user.
    """

    outside: Grid
    layers: Mapping[str, Grid]

    @classmethod
    def from_dict(cls, raw: Any, source: str = "latency table") -> LatencyTable:
        """Reads the points.

        Raises:
            ElasticError: with what is wrong.
        """
        if not isinstance(raw, Mapping) or not isinstance(raw.get("layers"), Mapping) or "outside" not in raw:
            raise ElasticError(f"{source}: must map `outside` to points, and `layers` to points of every layer kind")
        unknown = sorted(set(raw["layers"]) - set(LAYER_KINDS), key=str)
        if unknown:
            raise ElasticError(f"{source}: layer kinds {unknown} are none of {sorted(LAYER_KINDS)}")
        layers = {
            kind: _grid(f"layers {kind!r}", points, ("hidden", *AXES_OF_KIND[kind]), source)
            for kind, points in raw["layers"].items()
        }
        return cls(_grid("outside", raw["outside"], ("hidden",), source), layers)

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Reads a YAML or JSON file.

        Raises:
            ElasticError: it cannot be read, or its points are no full grids.
        """
        import yaml

        try:
            raw = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ElasticError(f"latency table {path}: cannot be read: {error}") from error
        return cls.from_dict(raw, str(path))

    def layer(self, kind: str, sizes: Mapping[str, Any]) -> Any:
        """Latency of one layer of a kind.

        Raises:
            ElasticError: the kind was not measured, or not at such sizes.
        """
        if kind not in self.layers:
            raise ElasticError(f"latency table: no points of layers {kind!r} ({LAYER_KINDS[kind]}): measure them")
        return self.layers[kind].at(sizes)


def _grid(name: str, points: Any, known: Sequence[str], source: str) -> Grid:
    if not isinstance(points, list) or not points or not all(isinstance(point, Mapping) for point in points):
        raise ElasticError(f"{source}, {name}: {points!r} must be a list of points {{AXIS: SIZE, latency: TIME}}")
    axes = tuple(axis for axis in known if axis in points[0])
    for point in points:
        numbers = all(isinstance(value, int | float) and value > 0 for value in point.values())
        if set(point) != {*axes, "latency"} or not numbers:
            raise ElasticError(
                f"{source}, {name}: point {dict(point)} must give a positive number for each of {[*axes, 'latency']}, "
                f"the same axes of {list(known)} in all points"
            )
    ticks = tuple(tuple(sorted({point[axis] for point in points})) for axis in axes)
    values = {
        tuple(each.index(point[axis]) for axis, each in zip(axes, ticks, strict=True)): point["latency"]
        for point in points
    }
    if len(values) < len(points):
        raise ElasticError(f"{source}, {name}: a point is given twice")
    for corner in product(*(range(len(each)) for each in ticks)):
        if corner not in values:
            missing = {axis: each[tick] for axis, each, tick in zip(axes, ticks, corner, strict=True)}
            raise ElasticError(f"{source}, {name}: the points are no full grid: {missing} is missing")
    return Grid(name, axes, ticks, values)
