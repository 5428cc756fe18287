"""Importance scores: how activations become one number an entry, and the file that holds them.

Aggregation (Minitron-SSM, eqs 20, 26, 27): mean of |.| over a sequence, then L2 over the calibration samples. Tokens
that a router has sent to an expert belong to no sequence any more: what is scored there is a mean over them.
"""

import os
import pickle
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_elastic.axes import AXES_OF_KIND
from megatron_elastic.errors import CheckpointError
from megatron_elastic.layout import ModelShape

SCHEMA = 2
"""Written and read: schema 1 had neither Mamba's channels nor experts nor depth."""


def mamba_scores(channels: Tensor, kept: int) -> dict[str, Tensor]:
    """Nested scores of a Mamba layer (Nemotron Elastic, eqs 3 and 4).

    Args:
        channels: score of every channel of x, `[heads, head width]`.
        kept: how many channels are D_top.

    Returns:
        `mamba_head_dim`: `s_d = ||s[:, d]||` over all heads, since all heads of a layer share one order of channels;
        `mamba_heads`: `f_h = ||s[h, D_top]||` over the `kept` channels of the highest `s_d`.
    """
    shared = torch.linalg.vector_norm(channels, dim=0)
    top = shared.argsort(descending=True, stable=True)[:kept]
    return {"mamba_heads": torch.linalg.vector_norm(channels[:, top], dim=1), "mamba_head_dim": shared}


@dataclass(frozen=True)
class DepthRanking:
    """In which order layers may be left out, and how it was found.

    Attributes:
        method: `iterative` or `one-shot`.
        order: layer numbers, least important first.
        rounds: for every round layer number -> normalised MSE of the logits without it and without the layers that
            earlier rounds removed. Layers that were never removed are ordered by the last round.
        layer_forwards: layers run on the whole calibration text.
        layer_forwards_naive: the same if every candidate had run from the first layer.
    """

    method: str
    order: tuple[int, ...]
    rounds: tuple[Mapping[int, float], ...]
    layer_forwards: int
    layer_forwards_naive: int

    def score(self, number: int) -> float:
        """The score by which a layer got its place: of the round that removed it, or the last one."""
        return [found[number] for found in self.rounds if number in found][-1]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DepthRanking":
        """Reads what `dataclasses.asdict` makes, from JSON too."""
        rounds = tuple({int(number): score for number, score in found.items()} for found in values["rounds"])
        return cls(**{**values, "order": tuple(values["order"]), "rounds": rounds})


@dataclass(frozen=True)
class Scores:
    """Importance of every entry of every axis of a parent.

    Attributes:
        hidden: `[h]`, shared by all layers.
        layers: layer number -> axis -> `[size of the axis]`; of `expert_ffn` `[experts, width]`.
        calibration: what they were measured on: samples, sequence length, data prefix, checkpoint, ...
        depth: the order of the layers, where it was measured.
    """

    hidden: Tensor
    layers: Mapping[int, Mapping[str, Tensor]]
    calibration: Mapping[str, Any] = field(default_factory=dict)
    depth: DepthRanking | None = None

    def faults(self, shape: ModelShape) -> list[str]:
        """What makes these the scores of another parent (empty when they fit)."""
        expected: dict[tuple[int | None, str], tuple[int, ...]] = {(None, "hidden"): (shape.hidden,)}
        for number in range(len(shape.pattern)):
            expected.update({(number, axis): size for axis, size in sizes(shape, number).items()})
        found: dict[tuple[int | None, str], Tensor] = {(None, "hidden"): self.hidden}
        for number, axes in self.layers.items():
            found.update({(number, axis): tensor for axis, tensor in axes.items()})
        faults = []
        for place in sorted({*expected, *found}, key=str):
            where = place[1] if place[0] is None else f"layer {place[0]}, {place[1]}"
            size, tensor = expected.get(place), found.get(place)
            if size is None or tensor is None:
                faults.append(f"{where}: {'not in the parent' if size is None else 'missing'}")
            elif tuple(tensor.shape) != size:
                faults.append(f"{where}: {tuple(tensor.shape)} scores, the parent has {_entries(size)} entries")
            elif not bool(tensor.isfinite().all()):
                faults.append(f"{where}: scores that are not finite")
        layers = list(range(len(shape.pattern)))
        if self.depth is not None and sorted(self.depth.order) != layers:
            faults.append(f"depth: an order of {len(self.depth.order)} layers, the parent has {len(layers)}")
        return faults

    def save(self, path: str | Path) -> None:
        """Writes one file; it is there whole or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        values = {
            "schema": SCHEMA,
            "hidden": self.hidden,
            "layers": {number: dict(axes) for number, axes in self.layers.items()},
            "calibration": dict(self.calibration),
            "depth": None if self.depth is None else asdict(self.depth),
        }
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            torch.save(values, partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """Reads what `save` wrote.

        Raises:
            CheckpointError: no file there, or not one of scores, or of another version.
        """
        remedy = "make it with `megatron-elastic rank`"
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise CheckpointError(f"scores {path}: no such file; {remedy}") from error
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"scores {path}: cannot be read ({str(error).splitlines()[0]}); {remedy}") from error
        if not isinstance(values, dict) or not {"schema", "hidden", "layers", "calibration"} <= set(values):
            raise CheckpointError(f"scores {path}: a file of something else; {remedy}")
        if values["schema"] != SCHEMA:
            raise CheckpointError(
                f"scores {path}: schema {values['schema']}, this version reads {SCHEMA}: {remedy} of this version"
            )
        depth = None if values["depth"] is None else DepthRanking.from_dict(values["depth"])
        return cls(values["hidden"], values["layers"], values["calibration"], depth)


def _entries(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def sizes(shape: ModelShape, number: int) -> dict[str, tuple[int, ...]]:
    """The shape of the scores of every axis of one layer, `hidden` left out."""
    own = {axis: size for axis, size in shape.layer(number).items() if axis in AXES_OF_KIND[shape.pattern[number]]}
    return {axis: (own["experts"], size) if axis == "expert_ffn" else (size,) for axis, size in own.items()}
