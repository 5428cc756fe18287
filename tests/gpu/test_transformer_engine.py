"""The equalities on Transformer Engine's own kernels, on one GPU; on the CPU on a stand-in that computes with torch.

Not run on a GPU yet. In fp64 the stand-in proves them in tests/distributed/test_engine.py.
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_elastic.backend import LOCAL, TRANSFORMER_ENGINE, transformer_engine_fault
from megatron_elastic.budget import Budget, Selection
from megatron_elastic.cost_model import parameters
from megatron_elastic.family import Family
from megatron_elastic.layout import ModelShape
from megatron_elastic.masks import one_hot

# Channels and neurons of every choice are multiples of 16, as FP8 wants them, and so are Mamba's heads, each of which
# has a row in the input projection; attention's are as wide as the fused kernels take.
SHAPE = ModelShape(
    pattern="M-*M-*-", vocab=64, hidden=256, ffn=512, attention_heads=8, query_groups=2, head_dim=64,
    mamba_heads=32, mamba_head_dim=32, mamba_groups=2, mamba_state=64,
)  # fmt: skip
FAMILY = Family(
    shape=SHAPE,
    ffn_blocks=8,
    choices={
        "hidden": (256, 192, 128),
        "ffn": (512, 384, 256),
        "mamba_heads": (32, 16),
        "mamba_head_dim": (32, 16),
        "attention_heads": (8, 6, 4),
        "depth": (7, 6, 5),
    },
    heterogeneous=("ffn",),
    depth_ranking=(4, 3),
    budgets=(Budget("p100", 1.0), Budget("p50", 0.5)),
)
SMALL = FAMILY.select({axis: choices[-1] for axis, choices in FAMILY.choices.items()})
MIXED = FAMILY.select({**SHAPE.full, "hidden": 192, "ffn": (384, 512, 256), "attention_heads": 6, "mamba_heads": 16})
TF32, BF16 = 1e-2, 5e-2
"""Worst error of logits and gradients, each over its largest value. Transformer Engine multiplies fp32 in TF32, whose
inputs keep 10 bits, and bf16 keeps 8: roundings of 5e-4 or 4e-3, some dozen of them one after the other, at random."""
APART = 3e-1
"""What another selection makes at least."""
Outcome = dict[str, Tensor]


@pytest.fixture(scope="module")
def kit(device: torch.device, engine: None) -> Iterator[Any]:
    from tests.distributed import elastic_kit, fake_engine

    if device.type == "cpu":
        with fake_engine.installed():
            yield elastic_kit
        return
    fault = transformer_engine_fault(cuda=True)
    if fault is not None:
        pytest.skip(f"needs Transformer Engine: {fault}")
    yield elastic_kit


def weights(kit: Any) -> dict[str, Tensor]:
    """Every parameter, such that activations keep their size through the layers."""
    found: dict[str, Tensor] = kit.full_weights(FAMILY.layout)
    return {name: value * (32 / value.size(1)) ** 0.5 if value.dim() == 2 else value for name, value in found.items()}


def elastic(kit: Any, dtype: torch.dtype, backend: str = TRANSFORMER_ENGINE, **other: Any) -> Any:
    """The family's model with these weights, on the device."""
    model = kit.elastic_model(dtype=dtype, family=FAMILY, backend=backend, **other)
    kit.set_weights(model, FAMILY.layout, weights(kit))
    return model.to(torch.cuda.current_device())


def extracted(kit: Any, selection: Selection, dtype: torch.dtype, **other: Any) -> Any:
    """Core's model of the submodel's shape with the kept weights, on the device."""
    shape = selection.submodel(SHAPE)
    model = kit.stock_model(shape, dtype=dtype, backend=TRANSFORMER_ENGINE, **other)
    kit.set_weights(model, kit.SubmodelLayout(shape, 8), kit.cut(weights(kit), FAMILY.layout, selection))
    return model.to(torch.cuda.current_device())


def outcome(kit: Any, model: Any, **how: Any) -> Outcome:
    """Logits and the gradient of every weight."""
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in kit.batch(length=64).items()}
    model.zero_grad(set_to_none=True)
    logits = model(batch["tokens"], batch["position_ids"], None, **how).float()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return {"logits": logits.detach().double().cpu(), **{name: grad.double().cpu() for name, grad in grads.items()}}


