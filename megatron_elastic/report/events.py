"""Scalars from TensorBoard event files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Curve:
    """One scalar over optimizer steps, ascending."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def smoothed(self, window: int) -> "Curve":
        """The mean of the last `window` points at every point."""
        means = [
            sum(part) / len(part)
            for part in (self.values[max(0, i - window + 1) : i + 1] for i in range(len(self.values)))
        ]
        return Curve(self.steps, tuple(means))


def read_scalars(folder: Path) -> dict[str, Curve]:
    """Every scalar in the event files of a folder, by tag; of a step that was logged again the later value stays.

    Tags that core counts in samples (`... vs samples`) are left out. An absent folder gives nothing.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, tuple[float, float]]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 1, "images": 1, "histograms": 1})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if tag.endswith(" vs samples"):
                continue
            points = found.setdefault(tag, {})
            for event in events.Scalars(tag):
                if event.step not in points or event.wall_time >= points[event.step][0]:
                    points[event.step] = (event.wall_time, event.value)
    return {
        tag: Curve(tuple(sorted(points)), tuple(points[step][1] for step in sorted(points)))
        for tag, points in found.items()
    }


def router_curves(curves: Mapping[str, Curve], budget: str, axis: str, choices: Sequence[int]) -> dict[int, Curve]:
    """Choice -> its probability over steps, for the choices that were logged."""
    names = {choice: f"router/{budget}/{axis}/{choice}" for choice in choices}
    return {choice: curves[name] for choice, name in names.items() if name in curves}
