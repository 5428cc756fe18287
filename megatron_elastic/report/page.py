"""`report.md`: the report in words, tables and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_elastic.axes import AXES
from megatron_elastic.checkpoint import find_checkpoint, read_metadata
from megatron_elastic.config import Recipe, load_recipe
from megatron_elastic.report.checks import check_report, gap_closed
from megatron_elastic.report.events import read_scalars
from megatron_elastic.report.facts import build_report, write_json, write_text
from megatron_elastic.report.plots import AXIS_NAMES, plot_losses, plot_parameters, plot_router
from megatron_elastic.wandb_run import publish

PLOTS = "report"
"""Folder of the plots, beside `report.md`."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    rule = [":--"] + ["--:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows)) + "\n"


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _size(size: int | Sequence[int] | str) -> str:
    return str(size) if isinstance(size, int | str) else ", ".join(map(str, size))


def _budget_tables(report: Mapping[str, Any]) -> str:
    parent, rows, shapes = report["parent"], [], []
    # Depth is said by the layers that are left out.
    axes = [a for a in (*AXES, "skipped") if any(budget["selection"].get(a) for budget in report["budgets"])]
    for budget in report["budgets"]:
        name, share = budget["name"], budget["parameters"] / parent["parameters"]
        shapes.append(
            [name, f"{budget['fraction']:.1%}", f"{share:.2%}", f"{budget['parameters']:,}"]
            + [_size(budget["selection"].get(axis, "")) for axis in axes]
            + [f"`{budget['checkpoint']}`"]
        )
        smaller = budget["fraction"] < 1.0
        untrained, trained = budget["validation_loss_untrained"], budget["validation_loss_extracted"]
        closed = gap_closed(untrained, trained, parent["validation_loss"])
        rows.append(
            [
                name,
                _loss(budget["validation_loss_family"]),
                _loss(trained),
                _loss(untrained),
                _loss(budget["validation_loss_random_cut"]),
                _loss(budget["validation_loss_from_scratch"]),
                f"{closed:.0%}" if smaller else "",
            ]
        )
    losses = ["budget", "in the family", "extracted", "untrained cut", "random cut", "from scratch", "gap closed"]
    sizes = ["budget", "target", "reached", "parameters", *(AXIS_NAMES[axis] for axis in axes), "checkpoint"]
    return f"### Losses\n\n{table(losses, rows)}\n### Shapes\n\n{table(sizes, shapes)}"


def _checks(report: Mapping[str, Any]) -> str:
    found = check_report(report)
    rows = [[check.name, check.value, check.rule, "yes" if check.passed else "**no**"] for check in found]
    passed = sum(check.passed for check in found)
    return f"{passed} of {len(found)} hold.\n\n{table(['expectation', 'value', 'rule', 'holds'], rows)}"


PAGE = """# Family report

A parent of {parameters:,} parameters became {count} budgets that share its weights, trained together by
distillation from the frozen parent and cut out without any further training. Losses are mean nats per token
over the same {tokens:,} validation tokens; their unigram entropy is {entropy:.4f}, the parent's loss
{loss:.4f}.

## Budgets

{tables}
*Untrained*: the same selection cut from the sorted parent before any elastic training. *Random cut*: mean of
three cuts of the same shape from randomly ordered parents. *From scratch*: the same shape trained with cross
entropy on the text that the family read. *Gap closed*: share of the distance between untrained cut and
parent.

![Loss against parameters]({plots}/parameters.png)

## Training

{training}
{losses}
{router}
## Checks

{checks}"""


def _training(recipe: Recipe) -> str:
    rows = [
        [
            str(number),
            str(stage.iterations),
            str(stage.sequence_length),
            str(stage.global_batch_size),
            " / ".join(f"{weight:.3g}" for weight in stage.weights),
        ]
        for number, stage in enumerate(recipe.stages, start=1)
    ]
    head = ["stage", "steps", "sequence (tokens)", "batch (base samples)", "weights of the budgets"]
    return f"{table(head, rows)}\nAll stages read {recipe.base_tokens:,} tokens of text, each once for every budget.\n"


def write_report(folder: Path) -> dict[str, Any]:
    """Writes `report.json`, `report.md` and its plots for a finished run.

    Args:
        folder: of the run.

    Returns:
        What `report.json` says.

    Raises:
        ElasticError: the run is not finished, its recipe cannot be read, or wandb did not take the report.
    """
    report = build_report(folder)
    recipe = load_recipe(folder / "recipe.yaml")
    family = read_metadata(find_checkpoint(folder / "family"))
    assert family is not None  # build_report has read it
    curves = read_scalars(folder / "family" / "tensorboard")
    names = [budget.name for budget in family.budgets]
    marks = [(recipe.iterations_before(n), f"stage {n}") for n in range(2, len(recipe.stages) + 1)]
    if recipe.router is not None:
        marks.append((recipe.router.iterations, "router frozen"))
    plots, loss_plot, router_plot = folder / PLOTS, "", ""
    plot_parameters(report, plots / "parameters.png")
    if plot_losses(curves, names, marks, plots / "losses.png"):
        loss_plot = f"\n![Distillation loss over steps]({PLOTS}/losses.png)\n"
    learnt = [budget.name for budget in family.budgets if budget.fraction < 1.0]
    choices = {axis: family.choices[axis] for axis in AXES if len(family.choices.get(axis, ())) > 1}
    if plot_router(curves, learnt, choices, plots / "router.png"):
        router_plot = f"\n![Router probabilities over steps]({PLOTS}/router.png)\n"
    page = PAGE.format(
        parameters=report["parent"]["parameters"],
        count=len(names),
        tokens=report["validation_tokens"],
        entropy=report["unigram_entropy"],
        loss=report["parent"]["validation_loss"],
        tables=_budget_tables(report),
        plots=PLOTS,
        training=_training(recipe),
        losses=loss_plot,
        router=router_plot,
        checks=_checks(report),
    )
    write_text(folder / "report.md", page)
    # Last: whoever waits for it finds the page and the plots as well.
    write_json(folder / "report.json", report)
    publish(
        recipe.megatron,
        folder / recipe.save,
        folder=folder,
        summary={
            f"report/{budget['name']}/{key}": budget[key]
            for budget in report["budgets"]
            for key in ("parameters", "validation_loss_family", "validation_loss_extracted")
        },
        files=[folder / "report.md", folder / "report.json", *sorted(plots.glob("*.png"))],
        checkpoints={budget["name"]: folder / budget["checkpoint"] for budget in report["budgets"]},
    )
    return report
