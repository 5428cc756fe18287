"""Plots of a run, as PNG files. Matplotlib is imported when one is drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_elastic.report.events import Curve, router_curves

COLORS = ("#1f3b73", "#2a9d8f", "#e76f51", "#8e6bb0", "#c49a2a", "#4f772d", "#b23a6b", "#5c677d")
"""One a budget, largest first; repeated where there are more."""

AXIS_NAMES = {
    "hidden": "hidden channels",
    "ffn": "FFN neurons",
    "mamba_heads": "Mamba heads",
    "mamba_head_dim": "channels of a Mamba head",
    "attention_heads": "attention heads",
    "experts": "experts",
    "expert_ffn": "neurons of an expert",
    "shared_expert_ffn": "neurons of the shared expert",
    "depth": "layers",
    "skipped": "layers left out",
}


def new_figure(rows: int = 1, columns: int = 1, *, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure of `size` inches and its grid of axes, in the style of all plots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "figure.dpi": 130,
    }
    with pyplot.rc_context(style):
        return pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def write_figure(figure: Any, path: Path) -> None:
    """Writes a PNG, whole or not at all, and closes the figure."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    pyplot.close(figure)
    temporary.replace(path)


def _mark(axes: Any, steps: Sequence[tuple[int, str]]) -> None:
    for step, text in steps:
        axes.axvline(step, color="#888888", linewidth=0.9, linestyle=":")
        axes.annotate(
            text, (step, 0.98), xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points",
            rotation=90, va="top", fontsize=8, color="#666666",
        )  # fmt: skip


def plot_losses(
    curves: Mapping[str, Curve], budgets: Sequence[str], marks: Sequence[tuple[int, str]], path: Path
) -> bool:
    """Distillation loss over steps, one line a budget, with validation as markers.

    Args:
        curves: tag -> scalar.
        budgets: names, largest first.
        marks: steps to mark, with a text each.
        path: PNG to write.

    Returns:
        Whether there was anything to draw.
    """
    if not any(f"kd {name}" in curves for name in budgets):
        return False
    figure, grid = new_figure(size=(8.0, 4.4))
    axes = grid[0][0]
    lowest: list[float] = []
    for number, name in enumerate(budgets):
        color = COLORS[number % len(COLORS)]
        if f"kd {name}" in curves:
            curve = curves[f"kd {name}"]
            lowest.extend(value for value in curve.values if value > 0)
            axes.plot(curve.steps, curve.values, color=color, alpha=0.25, linewidth=0.8)
            smooth = curve.smoothed(max(1, len(curve.steps) // 30))
            axes.plot(smooth.steps, smooth.values, color=color, linewidth=1.8, label=f"{name}, training")
        if f"kd {name} validation" in curves:
            curve = curves[f"kd {name} validation"]
            axes.plot(curve.steps, curve.values, "o", color=color, markersize=4, label=f"{name}, validation")
    _mark(axes, marks)
    if lowest and max(lowest) > 20 * min(lowest):
        axes.set_yscale("log")
        # The full budget begins as the parent itself: its first values, next to nothing, would squeeze the others.
        axes.set_ylim(bottom=max(0.7 * min(lowest), 1e-4 * max(lowest)))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("KL to the parent (nats per token)")
    axes.set_title("Distillation loss of every budget", loc="left", fontweight="bold")
    axes.legend(fontsize=8, ncols=2)
    write_figure(figure, path)
    return True


def plot_router(
    curves: Mapping[str, Curve], budgets: Sequence[str], choices: Mapping[str, Sequence[int]], path: Path
) -> bool:
    """Probability of every choice over steps: a row a budget, a column an axis.

    Args:
        curves: tag -> scalar.
        budgets: names of those that the router decides.
        choices: axis -> sizes, largest first.
        path: PNG to write.

    Returns:
        Whether there was anything to draw.
    """
    drawn = [
        name for name in budgets if any(router_curves(curves, name, axis, sizes) for axis, sizes in choices.items())
    ]
    if not drawn:
        return False
    from matplotlib import colormaps

    figure, grid = new_figure(len(drawn), len(choices), size=(3.1 * len(choices), 2.3 * len(drawn) + 0.6))
    for row, name in enumerate(drawn):
        for column, (axis, sizes) in enumerate(choices.items()):
            axes = grid[row][column]
            shades = colormaps["viridis_r"]
            for choice, curve in router_curves(curves, name, axis, sizes).items():
                place = list(sizes).index(choice) / max(1, len(sizes) - 1)
                axes.plot(curve.steps, curve.values, color=shades(0.05 + 0.9 * place), linewidth=1.5, label=str(choice))
            axes.set_ylim(-0.03, 1.03)
            axes.set_title(f"{name}: {AXIS_NAMES.get(axis, axis)}", loc="left", fontsize=9, fontweight="bold")
            axes.legend(fontsize=6, ncols=2, handlelength=1.0, columnspacing=0.8, title="kept", title_fontsize=6)
            if row == len(drawn) - 1:
                axes.set_xlabel("optimizer step")
            if column == 0:
                axes.set_ylabel("probability")
    write_figure(figure, path)
    return True


def plot_parameters(report: Mapping[str, Any], path: Path) -> None:
    """Validation loss against parameters: the trained budgets, with the parent, the cuts and the baseline beside.

    Args:
        report: what `report.json` holds.
        path: PNG to write.
    """
    figure, grid = new_figure(size=(7.4, 4.6))
    axes, budgets, parent = grid[0][0], report["budgets"], report["parent"]
    smaller = [budget for budget in budgets if budget["fraction"] < 1.0]
    rows = (
        ("validation_loss_random_cut", smaller, "random cut (mean of 3)", "#b0b0b0", "v", ":"),
        ("validation_loss_untrained", smaller, "sorted cut, untrained", "#e0a458", "s", "--"),
        ("validation_loss_from_scratch", budgets, "from scratch, same text", "#8e6bb0", "D", ""),
        ("validation_loss_extracted", budgets, "trained in the family, extracted", "#1f3b73", "o", "-"),
    )
    for key, rows_of, label, color, marker, line in rows:
        points = [(budget["parameters"] / 1e6, budget[key]) for budget in rows_of if budget[key] is not None]
        if points:
            horizontal, vertical = zip(*points, strict=True)
            axes.plot(
                horizontal, vertical, marker=marker, linestyle=line or "none", color=color, label=label, markersize=6
            )
    axes.plot(
        [parent["parameters"] / 1e6], [parent["validation_loss"]], "*", color="#c1121f", markersize=13, label="parent"
    )
    for budget in budgets:
        axes.annotate(
            budget["name"], (budget["parameters"] / 1e6, budget["validation_loss_extracted"]),
            xytext=(0, -14), textcoords="offset points", ha="center", fontsize=8,
        )  # fmt: skip
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel("parameters (millions)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title("Loss against size", loc="left", fontweight="bold")
    axes.legend(fontsize=8)
    write_figure(figure, path)
