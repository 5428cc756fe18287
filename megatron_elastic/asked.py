"""The selection that a user asks a family for: one of its budgets, or a size between two of them."""

from pathlib import Path
from typing import Any

from megatron_elastic.budget import Selection
from megatron_elastic.checkpoint import read_tensor
from megatron_elastic.errors import CheckpointError
from megatron_elastic.metadata import ROUTER_PREFIX, Metadata
from megatron_elastic.router import Router, RouterConfig


def _fraction(name: str) -> float | None:
    try:
        return float(name)
    except ValueError:
        return None


def asked_selection(path: Path, family: Metadata, budget: str) -> Selection:
    """The selection of a budget's name, or of a fraction between two budgets, for which the router interpolates.

    Args:
        path: checkpoint of the family.
        family: its description.
        budget: a name, or a number such as `0.6`: a share of the parent's cost in the unit of the budgets around it.

    Raises:
        CheckpointError: no such budget, not decided yet, or a number where no router was trained.
        ElasticError: the number is not between two budgets of one unit.
    """
    fraction = _fraction(budget)
    if fraction is None or budget in [each.name for each in family.budgets]:
        return family.selection_of(budget)
    if not family.selections:
        raise CheckpointError(f"budget {budget}: the router still learns, a size between budgets is not decided yet")
    if not family.router:
        raise CheckpointError(
            f"budget {budget}: {path} was trained without a router (its selections were given), so nothing says what "
            f"lies between {[each.name for each in family.budgets]}"
        )
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in family.router.items()}
    router = Router(RouterConfig(**settings), family.family)
    router.load_state_dict({name: read_tensor(path, ROUTER_PREFIX + name) for name in router.state_dict()})
    return router.decide_between(fraction, router.config.iterations - 1)
