"""Masked and sliced submodels are one model on a GPU too, on the local backend in fp32.

Not run on a GPU yet; the exact proofs are in tests/distributed, in fp64 on the CPU.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_elastic.budget import Selection
from megatron_elastic.masks import one_hot

# fp32: a few hundred roundings of 6e-8 in each layer's sums, carried through seven layers and squared ReLUs.
# The same comparison gives 6e-5 on a CPU.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def kit(engine: None) -> Any:
    from tests.distributed import elastic_kit

    elastic_kit.layout_of_ranks()
    return elastic_kit


def outcome(kit: Any, model: Any, **how: Any) -> dict[str, Tensor]:
    """Logits and every gradient of a sum of them."""
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in kit.batch().items()}
    model.zero_grad(set_to_none=True)
    logits = model(batch["tokens"], batch["position_ids"], None, **how)
    logits.float().log_softmax(-1)[..., 3].sum().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return {"logits": logits.detach(), **grads}


def soft(kit: Any, selection: Selection, device: torch.device) -> dict[str, Tensor]:
    return {axis: p.to(device) for axis, p in one_hot(selection, kit.FAMILY).items()}


def test_masked_is_sliced(kit: Any, device: torch.device) -> None:
    """One-hot masks against slices, forward and gradients."""
    model = kit.elastic_model(dtype=torch.float32).to(device)
    for selection in (kit.FAMILY.full, *kit.SELECTIONS[1:]):
        sliced = outcome(kit, model, selection=selection)
        masked = outcome(kit, model, probabilities=soft(kit, selection, device))
        assert kit.worst(masked, sliced) < TOLERANCE, selection
    other = outcome(kit, model, selection=kit.SELECTIONS[2])
    assert kit.worst(outcome(kit, model, selection=kit.FAMILY.full), other) > 100 * TOLERANCE


def test_full_is_the_plain_model(kit: Any, device: torch.device) -> None:
    """The full selection against core's own layers."""
    model = kit.elastic_model(dtype=torch.float32).to(device)
    stock = kit.stock_model(kit.SHAPE, dtype=torch.float32)
    kit.set_weights(stock, kit.FAMILY.layout, kit.full_weights(kit.FAMILY.layout))
    plain = outcome(kit, stock.to(device))
    assert kit.worst(outcome(kit, model, selection=kit.FAMILY.full), plain) < TOLERANCE
    assert kit.worst(outcome(kit, model, selection=kit.SELECTIONS[2]), plain) > 100 * TOLERANCE
