"""Importance scores: how activations become one number an entry, and the file that holds them.

Aggregation (Minitron-SSM, eqs 20, 26, 27): mean of |.| over a sequence, then L2 over the calibration samples.
"""

import os
import pickle
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_elastic.axes import layer_kinds
from megatron_elastic.errors import CheckpointError
from megatron_elastic.layout import ModelShape

SCHEMA = 1

AXIS_OF_KIND = {"M": "mamba_heads", "*": "attention_heads", "-": "ffn"}
"""The axis that a layer of each kind is sorted along, besides `hidden`."""


class SequenceNorms:
    """Mean over the sequence, L2 over the samples: sums of squares in fp64."""

    def __init__(self) -> None:
        self._squares: Tensor | None = None

    def add(self, magnitudes: Tensor) -> None:
        """Adds samples.

        Args:
            magnitudes: not negative, `[s, b, n]`.
        """
        wide = torch.promote_types(magnitudes.dtype, torch.float32)
        squares = magnitudes.mean(dim=0, dtype=wide).double().square().sum(dim=0)
        self._squares = squares if self._squares is None else self._squares + squares

    def value(self) -> Tensor:
        """The scores so far, `[n]` fp64 on the CPU."""
        if self._squares is None:
            raise ValueError("no activation was seen: the model's forward did not reach this module")
        return self._squares.sqrt().cpu()


def mamba_head_scores(channels: Tensor, heads: int) -> Tensor:
    """Head scores from the scores of the channels of x (Nemotron Elastic, eq 4).

    Eq 3 ranks the channels, `s_d = ||s[:, d]||` over all heads, to choose those that stay (D_top). The head width is
    not narrowed, so D_top is all of them and their order does not matter.

    Args:
        channels: `[heads * head width]`.
        heads: Mamba heads.

    Returns:
        `f_h = ||s[h, :]||`, `[heads]`.
    """
    scores: Tensor = torch.linalg.vector_norm(channels.view(heads, -1), dim=1)
    return scores


@dataclass(frozen=True)
class Scores:
    """Importance of every entry of every axis of a parent.

    Attributes:
        hidden: `[h]`, shared by all layers.
        layers: layer number -> axis -> `[size of the axis]`.
        calibration: what they were measured on: samples, sequence length, data prefix, checkpoint, seed.
    """

    hidden: Tensor
    layers: Mapping[int, Mapping[str, Tensor]]
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def faults(self, shape: ModelShape) -> list[str]:
        """What makes these the scores of another parent (empty when they fit)."""
        expected: dict[tuple[int | None, str], int] = {(None, "hidden"): shape.hidden}
        for number, kind in enumerate(layer_kinds(shape.pattern)):
            expected[number, AXIS_OF_KIND[kind]] = shape.full[AXIS_OF_KIND[kind]]
        found: dict[tuple[int | None, str], Tensor] = {(None, "hidden"): self.hidden}
        for number, axes in self.layers.items():
            found.update({(number, axis): tensor for axis, tensor in axes.items()})
        faults = []
        for place in sorted({*expected, *found}, key=str):
            where = place[1] if place[0] is None else f"layer {place[0]}, {place[1]}"
            size, tensor = expected.get(place), found.get(place)
            if size is None or tensor is None:
                faults.append(f"{where}: {'not in the parent' if size is None else 'missing'}")
            elif tuple(tensor.shape) != (size,):
                faults.append(f"{where}: {tuple(tensor.shape)} scores, the parent has {size} entries")
            elif not bool(tensor.isfinite().all()):
                faults.append(f"{where}: scores that are not finite")
        return faults

    def save(self, path: str | Path) -> None:
        """Writes one file; it is there whole or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        layers = {number: dict(axes) for number, axes in self.layers.items()}
        values = {"schema": SCHEMA, "hidden": self.hidden, "layers": layers, "calibration": dict(self.calibration)}
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
            CheckpointError: no file there, or not one of scores.
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
            raise CheckpointError(f"scores {path}: schema {values['schema']}, this version reads {SCHEMA}; {remedy}")
        return cls(values["hidden"], values["layers"], values["calibration"])
