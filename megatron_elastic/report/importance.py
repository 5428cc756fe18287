"""Importance scores as a table and a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_elastic.axes import AXES
from megatron_elastic.report.plots import AXIS_NAMES, COLORS, new_figure, write_figure


@dataclass(frozen=True)
class Spread:
    """The scores of one axis in one place.

    Attributes:
        place: `all layers`, or a layer's number and kind.
        axis: name.
        scores: highest first; of several experts those of all of them.
        kept: share of the sum of the scores that the smallest choice of the recipe keeps at best.
    """

    place: str
    axis: str
    scores: Sequence[float]
    kept: float

    @classmethod
    def of(cls, place: str, axis: str, rows: Sequence[Sequence[float]], share: float) -> "Spread":
        """Sorts the scores.

        Args:
            place: see above.
            axis: name.
            rows: scores that are ranked together: one row, or one an expert.
            share: of the entries of each row that the smallest choice keeps.
        """
        total = sum(map(sum, rows))
        best = sum(sum(sorted(row, reverse=True)[: round(len(row) * share)]) for row in rows)
        return cls(place, axis, sorted((score for row in rows for score in row), reverse=True), best / (total or 1.0))

    def as_dict(self) -> dict[str, object]:
        """For JSON, without the single scores."""
        scores = self.scores
        return {
            "place": self.place,
            "axis": self.axis,
            "entries": len(scores),
            "highest": scores[0],
            "median": scores[len(scores) // 2],
            "lowest": scores[-1],
            "kept_by_smallest": self.kept,
        }


def table(spreads: Sequence[Spread], depth: Sequence[tuple[int, str, float]]) -> str:
    """The scores as text.

    Args:
        spreads: a line each.
        depth: number, kind and score of every layer, least important first; empty where layers were not ranked.
    """
    head = f"{'where':<20}{'axis':<22}{'entries':>8}{'highest':>12}{'median':>12}{'lowest':>12}{'kept':>8}"
    lines = ["kept: share of the importance that the smallest choice keeps", "", head]
    for each in spreads:
        scores = each.scores
        numbers = "".join(f"{value:>12.4g}" for value in (scores[0], scores[len(scores) // 2], scores[-1]))
        lines.append(f"{each.place:<20}{each.axis:<22}{len(scores):>8}{numbers}{each.kept:>8.1%}")
    if depth:
        lines += ["", "layers, least important first (normalised MSE of the logits without it and those before it):"]
        lines += [f"  {number:>4} {kind}  {score:.4g}" for number, kind, score in depth]
    return "\n".join(lines)


def plot_importance(spreads: Sequence[Spread], depth: Sequence[tuple[int, str, float]], path: Path) -> None:
    """Sorted scores of every axis, a line a layer, each over its highest; and the layers in the order of the model.

    Args:
        spreads: see `table`.
        depth: see `table`.
        path: PNG to write.
    """
    by_axis: Mapping[str, list[Spread]] = {
        axis: [each for each in spreads if each.axis == axis] for axis in AXES if axis != "depth"
    }
    drawn = [axis for axis, found in by_axis.items() if found]
    columns = min(3, len(drawn) + bool(depth))
    rows = -(-(len(drawn) + bool(depth)) // columns)
    figure, grid = new_figure(rows, columns, size=(4.2 * columns, 3.2 * rows))
    places = [grid[number // columns][number % columns] for number in range(rows * columns)]
    for axis, axes in zip(drawn, places, strict=False):
        for number, each in enumerate(by_axis[axis]):
            entries = [index / max(1, len(each.scores) - 1) for index in range(len(each.scores))]
            heights = [score / (each.scores[0] or 1.0) for score in each.scores]
            axes.plot(entries, heights, color=COLORS[number % len(COLORS)], linewidth=1.1, alpha=0.8)
        axes.set_ylim(bottom=0)
        axes.set_title(AXIS_NAMES.get(axis, axis), loc="left", fontsize=9, fontweight="bold")
        axes.set_xlabel("share of the entries, most important first", fontsize=8)
        axes.set_ylabel("score / highest", fontsize=8)
    if depth:
        axes = places[len(drawn)]
        ordered = sorted(depth)
        axes.bar([number for number, _, _ in ordered], [score for _, _, score in ordered], color=COLORS[0])
        axes.set_xticks([number for number, _, _ in ordered], [kind for _, kind, _ in ordered], fontsize=7)
        axes.set_yscale("log")
        axes.set_title("layers", loc="left", fontsize=9, fontweight="bold")
        axes.set_ylabel("normalised MSE of the logits", fontsize=8)
    for axes in places[len(drawn) + bool(depth) :]:
        axes.set_axis_off()
    write_figure(figure, path)
