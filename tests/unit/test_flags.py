"""Megatron's flags: which are refused, each by name and with its reason; and which are not."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_elastic.flags import REFUSALS, flag_faults, model_shape, padded_vocabulary, shape_flags, to_argv

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
GOOD: dict[str, Any] = yaml.safe_load(RECIPE.read_text("utf-8"))["megatron"]

# Flag -> a value that is refused, and one that passes (None: the flag is left out).
REFUSED_AND_ALLOWED: dict[str, tuple[Any, Any]] = {
    "calculate-per-token-loss": (None, True),
    "cuda-graph-impl": ("local", "none"),
    "enable-cuda-graph": (True, None),
    "external-cuda-graph": (True, None),
    "use-megatron-fsdp": (True, False),
    "use-torch-fsdp2": (True, None),
    "dataloader-type": ("cyclic", "single"),
    "rampup-batch-size": ([8, 8, 1000], None),
    "full-validation": (True, None),
    "tp-comm-overlap": (True, False),
    "fp8-param-gather": (True, None),
    "fp8-quantizer-factory": ("package.module.factory", None),
    "fp8-output-proj": (True, False),
    "no-fp8-wgrad": (True, False),
    "disable-fp8-wgrad": (True, None),
    "te-precision-config-file": ("precision.yaml", None),
    "moe-router-padding-for-quantization": (True, False),
    "moe-router-padding-for-fp8": (True, None),
    "fp4-format": ("e2m1", None),
    "fp4-param-gather": (True, None),
    "fp16": (True, False),
    "defer-embedding-wgrad-compute": (True, None),
    "delay-wgrad-compute": (True, None),
    "fp32-residual-connection": (True, None),
    "reset-attention-mask": (True, None),
    "reset-position-ids": (True, False),
    "sft": (True, None),
    "cp-comm-type": ("p2p", ["all_gather"]),
    "hierarchical-context-parallel-sizes": ([2, 2], None),
    "hybrid-context-parallel": (True, False),
    "hidden-dropout": (0.1, 0.0),
    "attention-dropout": (None, 0),
    "async-strategy": ("nvrx", "mcore"),
    "rerun-mode": ("report_stats", "validate_results"),
    "mtp-num-layers": (1, None),
    "untie-embeddings-and-output-weights": (None, True),
    "disable-bias-linear": (False, True),
    "add-qkv-bias": (True, None),
    "quick-geglu": (True, None),
    "glu-linear-offset": (1.0, 0.0),
    "activation-func-clamp-value": (7.0, None),
    "qk-layernorm": (True, None),
    "qk-l2-norm": (True, None),
    "attention-output-gate": (True, None),
    "multi-latent-attention": (True, None),
    "experimental-attention-variant": ("gated_delta_net", None),
    "position-embedding-type": ("learned_absolute", "rope"),
    "normalization": ("LayerNorm", "RMSNorm"),
    "apply-layernorm-1p": (True, None),
    "use-mup": (True, None),
    "is-hybrid-model": (True, None),
    "moe-layer-freq": (2, 1),
    "moe-use-upcycling": (True, None),
    "moe-single-grouped-weight": (True, None),
    "moe-single-grouped-bias": (True, None),
    "moe-latent-size": (64, None),
    "moe-shared-expert-gate": (True, None),
    "moe-shared-expert-overlap": (True, False),
    "use-grouped-gemm-for-shared-expert": (True, None),
    "moe-mlp-glu-interleave-size": (32, None),
    "moe-shared-expert-glu-interleave-size": (32, None),
    "moe-apply-probs-on-input": (True, None),
    "moe-router-load-balancing-type": (["aux_loss", "global_aux_loss"], ["aux_loss", "seq_aux_loss"]),
    "recompute-modules": (["moe_act"], ["moe", "layernorm"]),
    "moe-router-num-groups": (4, None),
    "moe-router-group-topk": (2, None),
    "moe-expert-capacity-factor": (1.25, None),
    "moe-expert-rank-capacity-factor": (1.5, None),
    "moe-input-jitter-eps": (0.01, None),
    "moe-router-force-load-balancing": (True, None),
    "moe-router-force-biased": (1.0, None),
    "moe-router-fusion": (True, False),
    "moe-enable-routing-replay": (True, None),
    "moe-routing-trace-path": ("traces", None),
    "moe-token-dispatcher-type": ("flex", "alltoall"),
    "moe-enable-deepep": (True, None),
    "overlap-moe-expert-parallel-comm": (True, None),
    "overlap-dispatch-backward-with-experts-wgrad": (True, None),
    "transformer-impl": ("inference_optimized", "transformer_engine"),
    "use-transformer-engine-op-fuser": (True, None),
    "fused-residual-rmsnorm": (True, None),
    "symmetric-ar-type": ("one_shot", None),
    "batch-invariant-mode": (True, None),
    "window-size": ("128,0", None),
    "softmax-type": ("learnable", "vanilla"),
    "qk-clip": (True, None),
    "log-max-attention-logit": (True, None),
    "fine-grained-activation-offloading": (True, None),
    "cpu-offloading-num-layers": (2, 0),
}
OWNED = [row.flag for row in REFUSALS if row.reason.startswith("set by the elastic section")]


def with_flag(flag: str, value: Any) -> dict[str, Any]:
    flags = {name: kept for name, kept in GOOD.items() if name != flag}
    return flags if value is None else {**flags, flag: value}


def test_the_quickstarts_flags_pass() -> None:
    assert flag_faults(GOOD) == []


def test_every_row_of_the_table_is_tested() -> None:
    rows = [row.flag for row in REFUSALS]
    assert len(rows) == len(set(rows))
    assert set(rows) <= set(REFUSED_AND_ALLOWED) | {*OWNED, "fp8-recipe"}, "add the new row to this test"


@pytest.mark.parametrize("flag", [row.flag for row in REFUSALS if row.flag not in (*OWNED, "fp8-recipe")])
def test_a_refused_flag_is_named_with_its_reason(flag: str) -> None:
    refused, allowed = REFUSED_AND_ALLOWED[flag]
    (fault,) = flag_faults(with_flag(flag, refused))
    assert fault.startswith(f"megatron.{flag}: {refused!r} is refused: ")
    assert len(fault.partition("is refused: ")[2]) > 10
    assert flag_faults(with_flag(flag, allowed)) == []


@pytest.mark.parametrize("flag", OWNED)
def test_what_the_elastic_section_sets_may_not_be_set_twice(flag: str) -> None:
    (fault,) = flag_faults({**GOOD, flag: 1})
    assert flag in fault
    assert "set by the elastic section" in fault


@pytest.mark.parametrize(
    ("feature", "flags"),
    [
        ("tied embeddings", {"untie-embeddings-and-output-weights": False}),
        ("biases of linears", {"disable-bias-linear": False}),
        ("QKV bias", {"add-qkv-bias": True}),
        ("latent experts", {"moe-latent-size": 64}),
        ("gate on the shared expert", {"moe-shared-expert-gate": True}),
        ("qk-norm", {"qk-layernorm": True}),
        ("output gate", {"attention-output-gate": True}),
        ("multi-latent attention", {"multi-latent-attention": True}),
        ("gated delta net", {"experimental-attention-variant": "gated_delta_net"}),
    ],
)
def test_parents_that_no_layer_carries_are_refused_by_name(feature: str, flags: dict[str, Any]) -> None:
    (fault,) = flag_faults({**GOOD, **flags})
    assert feature in fault


@pytest.mark.parametrize(
    "flags",
    [
        {"position-embedding-type": "rope", "rotary-percent": 0.5},
        {"bf16": True},
        {"sequence-parallel": True},
        {"context-parallel-size": 4, "cp-comm-type": "allgather"},
        {"use-distributed-optimizer": True, "overlap-grad-reduce": True, "overlap-param-gather": True},
        {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1},
        {"wandb-project": "family", "tensorboard-dir": "logs"},
        {"no-such-flag-of-ours": 3},
    ],
)
def test_what_is_not_in_the_table_passes(flags: dict[str, Any]) -> None:
    assert flag_faults({**GOOD, **flags}) == []


@pytest.mark.parametrize("flag", ["hidden_size", "--lr", "-lr"])
def test_misspelt_flags_are_told(flag: str) -> None:
    (fault,) = flag_faults({**GOOD, flag: 1})
    assert "hyphens" in fault


def test_layer_kinds_without_an_elastic_layer_are_refused() -> None:
    for pattern, kind in (("M-X*", "X"), ("MG", "G"), ("DM*", "D")):
        faults: list[str] = []
        assert model_shape({**GOOD, "hybrid-layer-pattern": pattern}, faults) is None
        assert f"'{kind}'" in faults[0]


@pytest.mark.parametrize(
    ("flag", "value", "text"),
    [
        ("hidden-size", None, "required"),
        ("hidden-size", "large", "must be a whole number"),
        ("num-attention-heads", 0, "at least 1"),
        ("num-query-groups", 3, "must be a multiple of query_groups 3"),
        ("mamba-num-groups", 3, "must be a multiple of mamba_groups 3"),
        ("vocab-size", None, "required"),
    ],
)
def test_a_shape_that_cannot_be_is_told(flag: str, value: Any, text: str) -> None:
    faults: list[str] = []
    assert model_shape(with_flag(flag, value), faults) is None
    assert len(faults) == 1
    assert text in faults[0]


def test_shape_follows_the_flags_and_back() -> None:
    shape = model_shape(GOOD, [])
    assert shape is not None
    assert (shape.hidden, shape.ffn, shape.query_groups, shape.vocab) == (128, 384, 4, 2048)
    without_groups = model_shape(with_flag("group-query-attention", None), [])
    assert without_groups is not None
    assert without_groups.query_groups == 8
    small = shape.resized({"hidden": 72, "ffn": 128, "mamba_heads": 4, "attention_heads": 4})
    assert model_shape(shape_flags(small, GOOD), []) == small
    assert model_shape(shape_flags(small, GOOD), []) != shape
    # Pipeline separators are part of the layout, not of the shape.
    assert model_shape({**GOOD, "hybrid-layer-pattern": "M-M*-|M-M*-"}, []) == shape


MOE: dict[str, Any] = {
    **GOOD,
    "tensor-model-parallel-size": 2,
    "sequence-parallel": True,
    "hybrid-layer-pattern": "ME*E",
    "swiglu": True,
    "num-experts": 8,
    "moe-ffn-hidden-size": 48,
    "moe-shared-expert-intermediate-size": 96,
    "moe-router-topk": 2,
    "moe-router-score-function": "sigmoid",
    "moe-router-enable-expert-bias": True,
}


def test_a_moe_parents_shape_follows_the_flags_and_back() -> None:
    assert flag_faults(MOE) == []
    shape = model_shape(MOE, [])
    assert shape is not None
    assert (shape.experts, shape.expert_ffn, shape.shared_expert_ffn, shape.top_k, shape.ffn) == (8, 48, 96, 2, 0)
    assert shape.expert_bias
    assert shape.gated
    small = shape.resized({"experts": 4, "expert_ffn": 24, "shared_expert_ffn": 48})
    assert model_shape(shape_flags(small, MOE), []) == small
    assert model_shape({**MOE, "swiglu": False, "moe-router-enable-expert-bias": False}, []) != shape


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"num-experts": None}, "megatron.num-experts: None must be a whole number"),
        ({"moe-router-topk": 9}, "top_k 9 must lie in 1..8"),
        ({"hybrid-layer-pattern": "M*-"}, "'M*-' has no layer E for them"),
        ({"sequence-parallel": False}, "megatron.sequence-parallel: required with MoE layers"),
    ],
)
def test_a_moe_parent_that_cannot_be_is_told(flags: dict[str, Any], text: str) -> None:
    faults: list[str] = []
    assert model_shape({**MOE, **flags}, faults) is None
    assert len(faults) == 1
    assert text in faults[0]


def test_the_vocabulary_is_padded_as_megatron_pads_it() -> None:
    flags = {"vocab-size": 1000, "make-vocab-size-divisible-by": 64}
    assert padded_vocabulary(flags) == 1024
    assert padded_vocabulary({**flags, "tensor-model-parallel-size": 3}) == 1152
    assert padded_vocabulary({"vocab-size": 2048}) == 2048


def test_flags_become_a_command_line() -> None:
    flags = {"bf16": True, "fp8": False, "lr": 1e-3, "blend": [1, "a", 2, "b"], "none": None}
    assert to_argv(flags) == ["--bf16", "--lr", "0.001", "--blend", "1", "a", "2", "b"]
    # What begins like a flag is joined to its own: argparse would take it for another one.
    assert to_argv({"hybrid-layer-pattern": "-M*"}) == ["--hybrid-layer-pattern=-M*"]


def with_fp8(**flags: Any) -> dict[str, Any]:
    return {**GOOD, "fp8-format": "hybrid", **{name.replace("_", "-"): value for name, value in flags.items()}}


@pytest.mark.parametrize("format_", ["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_fp8_with_scales_of_the_moment_passes(format_: str, recipe: str) -> None:
    assert flag_faults(with_fp8(fp8_format=format_, fp8_recipe=recipe)) == []
    ends = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 0}
    assert flag_faults(with_fp8(fp8_format=format_, fp8_recipe=recipe, **ends)) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "megatron.fp8-recipe: required with fp8-format: core's default is delayed scaling"),
        ({"fp8_recipe": "delayed"}, "one history of magnitudes a layer, which all budgets would write"),
        ({"fp8_recipe": "custom"}, "'custom' is refused"),
        ({"fp8_recipe": "rowwise"}, "'rowwise' must be one of ['tensorwise', 'blockwise']"),
        ({"fp8_recipe": "blockwise", "fp8_format": "e5m2"}, "'e5m2' must be one of ['e4m3', 'hybrid']"),
        ({"fp8_recipe": "blockwise", "fp8_param_gather": True}, "would keep the full parameter's scale; no test"),
        ({"fp8_recipe": "blockwise", "tp_comm_overlap": True}, "slices do not; no test covers them"),
        (
            {"fp8_recipe": "blockwise", "first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 11},
            "megatron.num-layers-at-end-in-bf16: 11 must be a whole number from 0 to 10",
        ),
        ({"fp8_format": None, "fp8_recipe": "blockwise"}, "'blockwise' has no effect without fp8-format"),
    ],
)
def test_other_fp8_is_refused_with_its_reason(flags: dict[str, Any], said: str) -> None:
    (fault,) = flag_faults(with_fp8(**flags))
    assert said in fault


@pytest.mark.parametrize(
    ("capability", "what"),
    [(None, "this machine has no GPU"), ((9, 0), "this GPU has compute capability 9.0"), ((10, 0), "")],
)
def test_mxfp8_needs_blackwell(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, what: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    faults = flag_faults(with_fp8(fp8_recipe="mxfp8"))
    if what:
        (fault,) = faults
        assert f"'mxfp8' needs Blackwell (compute capability 10.0), and {what}: use blockwise" in fault
    else:
        assert faults == []
