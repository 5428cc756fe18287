"""Routers of the small family, and the selections that meet its budgets."""

import dataclasses
from typing import Any

import torch

from megatron_elastic.budget import Selection
from megatron_elastic.cost_model import parameters
from megatron_elastic.family import Family
from megatron_elastic.masks import one_hot
from megatron_elastic.router import Router, RouterConfig
from tests.unit.small_family import AXES, FAMILY, LAYERS, SHAPE

CONFIG = RouterConfig(iterations=50, width=16, std=0.5, warmup=10)
WEIGHTS = (0.5, 0.3, 0.2)
PARENT = parameters(SHAPE, SHAPE.full)


def make(family: Family = FAMILY, **changes: Any) -> Router:
    return Router(dataclasses.replace(CONFIG, **changes), family)


def cost(selection: Selection) -> int:
    """Parameters of a submodel."""
    found: int = parameters(SHAPE, selection.sizes, selection.gates(LAYERS))
    return found


def table_router(*wanted: Selection, family: Family = FAMILY, sharpness: float = 8.0, **changes: Any) -> Router:
    """A router whose nets say exactly: budget `i` wants `wanted[i]`."""
    router = make(family, width=len(wanted), scale=(1.0, 1.0), **changes)
    with torch.no_grad():
        for axis in AXES:
            first, _, last = router.nets[axis]
            first.weight.copy_(torch.eye(len(wanted)))
            last.weight.copy_(torch.stack([one_hot(s, family)[axis].flatten() for s in wanted], dim=1) * sharpness)
    return router
