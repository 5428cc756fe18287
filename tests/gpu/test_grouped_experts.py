"""Experts in one grouped product on a GPU are the experts one after the other.

Not run on a GPU yet; the equalities of MoE layers are proved in tests/distributed, in fp64 on the CPU,
where the grouped product is its reference.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_elastic.ops.grouped_linear import grouped_linear_ref, grouped_product

# bf16 keeps 8 bits: a product of hundreds of terms, summed in fp32, is rounded once to 4e-3.
TOLERANCE = 2e-2


@pytest.fixture(scope="module")
def kit(engine: None) -> Any:
    sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
    from tests.distributed import moe_kit

    moe_kit.layout_of_ranks()
    return moe_kit


def test_the_kernel_is_its_reference(device: torch.device) -> None:
    """Forward and gradients, with groups that have no row."""
    generator = torch.Generator().manual_seed(2)
    sizes = (96, 64), (4, 128, 64), (96, 128)
    x, weights, grad = (torch.randn(*size, generator=generator).bfloat16().to(device) for size in sizes)
    x.requires_grad_()
    weights.requires_grad_()
    for counts in ((40, 0, 33, 23), (0, 0, 96, 0)):
        made, each = grouped_product(x, weights, counts), grouped_linear_ref(x, weights, counts)
        found = made, *torch.autograd.grad(made, (x, weights), grad)
        wanted = each, *torch.autograd.grad(each, (x, weights), grad)
        for a, b in zip(found, wanted, strict=True):
            assert (a - b).abs().max() < TOLERANCE * b.abs().max()
    assert (grouped_product(x, weights.flip(0), counts) - each).abs().max() > 0.1 * each.abs().max()


def test_grouped_slices_are_slices_one_after_the_other(kit: Any, device: torch.device) -> None:
    """The experts of a layer in bf16, of which some are left out and one has no token."""
    family = kit.family(kit.shape(gated=True))
    small = family.select({**family.full.sizes, "experts": family.choices["experts"][-1]})
    generator = torch.Generator().manual_seed(3)
    tokens, grad = (torch.randn(96, 32, generator=generator).bfloat16().to(device) for _ in range(2))
    weight = torch.rand(96, generator=generator).bfloat16().to(device)
    counts = torch.tensor([40, 0, 0, 0, 33, 23, 0, 0])  # two blocks, the first two of each are kept
    found = []
    for grouped in (False, True):
        model = kit.elastic_model(family, **{**kit.SOFTMAX, "moe_grouped_gemm": grouped})
        kit.set_weights(model, family.layout, kit.full_weights(family.layout))
        experts = model.bfloat16().to(device).decoder.layers[1].mlp.experts
        plan = model.decoder.plans.of(small).layers[1]
        out, _ = experts(tokens, counts, weight, plan=plan)
        out.backward(grad)
        kept = {name: p.grad for name, p in experts.named_parameters() if p.grad is not None and p.grad.any()}
        found.append({"out": out.detach(), **kept})
    one_by_one, together = found
    assert len(together) == 1 + 3 * 2
    for name, wanted in one_by_one.items():
        assert (together[name] - wanted).abs().max() < TOLERANCE * wanted.abs().max(), name
    assert (one_by_one["out"] - one_by_one["out"].roll(1, 0)).abs().max() > 0.1 * one_by_one["out"].abs().max()
