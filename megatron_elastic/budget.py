"""Budgets and selections: a named target, and the exact shape of the submodel that meets it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron_elastic.layout import ModelShape, Size, sizes_of_layer

UNITS = ("parameters", "active_parameters", "memory", "flops", "latency")
"""What a budget may be a share of."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """One choice per axis, and the layers that are skipped: the exact shape of one submodel.

    An axis that the parent does not have is 0. On a heterogeneous axis the choice is a tuple, one number for each of
    the *parent's* layers that have the axis, skipped ones included; equal ones become one number.

    Attributes:
        skipped: numbers of the layers left out, ascending (the axis `depth`).
    """

    hidden: int
    ffn: Size = 0
    mamba_heads: Size = 0
    mamba_head_dim: int = 0
    attention_heads: Size = 0
    experts: Size = 0
    expert_ffn: Size = 0
    shared_expert_ffn: int = 0
    skipped: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Makes equal selections compare equal: lists become tuples, tuples of one number that number."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list | tuple):
                value = tuple(value)
                if field.name == "skipped":
                    value = tuple(sorted(value))
                elif len(set(value)) == 1:
                    value = value[0]
                object.__setattr__(self, field.name, value)

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> "Selection":
        """Reads what `as_dict` wrote, from JSON too; unknown axes raise TypeError."""
        return cls(**kept)

    def as_dict(self) -> dict[str, Any]:
        """Axis -> kept entries (a tuple where layers differ), and `skipped` where layers are; absent axes left out."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name))}

    @property
    def sizes(self) -> dict[str, Size]:
        """Axis -> kept entries, without `skipped`."""
        return {axis: size for axis, size in self.as_dict().items() if axis != "skipped"}

    def layer(self, pattern: str, number: int) -> dict[str, int]:
        """Kept entries of the axes that one layer of the parent has, `hidden` included."""
        return sizes_of_layer(self.sizes, pattern, number)

    def gates(self, layers: int) -> list[int]:
        """For each of the parent's layers 1 where it is kept, 0 where it is skipped."""
        return [int(number not in self.skipped) for number in range(layers)]

    def submodel(self, shape: ModelShape) -> ModelShape:
        """The shape of the submodel of a parent."""
        return shape.resized(self.sizes, self.skipped)

    def within(self, other: "Selection") -> bool:
        """Whether this submodel is nested in `other`: no axis keeps more, no layer is kept that `other` skips."""
        if not set(self.skipped) >= set(other.skipped):
            return False
        for axis in {**self.sizes, **other.sizes}:
            mine, theirs = _each(getattr(self, axis)), _each(getattr(other, axis))
            # One number stands for all layers; two tuples have the same layers.
            if any(mine[n % len(mine)] > theirs[n % len(theirs)] for n in range(max(len(mine), len(theirs)))):
                return False
        return True


def _each(size: Size) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else (size,)


@dataclass(frozen=True)
class Budget:
    """A named target.

    Attributes:
        name: also the name of the extracted checkpoint's folder.
        fraction: target as a share of the parent's cost, in (0, 1].
        unit: what the cost is: one of `UNITS`.
        heterogeneous: whether its choices may differ between layers on the family's heterogeneous axes.
    """

    name: str
    fraction: float
    unit: str = "parameters"
    heterogeneous: bool = True
