"""Megatron's flags in a recipe: the model they describe, and the one table of those that elastic training refuses."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_elastic.backend import BACKENDS
from megatron_elastic.backend import FLAG as BACKEND_FLAG
from megatron_elastic.layout import ModelShape
from megatron_elastic.precision import precision_faults


@dataclass(frozen=True)
class Refusal:
    """A flag that would break elastic training.

    Attributes:
        flag: Megatron's name, without dashes in front.
        refused: whether a value is refused (None: the flag is absent).
        reason: what it breaks and what to do.
    """

    flag: str
    refused: Callable[[Any], bool]
    reason: str


def _given(value: Any) -> bool:
    return value is not None and value is not False


def _missing(value: Any) -> bool:
    return not _given(value)


def _not_gathered(value: Any) -> bool:
    kinds = value if isinstance(value, list) else [value]
    return any(kind not in (None, "all_gather", "allgather") for kind in kinds)


def _not(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: value not in allowed


def _without(package: str, needed_by: str) -> Callable[[Any], bool]:
    return lambda value: value == needed_by and importlib.util.find_spec(package) is None


def _expert_activations(value: Any) -> bool:
    return "moe_act" in (value if isinstance(value, list) else [value])


def _balanced_over_steps(value: Any) -> bool:
    kinds = value if isinstance(value, list) else [value]
    return any(kind not in (None, "none", "aux_loss", "seq_aux_loss") for kind in kinds)


_OWNED = "set by the elastic section (stages, data, save): remove it here"
_SELECTION = "a captured graph replays one selection; every microbatch of a step has another one"
_NO_LAYER = "no elastic layer carries it"

_OWNED_FLAGS = (
    *("train-iters", "train-samples", "global-batch-size", "micro-batch-size", "seq-length", "max-position-embeddings"),
    *("data-path", "train-data-path", "valid-data-path", "test-data-path", "split", "eval-iters", "eval-interval"),
    *("save", "load", "save-interval", "finetune", "pretrained-checkpoint", "lr-decay-iters", "lr-decay-samples"),
    *("skip-train", "spec"),
)

_PRECISION = (
    Refusal(
        "fp8-param-gather",
        _given,
        "a slice of an FP8 parameter would keep the full parameter's scale; no test covers one of its own",
    ),
    Refusal(
        "fp8-recipe",
        lambda value: value in ("delayed", "custom"),
        "delayed scaling keeps one history of magnitudes a layer, which all budgets would write, and a custom recipe "
        "may: use tensorwise or blockwise",
    ),
    Refusal("fp8-quantizer-factory", _given, "it is a custom recipe's: use fp8-recipe tensorwise or blockwise"),
    Refusal("fp8-output-proj", _given, "the LM head's product is inside the KD loss, and is not quantised"),
    Refusal("no-fp8-wgrad", _given, "core hands it to delayed scaling alone"),
    Refusal("disable-fp8-wgrad", _given, "core hands it to delayed scaling alone"),
    Refusal("te-precision-config-file", _given, "no elastic layer reads it: first-last-layers-bf16 is carried"),
    Refusal("moe-router-padding-for-quantization", _given, "the elastic router does not pad: experts pad their tokens"),
    Refusal("moe-router-padding-for-fp8", _given, "the elastic router does not pad: experts pad their tokens"),
    Refusal("fp4-format", _given, "FP4 needs Blackwell, and no test covers a slice of it: use fp8-format"),
    Refusal("fp4-param-gather", _given, "FP4 needs Blackwell, and no test covers a slice of it: use fp8-format"),
)

REFUSALS: tuple[Refusal, ...] = (
    # What the joint step relies on.
    Refusal("calculate-per-token-loss", _missing, "required: without it core divides by the teacher's microbatch too"),
    Refusal("cuda-graph-impl", _not(None, "none"), _SELECTION),
    Refusal("enable-cuda-graph", _given, _SELECTION),
    Refusal("external-cuda-graph", _given, _SELECTION),
    Refusal("use-megatron-fsdp", _given, "sliced gradients are added into DDP's main_grad, which FSDP does not keep"),
    Refusal("use-torch-fsdp2", _given, "sliced gradients are added into DDP's main_grad, which FSDP does not keep"),
    Refusal(
        "dataloader-type", _not(None, "single"), "cyclic and external loaders break the groups of roles: use single"
    ),
    Refusal("rampup-batch-size", _given, "a batch that is no multiple of the roles' groups breaks them"),
    Refusal("full-validation", _given, "its last batch is no multiple of the roles' groups"),
    Refusal(
        "tp-comm-overlap", _given, "its user buffers have the full layer's shape, slices do not; no test covers them"
    ),
    *_PRECISION,
    Refusal("fp16", _given, "loss scaling would scale the router's gradients: use bf16"),
    Refusal("defer-embedding-wgrad-compute", _given, "the LM head's gradient is made inside the KD loss"),
    Refusal("delay-wgrad-compute", _given, "sliced gradients are added in the backward of the slice"),
    Refusal("fp32-residual-connection", _given, "the elastic stack keeps the residual in the parameters' type"),
    Refusal("reset-attention-mask", _given, "no attention mask is built: use dataloader-inter-document-masking"),
    Refusal("reset-position-ids", _given, "positions follow the documents: use dataloader-inter-document-masking"),
    Refusal("sft", _given, "conversation data has another data set: give token data"),
    Refusal("cp-comm-type", _not_gathered, "the local attention gathers keys and values: all_gather, or leave it out"),
    Refusal("hierarchical-context-parallel-sizes", _given, "keys and values are gathered over one group of ranks"),
    Refusal("hybrid-context-parallel", _given, "every sequence of a stage is split over all context-parallel ranks"),
    Refusal(
        "hidden-dropout", _not(0, 0.0), "must be 0: with dropout what trains is not what is cut (core's default is 0.1)"
    ),
    Refusal(
        "attention-dropout",
        _not(0, 0.0),
        "must be 0: with dropout what trains is not what is cut (core's default is 0.1)",
    ),
    Refusal(
        "async-strategy",
        _without("nvidia_resiliency_ext", "nvrx"),
        "nvidia-resiliency-ext is not installed: leave the flag out (mcore is the default here), or install it",
    ),
    Refusal(
        "rerun-mode",
        _not(None, "disabled", "validate_results"),
        "core's parser and core's own code name it differently",
    ),
    # Parents that no elastic layer carries.
    Refusal("mtp-num-layers", _given, f"multi-token prediction: {_NO_LAYER}"),
    Refusal("untie-embeddings-and-output-weights", _missing, f"tied embeddings: {_NO_LAYER}; untie them"),
    Refusal("disable-bias-linear", _missing, f"biases of linears: {_NO_LAYER}; disable them"),
    Refusal("add-qkv-bias", _given, f"a QKV bias: {_NO_LAYER}"),
    Refusal("quick-geglu", _given, f"another gate: {_NO_LAYER}; swiglu is carried"),
    Refusal("glu-linear-offset", _not(None, 0, 0.0), f"an offset in the gate: {_NO_LAYER}"),
    Refusal("activation-func-clamp-value", _given, f"clamped activations: {_NO_LAYER}"),
    Refusal("qk-layernorm", _given, f"qk-norm: {_NO_LAYER}"),
    Refusal("qk-l2-norm", _given, f"qk-norm: {_NO_LAYER}"),
    Refusal("attention-output-gate", _given, f"an attention output gate: {_NO_LAYER}"),
    Refusal("multi-latent-attention", _given, f"multi-latent attention: {_NO_LAYER}"),
    Refusal("experimental-attention-variant", _given, f"gated delta net and other variants: {_NO_LAYER}"),
    Refusal(
        "position-embedding-type",
        _not("none", "rope"),
        "none and rope are carried (core's default is learned_absolute)",
    ),
    Refusal(
        "normalization",
        _not("RMSNorm"),
        "RMSNorm is the norm that knows its effective width (core's default is LayerNorm)",
    ),
    Refusal("apply-layernorm-1p", _given, f"zero-centred norms: {_NO_LAYER}"),
    Refusal("use-mup", _given, f"muP multipliers: {_NO_LAYER}"),
    Refusal("is-hybrid-model", _given, "deprecated in core: hybrid-layer-pattern says it"),
    # Mixture of experts.
    Refusal("moe-layer-freq", _not(None, 1), "hybrid-layer-pattern says which layers have experts (E)"),
    Refusal("moe-use-upcycling", _given, "the parent comes from a checkpoint: upcycle it with Megatron first"),
    Refusal("moe-single-grouped-weight", _given, "experts have a weight each here: leave it out"),
    Refusal("moe-single-grouped-bias", _given, "experts have no biases: leave it out"),
    Refusal("moe-latent-size", _given, f"latent experts: {_NO_LAYER}"),
    Refusal("moe-shared-expert-gate", _given, f"a gate on the shared expert: {_NO_LAYER}"),
    Refusal("moe-shared-expert-overlap", _given, "the dispatcher would run the shared expert without its selection"),
    Refusal("use-grouped-gemm-for-shared-expert", _given, "it is Transformer Engine's: leave it out"),
    Refusal("moe-mlp-glu-interleave-size", _given, "a gated layer has all rows of the gate before the others here"),
    Refusal("moe-shared-expert-glu-interleave-size", _given, "the gate's rows come before the others here"),
    Refusal("moe-apply-probs-on-input", _given, f"weights before the experts: {_NO_LAYER}"),
    Refusal(
        "moe-router-load-balancing-type",
        _balanced_over_steps,
        "aux_loss, seq_aux_loss and none look at one microbatch; the others keep counts that budgets would mix",
    ),
    Refusal("recompute-modules", _expert_activations, "moe_act has no elastic form: recompute moe or shared_experts"),
    Refusal("moe-router-num-groups", _given, "a narrower model has fewer experts a group: other groups would win"),
    Refusal("moe-router-group-topk", _given, "a narrower model has fewer experts a group: other groups would win"),
    Refusal("moe-expert-capacity-factor", _given, "a capacity follows from the number of experts, which is a choice"),
    Refusal("moe-expert-rank-capacity-factor", _given, "a capacity would drop other tokens in every budget"),
    Refusal("moe-input-jitter-eps", _given, "with noise in the router what trains is not what is cut"),
    Refusal("moe-router-force-load-balancing", _given, "random routing is for benchmarks"),
    Refusal("moe-router-force-biased", _given, "random routing is for benchmarks"),
    Refusal("moe-router-fusion", _given, "the fused kernel knows no masks: leave it out"),
    Refusal("moe-enable-routing-replay", _given, "a replayed choice of experts is another selection's"),
    Refusal("moe-routing-trace-path", _given, "the trace does not see the elastic router"),
    Refusal("moe-token-dispatcher-type", _not(None, "allgather", "alltoall"), "allgather and alltoall are carried"),
    Refusal("moe-enable-deepep", _given, "it is the flex dispatcher's: allgather and alltoall are carried"),
    Refusal("overlap-moe-expert-parallel-comm", _given, "its schedule runs core's layers piece by piece"),
    Refusal("overlap-dispatch-backward-with-experts-wgrad", _given, "sliced gradients are added in the backward"),
    # Transformer Engine.
    Refusal(BACKEND_FLAG, _not(None, *BACKENDS), "transformer_engine and local have elastic layers"),
    Refusal("use-transformer-engine-op-fuser", _given, "it fuses norm and linears, which elastic layers keep apart"),
    Refusal("fused-residual-rmsnorm", _given, "its norm does not know the effective width of a mask"),
    Refusal("symmetric-ar-type", _given, "its buffers have one shape, slices have several; no test covers them"),
    Refusal("batch-invariant-mode", _given, "it replaces kernels of core's layers, not those of elastic ones"),
    Refusal("window-size", _given, f"attention inside a window: {_NO_LAYER}"),
    Refusal("softmax-type", _not(None, "vanilla"), f"another softmax in attention: {_NO_LAYER}"),
    Refusal("qk-clip", _given, f"clipped attention scores: {_NO_LAYER}"),
    Refusal("log-max-attention-logit", _given, "elastic attention does not tell its largest score: leave it out"),
    Refusal("fine-grained-activation-offloading", _given, "the elastic stack's loop does not offload: use recompute"),
    Refusal("cpu-offloading-num-layers", _not(None, 0), "the elastic stack's loop does not offload: use recompute"),
    # What the elastic section sets.
    *(Refusal(flag, _given, _OWNED) for flag in _OWNED_FLAGS),
)
"""The one table: a flag that is not in it reaches Megatron unchanged."""

_SIZES = {
    "hidden": "hidden-size",
    "ffn": "ffn-hidden-size",
    "attention_heads": "num-attention-heads",
    "mamba_heads": "mamba-num-heads",
    "mamba_head_dim": "mamba-head-dim",
    "mamba_groups": "mamba-num-groups",
    "mamba_state": "mamba-state-dim",
    "experts": "num-experts",
    "expert_ffn": "moe-ffn-hidden-size",
    "shared_expert_ffn": "moe-shared-expert-intermediate-size",
    "top_k": "moe-router-topk",
}
"""Field of `ModelShape` -> the flag that gives it."""

_NEEDED = {
    "M": ("mamba_heads", "mamba_head_dim", "mamba_groups", "mamba_state"),
    "*": ("attention_heads",),
    "-": ("ffn",),
    "E": ("experts", "expert_ffn", "top_k"),
}
"""Fields without which a layer of a kind has no shape."""


LAYOUT_FLAGS = (
    "tensor-model-parallel-size",
    "pipeline-model-parallel-size",
    "sequence-parallel",
    "context-parallel-size",
    "cp-comm-type",
    "expert-model-parallel-size",
    "expert-tensor-parallel-size",
    "virtual-pipeline-model-parallel-size",
    "num-virtual-stages-per-pipeline-rank",
    "num-layers-per-virtual-pipeline-stage",
    "decoder-first-pipeline-num-layers",
    "decoder-last-pipeline-num-layers",
    "use-distributed-optimizer",
    "dist-ckpt-optim-fully-reshardable",
    "overlap-grad-reduce",
    "overlap-param-gather",
    "overlap-param-gather-with-optimizer-step",
    "tp-comm-overlap",
    "recompute-activations",
    "recompute-granularity",
    "recompute-method",
    "recompute-num-layers",
    "recompute-modules",
    "distribute-saved-activations",
)
"""Flags about the layout of a run: one process has none."""


def flag_faults(flags: Mapping[str, Any]) -> list[str]:
    """Every refused flag of a recipe's `megatron` section."""
    faults = [
        f"megatron.{row.flag}: {flags.get(row.flag)!r} is refused: {row.reason}"
        for row in REFUSALS
        if row.refused(flags.get(row.flag))
    ]
    faults.extend(
        f"megatron.{flag}: write Megatron's flag with hyphens, without leading dashes"
        for flag in flags
        if "_" in str(flag) or str(flag).startswith("-")
    )
    return faults + precision_faults(flags)


