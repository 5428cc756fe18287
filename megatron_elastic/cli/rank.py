"""`megatron-elastic rank`: importance of channels, neurons, heads, experts and layers."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_elastic.cli import launch, options
from megatron_elastic.cli.output import stdout_to_stderr

if TYPE_CHECKING:
    from megatron_elastic.config import Recipe
    from megatron_elastic.importance import Scores

HELP = "measure the importance of channels, neurons, heads, experts and layers of a parent"
DESCRIPTION = """\
Run the parent over calibration text (elastic.calibration: samples, sequence_length, batch_size,
depth_samples; from elastic.train_data) and write the importance of every hidden channel, neuron, Mamba head and
channel, attention head and expert to one file, and the order in which layers may be left out.
It prints a table and draws a plot beside the file (OUT.png). One process holds the whole parent;
with --ranks, or under torchrun (launch/torchrun.sh), it is split as the recipe's flags say.
Layers are ranked by iterative removal, on elastic.calibration.depth_samples sequences: about
(layers / 2) forward passes for every layer that the smallest choice of depth leaves out, and up to
3 x layers x tokens x hidden values in host memory, over all ranks. When it is interrupted, the same
command goes on from OUT.depth.json."""
DEPTH = ("iterative", "one-shot", "none")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments on its own parser."""
    options.describe(parser, DESCRIPTION)
    options.recipe(parser)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="the parent (torch_dist)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write")
    parser.add_argument(
        "--depth",
        choices=DEPTH,
        help="how layers are ranked: removed one after the other, judged once, or not "
        "(default: iterative where the recipe's depth is elastic and it gives no depth_ranking, else none)",
    )
    options.ranks(parser, "1")
    options.as_json(parser)


def _measure(arguments: argparse.Namespace, recipe: "Recipe") -> "Scores":
    """The scores, measured in this process: alone, or as one of the ranks."""
    from megatron_elastic.importance import rank_parent

    first = os.environ.get("RANK", "0") == "0"
    return rank_parent(
        recipe, arguments.checkpoint, arguments.out, depth=arguments.depth, progress=first and options.bars()
    )


def _show(arguments: argparse.Namespace, recipe: "Recipe", scores: "Scores") -> None:
    """Prints the scores and draws them."""
    from megatron_elastic.cli.output import show
    from megatron_elastic.report.importance import Spread, plot_importance, table

    family = recipe.family
    shape = family.shape
    shares = {axis: choices[-1] / choices[0] for axis, choices in family.choices.items()}
    spreads = [Spread.of("all layers", "hidden", [scores.hidden.tolist()], shares["hidden"])]
    for number, axes in sorted(scores.layers.items()):
        for axis, tensor in axes.items():
            rows = tensor.tolist() if tensor.dim() > 1 else [tensor.tolist()]
            spreads.append(Spread.of(f"layer {number} {shape.pattern[number]}", axis, rows, shares[axis]))
    found = scores.depth
    depth = [] if found is None else [(n, shape.pattern[n], found.score(n)) for n in found.order]
    plot = arguments.out.with_suffix(".png")
    plot_importance(spreads, depth, plot)
    if arguments.json:
        told: dict[str, Any] = {
            "out": str(arguments.out),
            "plot": str(plot),
            "calibration": dict(scores.calibration),
            "width": [each.as_dict() for each in spreads],
            "depth": None,
        }
        if found is not None:
            told["depth"] = {
                "method": found.method,
                "order": list(found.order),
                "scores": [score for _, _, score in depth],
                "layer_forwards": found.layer_forwards,
                "layer_forwards_naive": found.layer_forwards_naive,
            }
        show(told, as_json=True)
        return
    print(table(spreads, depth))
    if found is not None:
        share = found.layer_forwards / found.layer_forwards_naive
        print(f"{found.layer_forwards} layer forwards, {share:.2f}x of running every candidate from the first layer")
    print(f"{arguments.out}: importance on {scores.calibration['samples']} sequences; plot: {plot}")


def _rank_elsewhere(arguments: argparse.Namespace) -> None:
    """Starts the ranks on this machine."""
    words = ["_rank", arguments.recipe, "--checkpoint", arguments.checkpoint, "--out", arguments.out]
    words += ["--depth", arguments.depth] if arguments.depth else []
    log = arguments.out.parent / "logs" / "rank.log"
    launch.run_ranks(words, ranks=arguments.ranks, what="ranking", log=log)


def _one_rank(arguments: argparse.Namespace, recipe: "Recipe") -> "Scores | None":
    """The scores, measured as one of the ranks; None where rank 0 finds the checkpoint damaged and says so."""
    from megatron_elastic.checkpoint import find_verified
    from megatron_elastic.cli import position

    def whole() -> int:
        find_verified(arguments.checkpoint, progress=options.bars())
        return 1

    launch.world_of(arguments.ranks)
    return None if position.agreed(whole) is None else _measure(arguments, recipe)


def worker(arguments: argparse.Namespace) -> int:
    """`_rank RECIPE --checkpoint DIR --out FILE`: one of the ranks that `--ranks` starts, without table and plot."""
    from megatron_elastic.config import load_recipe

    return int(_one_rank(arguments, load_recipe(arguments.recipe)) is None)


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask for and return the exit status."""
    from megatron_elastic.checkpoint import find_verified
    from megatron_elastic.config import load_recipe

    with stdout_to_stderr():
        recipe = load_recipe(arguments.recipe)
        if launch.under_torchrun():
            found = _one_rank(arguments, recipe)
            if found is None or os.environ["RANK"] != "0":
                return int(found is None)
            scores = found
        elif (arguments.ranks or 1) > 1:
            _rank_elsewhere(arguments)
            from megatron_elastic.importance import Scores

            scores = Scores.load(arguments.out)
        else:
            # Before Megatron is imported, which takes seconds.
            find_verified(arguments.checkpoint, progress=options.bars())
            scores = _measure(arguments, recipe)
    _show(arguments, recipe, scores)
    return 0