def soft(model: Any, selection: Selection) -> Mapping[str, Any]:
    """Keyword of the masked path at one-hot."""
    device = next(model.parameters()).device
    return {"probabilities": {axis: p.to(device) for axis, p in one_hot(selection, FAMILY).items()}}


def in_the_parent(kit: Any, found: Outcome, selection: Selection) -> Outcome:
    """A submodel's outcome with its gradients in their place in the parent's."""
    grads = {name: value for name, value in found.items() if name != "logits"}
    return {"logits": found["logits"], **kit.scatter_back(grads, FAMILY.layout, selection)}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, BF16), (torch.float32, TF32)])
@pytest.mark.parametrize("selection", [SMALL, MIXED], ids=["small", "mixed"])
def test_masked_is_sliced_is_extracted(kit: Any, dtype: torch.dtype, limit: float, selection: Selection) -> None:
    """Equality 2, and 4: the extracted model has as many parameters as the formula says."""
    model, cut = elastic(kit, dtype), extracted(kit, selection, dtype)
    sliced = outcome(kit, model, selection=selection)
    assert kit.worst(in_the_parent(kit, outcome(kit, cut), selection), sliced) < limit
    assert kit.worst(outcome(kit, model, **soft(model, selection)), sliced) < limit
    other = MIXED if selection is SMALL else SMALL
    assert kit.worst(outcome(kit, model, selection=other), sliced) > APART
    count = parameters(SHAPE, selection.sizes, selection.gates(len(SHAPE.pattern)))
    assert sum(each.numel() for each in cut.parameters()) == count


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, BF16), (torch.float32, TF32)])
def test_full_is_the_plain_model(kit: Any, dtype: torch.dtype, limit: float) -> None:
    """Equality 1, on both backends."""
    model, plain = elastic(kit, dtype), outcome(kit, extracted(kit, FAMILY.full, dtype))
    for how in ({}, {"selection": FAMILY.full}, soft(model, FAMILY.full)):
        assert kit.worst(outcome(kit, model, **how), plain) < limit
    assert kit.worst(outcome(kit, elastic(kit, dtype, LOCAL), selection=FAMILY.full), plain) < limit
    assert kit.worst(outcome(kit, model, selection=SMALL), plain) > APART


def test_full_is_cores_own_stack(kit: Any, device: torch.device) -> None:
    """Equality 1 against core's layers as they are: norms fused into Transformer Engine's linears, mamba-ssm's scan."""
    if device.type == "cpu" or importlib.util.find_spec("mamba_ssm") is None:
        pytest.skip("core's own stack needs Transformer Engine and mamba-ssm on a GPU")
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from megatron_elastic.checkpoint import FUSED_NORMS

    stock = HybridModel(
        config=kit.config(SHAPE, dtype=torch.bfloat16, use_cpu_initialization=False),
        hybrid_stack_spec=hybrid_stack_spec,
        vocab_size=SHAPE.vocab,
        max_sequence_length=64,
        hybrid_layer_pattern=SHAPE.pattern,
        parallel_output=True,
        position_embedding_type="none",
    ).cuda()
    values = weights(kit)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            fused = next((end for end in FUSED_NORMS if name.endswith(f".{end}")), None)
            own = name if fused is None else name.removesuffix(fused) + FUSED_NORMS[fused]
            parameter.copy_(values[own])
    tokens = {key: value.cuda() for key, value in kit.batch(length=64).items()}
    model = elastic(kit, torch.bfloat16)
    where = tokens["tokens"], tokens["position_ids"], None
    wanted = stock(*where).detach().float()
    found = model(*where, selection=FAMILY.full).detach().float()
    other = model(*where, selection=SMALL).detach().float()
    assert (found - wanted).abs().max() < BF16 * wanted.abs().max()
    assert (other - wanted).abs().max() > APART * wanted.abs().max()


@pytest.mark.parametrize(
    "other",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp", "layernorm"]},
    ],
    ids=["full", "selective"],
)
def test_recompute_changes_nothing(kit: Any, other: dict[str, Any]) -> None:
    """Equality 5, with two budgets in flight: the backward of each comes after the forward of the other."""
    results = []
    for settings in ({}, other):
        model = elastic(kit, torch.bfloat16, **settings)
        batch = {key: value.cuda() for key, value in kit.batch(length=64).items()}
        where = batch["tokens"], batch["position_ids"], None
        losses = [model(*where, selection=each).float().square().mean() for each in (SMALL, MIXED)]
        for loss in losses:
            loss.backward()
        results.append({name: p.grad.double().cpu() for name, p in model.named_parameters()})
    # The same kernels on the same numbers, but for the order of sums in attention's backward.
    assert kit.worst(results[1], results[0]) < BF16 / 10