def padded_vocabulary(flags: Mapping[str, Any]) -> int:
    """Vocabulary after Megatron's padding, which depends on the tensor-parallel size."""
    multiple = int(flags.get("make-vocab-size-divisible-by", 128)) * int(flags.get("tensor-model-parallel-size", 1))
    return -(-int(flags["vocab-size"]) // multiple) * multiple


def model_shape(flags: Mapping[str, Any], faults: list[str]) -> ModelShape | None:
    """The parent that a recipe's flags describe; what is missing or has no elastic layer is added to `faults`."""
    pattern = str(flags.get("hybrid-layer-pattern", "")).replace("|", "")
    fields = ["hidden", *(field for kind in _NEEDED if kind in pattern for field in _NEEDED[kind])]
    needed = [*(_SIZES[field] for field in fields), "hybrid-layer-pattern", "vocab-size"]
    # Core's parser asks for this one whatever the layers are.
    needed += [] if "num-attention-heads" in needed else ["num-attention-heads"]
    if "E" in pattern and "moe-shared-expert-intermediate-size" in flags:
        fields.append("shared_expert_ffn")
    missing = [flag for flag in needed if flag not in flags]
    optional = ("num-query-groups", "kv-channels", "make-vocab-size-divisible-by", "tensor-model-parallel-size")
    numbers = [flag for flag in (*needed, *optional, _SIZES["shared_expert_ffn"]) if flag in flags]
    bad = [
        flag
        for flag in dict.fromkeys(numbers)
        if flag != "hybrid-layer-pattern" and (type(flags[flag]) is not int or flags[flag] < 1)
    ]
    faults.extend(f"megatron.{flag}: required, it is part of the parent's shape" for flag in missing)
    faults.extend(f"megatron.{flag}: {flags[flag]!r} must be a whole number, at least 1" for flag in bad)
    if missing or bad:
        return None
    attention: dict[str, int] = {}
    if "*" in pattern:
        heads = flags["num-attention-heads"]
        groups = flags.get("num-query-groups", heads) if flags.get("group-query-attention") else heads
        attention = {"query_groups": groups, "head_dim": flags.get("kv-channels", flags["hidden-size"] // heads)}
    shape = ModelShape(
        pattern=pattern,
        vocab=padded_vocabulary(flags),
        expert_bias="E" in pattern and bool(flags.get("moe-router-enable-expert-bias")),
        gated=bool(flags.get("swiglu")),
        **attention,
        **{field: flags[_SIZES[field]] for field in fields},
    )
    found = [f"megatron: {fault}" for fault in shape.faults()]
    if "E" not in pattern and flags.get("num-experts"):
        found.append(f"megatron.num-experts: {flags['num-experts']} experts, but {pattern!r} has no layer E for them")
    if "E" in pattern and flags.get("tensor-model-parallel-size", 1) > 1 and not flags.get("sequence-parallel"):
        found.append("megatron.sequence-parallel: required with MoE layers and tensor parallelism, as in core")
    faults.extend(found)
    return None if found else shape


def shape_flags(shape: ModelShape, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that build a model of another shape (a submodel) with everything else as in `flags`.

    Where layers differ in size a flag has the largest; the shape itself says the rest.
    """
    changed: dict[str, Any] = {"hybrid-layer-pattern": shape.pattern}
    for field, flag in _SIZES.items():
        size = getattr(shape, field)
        if size:
            changed[flag] = max(size) if isinstance(size, tuple) else size
    if "*" in shape.pattern:
        changed.update(
            {"kv-channels": shape.head_dim, "num-query-groups": shape.query_groups, "group-query-attention": True}
        )
    return {**flags, **changed}


def to_argv(flags: Mapping[str, Any]) -> list[str]:
    """A recipe's flags as Megatron's command line: true is the bare flag, false leaves it out, a list its values."""
    argv: list[str] = []
    for flag, value in flags.items():
        if value is False or value is None:
            continue
        if str(value).startswith("-"):  # argparse would take it for a flag: a pattern may begin with an MLP
            argv.append(f"--{flag}={value}")
            continue
        argv.append(f"--{flag}")
        if isinstance(value, list | tuple):
            argv.extend(str(item) for item in value)
        elif value is not True:
            argv.append(str(value))
    return argv
