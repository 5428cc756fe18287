"""What Megatron's flags say of FP8: how linear layers are quantised, and which layers are not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMATS = ("e4m3", "hybrid")
RECIPES = ("tensorwise", "blockwise")
"""The values of Megatron's `fp8-recipe` that the local backend's reference has, and that run on Hopper."""

UNQUANTISED, QUANTISED = "bf16", "fp8"
"""Of a teacher: in the parameters' type, or with the students' FP8."""


@dataclass(frozen=True)
class Scaling:
    """How a linear layer is quantised.

    Attributes:
        format: Megatron's `fp8-format`: `e4m3`, or `hybrid` for gradients in e5m2.
        recipe: Megatron's `fp8-recipe`, one of `RECIPES`.
    """

    format: str
    recipe: str

    def __post_init__(self) -> None:
        if self.format not in FORMATS or self.recipe not in RECIPES:
            raise ValueError(
                f"FP8 {self.format!r}, {self.recipe!r}: the format is one of {list(FORMATS)}, the recipe one of "
                f"{list(RECIPES)}"
            )


@dataclass(frozen=True)
class Precision:
    """FP8 of a model.

    Attributes:
        scaling: of its linear layers. Embedding, LM head, routers, norms, convolutions, scans and attention itself are
            never quantised.
        first, last: layers at the model's start and end that are not.
    """

    scaling: Scaling
    first: int = 0
    last: int = 0

    def of_layer(self, number: int, layers: int) -> Scaling | None:
        """The scaling of the layer `number` (from 0) of so many; None where it is not quantised."""
        return self.scaling if self.first <= number < layers - self.last else None


def precision_of(flags: Mapping[str, Any]) -> Precision | None:
    """FP8 as a recipe's (checked) Megatron flags ask for it, or None."""
    if not flags.get("fp8-format"):
        return None
    first = last = 0
    if flags.get("first-last-layers-bf16"):
        first, last = (int(flags.get(f"num-layers-at-{end}-in-bf16", 1)) for end in ("start", "end"))
    return Precision(Scaling(flags["fp8-format"], flags["fp8-recipe"]), first, last)
