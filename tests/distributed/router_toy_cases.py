"""Cases of `cases_body.py`, on one rank: a router that meets parents of which half an axis is useless."""

from itertools import product
from typing import Any

import elastic_kit as kit
import torch
from torch import Tensor

from megatron_elastic.budget import Budget, Selection
from megatron_elastic.cost_model import parameters
from megatron_elastic.family import Family
from megatron_elastic.layers.linear import TeacherTarget
from megatron_elastic.layout import ModelShape
from megatron_elastic.router import Router, RouterConfig, RouterTrainer

SHAPE = ModelShape(
    pattern="M-*-", vocab=64, hidden=32, ffn=64, attention_heads=8, query_groups=2, head_dim=4,
    mamba_heads=8, mamba_head_dim=4, mamba_groups=2, mamba_state=6,
)  # fmt: skip
NARROWED = {
    "hidden": (32, 31, 30, 29, 28, 27, 26, 25, 24),
    "ffn": (64, 32),
    "mamba_heads": (8, 4),
    "attention_heads": (8, 4),
}
TOLERANCE = 0.03
SEEDS = (1, 2, 3)
STEPS = 80
TOYS = ("ffn", "mamba_heads")
HALVED = {axis: Selection.from_dict({**SHAPE.full, axis: SHAPE.full[axis] // 2}) for axis in TOYS}


def family(axis: str) -> Family:
    """The toy whose smaller budget is as large as the parent without half of `axis`."""
    target = parameters(SHAPE, HALVED[axis].sizes) / parameters(SHAPE, SHAPE.full)
    return Family(shape=SHAPE, ffn_blocks=8, choices=NARROWED, budgets=(Budget("p100", 1.0), Budget("small", target)))


def halves(blocks: int, size: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows of the first and of the second half of every block, `width` rows an entry."""
    rows = torch.arange(size * width).view(blocks, 2, -1)
    return rows[:, 0].flatten(), rows[:, 1].flatten()


def useless_half(axis: str) -> dict[str, Tensor]:
    """A parent's weights in which the second half of every block of `axis` changes nothing, exactly.

    Neurons: nothing reads them. Mamba heads: nothing reads them, and they repeat the first half, so that the gated
    norm's mean square inside their group is the same without them.
    """
    weights = kit.full_weights(family(axis).layout)
    if axis == "ffn":
        _, gone = halves(8, 64, 1)
        for layer in (1, 3):
            weights[f"decoder.layers.{layer}.mlp.linear_fc2.weight"][:, gone] = 0
    else:
        mixer = "decoder.layers.0.mixer"
        kept, gone = halves(2, 8, 4)
        head_kept, head_gone = halves(2, 8, 1)
        for name in ("dt_bias", "A_log", "D"):
            weights[f"{mixer}.{name}"][head_gone] = weights[f"{mixer}.{name}"][head_kept]
        weights[f"{mixer}.norm.weight"][gone] = weights[f"{mixer}.norm.weight"][kept]
        packed = weights[f"{mixer}.in_proj.weight"]  # z and x of 32 channels, B and C of 12 states, dt of 8 heads
        for offset in (0, 32):
            packed[offset + gone] = packed[offset + kept]
        packed[88 + head_gone] = packed[88 + head_kept]
        for name in ("conv1d_weight", "conv1d_bias"):
            weights[f"{mixer}.{name}"][gone] = weights[f"{mixer}.{name}"][kept]
        weights[f"{mixer}.out_proj.weight"][:, gone] = 0
    return weights


def toy(axis: str) -> Any:
    """The frozen model of the toy, its teacher the same parent."""
    model = kit.elastic_model(family=family(axis))
    for one in (model, model.teachers[0]):
        kit.set_weights(one, family(axis).layout, useless_half(axis))
    return model.requires_grad_(False)


def teacher_of(model: Any, index: int) -> TeacherTarget:
    """What the frozen teacher says of one batch."""
    batch = kit.batch(index, length=16)
    with torch.no_grad():
        target: TeacherTarget = model.teacher_target(model(batch["tokens"], batch["position_ids"], run_teacher=True))
    return target


def kd(model: Any, index: int, target: TeacherTarget | None = None, **how: Any) -> Tensor:
    """Summed KL of one batch to the teacher, per token."""
    batch = kit.batch(index, length=16)
    where = batch["tokens"], batch["position_ids"]
    if target is None:
        target = teacher_of(model, index)
    loss: Tensor = model(*where, **how, teacher=target, loss_mask=batch["loss_mask"])
    return loss / batch["loss_mask"].sum()


def train(model: Any, axis: str, seed: int, *, blind: bool = False) -> dict[str, Any]:
    """A short run of the router alone; what it decides. A blind one sees the penalty but not the KD loss."""
    config = RouterConfig(iterations=STEPS, width=64, warmup=5, tolerance=TOLERANCE, seed=seed)
    declared = family(axis)
    router = Router(config, declared)
    trainer = RouterTrainer(router, (0.5, 0.5))
    before = router.decide(0)[1]
    targets = [teacher_of(model, index) for index in range(4)]
    for step in range(STEPS):
        leaves = trainer.leaves(step, 1)
        if not blind:
            kd(model, step % 4, targets[step % 4], probabilities=leaves).backward()  # type: ignore[no-untyped-call]
        trainer.reduce(torch.tensor(1))
        trainer.commit()
    quiet = {name: router.probabilities(1, name, STEPS, noise=False) for name in router.choices}
    return {
        "before": before.as_dict(),
        "decided": router.decide(STEPS)[1].as_dict(),
        "wanted": HALVED[axis].as_dict(),
        "certainty": {name: float(quiet[name].max()) for name in router.nets},
        "cost": float(router.expected_cost(1, quiet)),
    }


def reachable(axis: str, model: Any) -> dict[str, float]:
    """The KL of every selection that meets the toy's target."""
    target = parameters(SHAPE, HALVED[axis].sizes)
    found = {}
    for sizes in product(*NARROWED.values()):
        selection = Selection.from_dict({**SHAPE.full, **dict(zip(NARROWED, sizes, strict=True))})
        if abs(parameters(SHAPE, selection.sizes) / target - 1) <= TOLERANCE:
            with torch.no_grad():
                found[str(selection.as_dict())] = float(kd(model, 0, selection=selection))
    return found


def gradients(model: Any) -> dict[str, dict[str, float]]:
    """The KD loss's gradient of every axis' probabilities at a soft selection, and its error to finite differences."""
    made = {
        axis: torch.linspace(0.6, 0.2, len(choices), dtype=torch.float64).softmax(0).repeat(kit.FAMILY.uses(axis), 1)
        for axis, choices in kit.FAMILY.choices.items()
    }
    leaves = {axis: p.clone().requires_grad_() for axis, p in made.items()}
    kd(model, 0, probabilities=leaves).backward()  # type: ignore[no-untyped-call]
    found = {}
    for axis in made:
        gradient = leaves[axis].grad
        assert gradient is not None
        direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        with torch.no_grad():
            there, back = (
                kd(model, 0, probabilities={**made, axis: made[axis] + sign * 1e-5 * direction}) for sign in (1, -1)
            )
        numeric = (there - back) / 2e-5
        exact = (gradient * direction).sum()
        error = (numeric - exact).abs() / exact.abs()
        found[axis] = {"norm": float(gradient.norm()), "error": float(error)}
    return found


def run_all() -> dict[str, Any]:
    """Every toy on every seed."""
    kit.layout_of_ranks()
    found: dict[str, Any] = {}
    for axis in TOYS:
        model = toy(axis)
        found[axis] = {
            "reachable": reachable(axis, model),
            "runs": [train(model, axis, seed) for seed in SEEDS],
            "blind": [train(model, axis, seed, blind=True) for seed in SEEDS],
        }
    # An ordinary parent, every axis of it narrowed: every part of it matters.
    found["gradients"] = gradients(kit.elastic_model())
    return found
