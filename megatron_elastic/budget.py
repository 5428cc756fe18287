"""Budgets and selections: a named target, and the exact shape of the submodel that meets it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from megatron_elastic.axes import AXES


@dataclass(frozen=True)
class Selection:
    """One choice per axis: the exact shape of one submodel."""

    hidden: int
    ffn: int
    mamba_heads: int
    attention_heads: int

    @classmethod
    def from_dict(cls, kept: Mapping[str, int]) -> "Selection":
        """Reads what `as_dict` wrote; unknown or missing axes raise TypeError."""
        return cls(**kept)

    def as_dict(self) -> dict[str, int]:
        """Axis -> kept entries."""
        return asdict(self)

    def within(self, other: "Selection") -> bool:
        """Whether this submodel is nested in `other`: no axis keeps more."""
        mine, theirs = self.as_dict(), other.as_dict()
        return all(mine[axis] <= theirs[axis] for axis in AXES)


@dataclass(frozen=True)
class Budget:
    """A named target on the number of parameters.

    Attributes:
        name: also the name of the extracted checkpoint's folder.
        fraction: target as a share of the parent's parameters, in (0, 1].
    """

    name: str
    fraction: float
