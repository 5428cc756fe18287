"""What Megatron's flags say of FP8: how linear layers are quantised, and which layers are not."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

FORMATS = ("e4m3", "hybrid")
RECIPES = ("tensorwise", "blockwise")
"""The values of Megatron's `fp8-recipe` that the local backend's reference has, and that run on Hopper."""

UNQUANTISED, QUANTISED = TEACHER_PRECISIONS = "bf16", "fp8"
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


def precision_faults(flags: Mapping[str, Any]) -> list[str]:
    """What is wrong with a recipe's Megatron flags about FP8 together; single ones are refused with the others."""
    asked, recipe = flags.get("fp8-format"), flags.get("fp8-recipe")
    if not asked:
        return [
            f"megatron.{flag}: {flags[flag]!r} has no effect without fp8-format: give it, or remove this"
            for flag in ("fp8-recipe", "first-last-layers-bf16")
            if flags.get(flag)
        ]
    found = []
    if asked not in FORMATS:
        found.append(f"megatron.fp8-format: {asked!r} must be one of {list(FORMATS)}")
    if recipe is None:
        found.append(
            f"megatron.fp8-recipe: required with fp8-format: core's default is delayed scaling, whose history of "
            f"magnitudes budgets would mix; give one of {list(RECIPES)}"
        )
    elif recipe == "mxfp8":
        found.extend(_blackwell_faults())
    elif recipe not in (*RECIPES, "delayed", "custom"):
        found.append(f"megatron.fp8-recipe: {recipe!r} must be one of {list(RECIPES)}")
    return found + _end_faults(flags)


def _blackwell_faults() -> list[str]:
    """MXFP8's scales of 32 entries are an instruction of Blackwell's tensor cores."""
    import torch

    here = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if here is not None and here >= (10, 0):
        return []
    what = "this machine has no GPU" if here is None else f"this GPU has compute capability {here[0]}.{here[1]}"
    return [f"megatron.fp8-recipe: 'mxfp8' needs Blackwell (compute capability 10.0), and {what}: use blockwise"]


def _end_faults(flags: Mapping[str, Any]) -> list[str]:
    """The numbers of layers at both ends that stay unquantised, as core checks them."""
    if not flags.get("first-last-layers-bf16"):
        return []
    stages = flags.get("pipeline-model-parallel-size", 1)
    layers = len(str(flags.get("hybrid-layer-pattern", "")).replace("|", ""))
    most = layers // stages if isinstance(stages, int) and stages > 0 else layers
    found = []
    for flag in ("num-layers-at-start-in-bf16", "num-layers-at-end-in-bf16"):
        number = flags.get(flag, 1)
        if type(number) is not int or not 0 <= number <= most:
            found.append(
                f"megatron.{flag}: {number!r} must be a whole number from 0 to {most}, the layers of a pipeline stage"
            )
    return found


def precision_of(flags: Mapping[str, Any]) -> Precision | None:
    """FP8 as a recipe's (checked) Megatron flags ask for it, or None."""
    if not flags.get("fp8-format"):
        return None
    first = last = 0
    if flags.get("first-last-layers-bf16"):
        first, last = (int(flags.get(f"num-layers-at-{end}-in-bf16", 1)) for end in ("start", "end"))
    return Precision(Scaling(flags["fp8-format"], flags["fp8-recipe"]), first, last)


def skipped_end_fault(precision: Precision | None, skipped: Iterable[int], layers: int) -> str | None:
    """What is wrong with leaving layers out of a model whose ends are not quantised; None where nothing is.

    Args:
        precision: of the model.
        skipped: layers that some submodel leaves out, of the parent's numbers.
        layers: of the parent.
    """
    if precision is None:
        return None
    ends = sorted({number for number in skipped if precision.of_layer(number, layers) is None})
    if not ends:
        return None
    return (
        f"layers {ends} are left out by a submodel, and first-last-layers-bf16 leaves them unquantised: cut out, the "
        "submodel would have other layers at its ends than in the family; keep them, or quantise all layers"
    )
