"""Shapes that reach a target."""

from megatron_elastic.budget import Budget, Selection
from megatron_elastic.decision import decide
from megatron_elastic.family import Family


def nearest(family: Family, fraction: float, unit: str) -> Selection:
    """The homogeneous selection whose cost comes nearest to a fraction of the parent's."""
    flat = {axis: [[0.0] * len(choices)] * family.uses(axis) for axis, choices in family.choices.items()}
    return decide(family, Budget("", fraction, unit, heterogeneous=False), flat, 1e-3, family.full)
