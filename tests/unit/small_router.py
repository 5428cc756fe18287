"""Routers of the small family, and the selections that meet its budgets."""

import dataclasses
from typing import Any

import torch

from megatron_elastic.axes import AXES
from megatron_elastic.budget import Selection
from megatron_elastic.cost_model import parameters
from megatron_elastic.masks import one_hot
from megatron_elastic.router import Router, RouterConfig
from tests.unit.small_family import FAMILY, SHAPE

CONFIG = RouterConfig(iterations=50, width=16, std=0.5, warmup=10)
WEIGHTS = (0.5, 0.3, 0.2)
PARENT = parameters(SHAPE, SHAPE.full)


def make(**changes: Any) -> Router:
    config = dataclasses.replace(CONFIG, **changes)
    return Router(config, shape=SHAPE, choices=FAMILY.choices, budgets=FAMILY.budgets)


def table_router(*wanted: Selection, sharpness: float = 8.0, **changes: Any) -> Router:
    """A router whose nets say exactly: budget `i` wants `wanted[i]`."""
    router = make(width=len(wanted), scale=(1.0, 1.0), **changes)
    with torch.no_grad():
        for axis in AXES:
            first, _, last = router.nets[axis]
            first.weight.copy_(torch.eye(len(wanted)))
            last.weight.copy_(torch.stack([one_hot(s, FAMILY.choices)[axis] for s in wanted], dim=1) * sharpness)
    return router
