"""A family as one folder: the parent's weights once, what each budget keeps of them, and a script that cuts it."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_elastic.axes import Segments
from megatron_elastic.budget import Selection
from megatron_elastic.hf.names import RELEASED, Parameter, parameters
from megatron_elastic.layout import BUFFERS, ModelShape, layer_number
from megatron_elastic.metadata import Metadata

DESCRIPTION, SCRIPT = "elastic.json", "slice.py"
FORMAT = 1
"""Version of the description; the script that lies beside it reads this one."""


class _Ranges:
    """Kept ranges of rows, each written down once: many tensors keep the same."""

    def __init__(self) -> None:
        self.numbers: dict[Segments, int] = {}

    def number(self, segments: Segments, size: int) -> int | None:
        """Which of the ranges these are; None where they keep all `size` rows."""
        if segments == ((0, size),):
            return None
        return self.numbers.setdefault(segments, len(self.numbers))


def _runs(kept: torch.Tensor) -> Segments:
    """Ascending rows as ranges."""
    ends = [0, *((kept.diff() != 1).nonzero().flatten() + 1).tolist(), len(kept)]
    return tuple((int(kept[a]), int(kept[b - 1]) + 1) for a, b in pairwise(ends) if b > a)


def _rules(shape: ModelShape, selection: Selection, made: list[Parameter], ranges: _Ranges) -> Iterator[dict[str, Any]]:
    """What a budget keeps of every tensor: its name in the folder and in the cut, and the rows of each dimension.

    The experts of a layer have one rule, with `*` where their number is.
    """
    left = [number for number in range(len(shape.pattern)) if number not in selection.skipped]
    for parameter in made:
        old = layer_number(parameter.stock)
        if old is not None and old not in left:
            continue
        kept = {"hidden": selection.hidden} if old is None else selection.layer(shape.pattern, old)
        segments = [dimension.segments(kept, shape.full) for dimension in parameter.dimensions]
        numbers = [ranges.number(s, d.size) for s, d in zip(segments, parameter.dimensions, strict=True)]

        def renamed(name: str, old: int | None = old) -> str:
            return name if old is None else name.replace(f".layers.{old}.", f".layers.{left.index(old)}.", 1)

        for number, piece in enumerate(parameter.pieces):
            rule: dict[str, Any] = {"from": piece.name, "to": renamed(piece.name), "keep": numbers}
            if piece.expert is not None:
                star = piece.name.replace(f".experts.{piece.expert}.", ".experts.*.")
                rule = {"from": star, "to": renamed(star), "experts": list(_entries(segments[0])), "keep": numbers[1:]}
            elif piece.rows is not None:
                entries = torch.tensor(list(_entries(segments[0])))
                rows = _runs(parameter.kept_rows(number, entries))
                rule["keep"] = [ranges.number(rows, piece.shape[0]), *numbers[1:]]
            yield rule
            if piece.expert is not None:
                break  # one rule for all of them


def _entries(segments: Segments) -> Iterator[int]:
    for start, stop in segments:
        yield from range(start, stop)


def describe(family: Metadata, config: Callable[[ModelShape], dict[str, Any]]) -> dict[str, Any]:
    """What `slice.py` must know: for every budget its selection, its configuration, and its rows of every tensor.

    Args:
        family: with its selections decided.
        config: makes a submodel's `config.json`.
    """
    # The format has a bias for every expert; where the router has none, it is written as 0.
    shape, ranges = replace(family.shape, expert_bias=True), _Ranges()
    made = list(parameters(shape, RELEASED, ffn_blocks=family.ffn_blocks, expert_blocks=family.expert_blocks))
    budgets: dict[str, Any] = {}
    for budget, selection in zip(family.budgets, family.selections, strict=True):
        submodel = selection.submodel(shape)
        budgets[budget.name] = {
            "parameters": sum(prod(p.shape) for p in parameters(submodel) if not p.stock.endswith(BUFFERS)),
            "selection": selection.as_dict(),
            "config": config(submodel),
            "tensors": list(_rules(shape, selection, made, ranges)),
        }
    return {"format": FORMAT, "budgets": budgets, "ranges": list(ranges.numbers)}


def write_slicer(folder: Path, description: Mapping[str, Any]) -> None:
    """Puts the description and the script beside a model's files.

    Args:
        folder: of the model.
        description: made by `describe`.
    """
    (folder / DESCRIPTION).write_text(json.dumps(description) + "\n")
    (folder / SCRIPT).write_text((files("megatron_elastic.hf") / SCRIPT).read_text("utf-8"))