def test_two_runs_are_one_where_kernels_are_deterministic(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32: the same bits twice, and other bits of another budget."""
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        model = elastic(kit, torch.float32, deterministic_mode=True)
        one, again = (outcome(kit, model, selection=MIXED) for _ in range(2))
        other = outcome(kit, model, selection=SMALL)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["logits"], other["logits"])


def test_gradients_of_all_budgets_meet_in_main_grad(kit: Any) -> None:
    """bf16 weights, fp32 buffers: what each budget brings is added to what the others brought."""
    model = elastic(kit, torch.bfloat16)
    hows = [{"selection": SMALL}, dict(soft(model, MIXED)), {"selection": FAMILY.full}]
    alone = [outcome(kit, model, **how) for how in hows]
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
    for how in hows:
        outcome(kit, model, **how)
    for name, parameter in model.named_parameters():
        if "linear" in name or "_proj" in name:
            assert parameter.grad_added_to_main_grad
            wanted = sum(each[name] for each in alone)
            error = (parameter.main_grad.double().cpu() - wanted).abs().max()
            assert error < BF16 / 10 * wanted.abs().max(), name


def test_documents_are_each_document_alone(kit: Any) -> None:
    """Packed attention (`thd`), and a batch of more rows than one."""
    model, length, ends = elastic(kit, torch.bfloat16), 64, (20, 37, 64)
    tokens = torch.randint(SHAPE.vocab, (2, length), generator=torch.Generator().manual_seed(5)).cuda()
    places = torch.arange(length, device=tokens.device).expand(2, -1)
    documents = torch.bucketize(places.contiguous(), torch.tensor(ends, device=tokens.device), right=True).int()
    packed = model(tokens, places, None, selection=MIXED, documents=documents).float()
    whole = model(tokens, places, None, selection=MIXED).float()
    starts = (0, *ends[:-1])
    alone = [
        model(tokens[:, a:b].contiguous(), places[:, : b - a].contiguous(), None, selection=MIXED).float()
        for a, b in zip(starts, ends, strict=True)
    ]
    wanted = torch.cat(alone, 1)
    assert (packed - wanted).abs().max() < BF16 * wanted.abs().max()
    assert (whole - wanted).abs().max() > APART * wanted.abs().max()


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_quantised_slices_are_quantised_extracted_models(kit: Any, device: torch.device, recipe: str) -> None:
    """Each slice is quantised with its own scales, once for all its uses, as the extracted model is."""
    if device.type == "cpu":
        pytest.skip("the stand-in has another FP8 than Transformer Engine: see tests/distributed/test_engine.py")
    from megatron.core.fp8_utils import get_fp8_context

    from megatron_elastic.layers.quantized_once import weights_changed

    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip(f"{recipe} scaling needs compute capability 9.0, this GPU has {torch.cuda.get_device_capability()}")
    quantised = {"fp8": "hybrid", "fp8_recipe": recipe}
    model, exact = elastic(kit, torch.bfloat16, **quantised), elastic(kit, torch.bfloat16)
    weights_changed(model)
    for selection in (SMALL, MIXED):
        cut = extracted(kit, selection, torch.bfloat16, **quantised)
        with get_fp8_context(cut.config):
            wanted = in_the_parent(kit, outcome(kit, cut), selection)
        first, again = (outcome(kit, model, selection=selection) for _ in range(2))
        # The same kernels on the same numbers: what is left is attention's backward.
        assert torch.equal(first["logits"], wanted["logits"])
        assert torch.equal(again["logits"], first["logits"])
        assert kit.worst(first, wanted) < BF16 / 10
        unquantised = outcome(kit, exact, selection=selection)
        assert (first["logits"] - unquantised["logits"]).abs().max() > 1e-3 * unquantised["logits"].abs().max()
    with torch.no_grad():
        model.decoder.layers[1].mlp.linear_fc1.weight.mul_(2)
    assert torch.equal(outcome(kit, model, selection=MIXED)["logits"], first["logits"])  # nobody has said so
    weights_changed(model)
    assert not torch.equal(outcome(kit, model, selection=MIXED)["logits"], first["logits"])
