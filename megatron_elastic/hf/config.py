"""`config.json` of a `nemotron_h` model, read and written: sizes, and everything that the model's outputs depend on."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_elastic.axes import LAYER_KINDS, PER_LAYER_AXES
from megatron_elastic.errors import HFError
from megatron_elastic.flags import shape_flags
from megatron_elastic.layout import ModelShape, Size

CONFIG = "config.json"

UNIFORM, PUZZLE = "nemotron_h", "nemotron_h_puzzle"
"""`model_type` of a model whose layers of a kind are alike, and of one whose layers differ (`block_configs`)."""

_ARCHITECTURES = {UNIFORM: "NemotronHForCausalLM", PUZZLE: "NemotronHPuzzleForCausalLM"}

_BLOCK_TYPES = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
"""Kind of a layer -> its name in `layers_block_type`, as every reader takes it: transformers 5 renames on reading."""
_KINDS = {**{name: kind for kind, name in _BLOCK_TYPES.items()}, "linear_attention": "M", "full_attention": "*"}

_ALIASES = {
    "n_groups": ("mamba_n_groups",),
    "conv_kernel": ("mamba_d_conv",),
    "use_conv_bias": ("mamba_conv_bias",),
    "head_dim": ("attention_head_dim",),
    "layers_block_type": ("layer_types",),
    "time_step_limit": ("mamba_dt_limit",),
}
"""Other names that a field goes by in released configurations."""

_SIZES = {
    "M": {
        "mamba_heads": "mamba_num_heads",
        "mamba_head_dim": "mamba_head_dim",
        "mamba_groups": "n_groups",
        "mamba_state": "ssm_state_size",
        "conv_kernel": "conv_kernel",
    },
    "*": {"attention_heads": "num_attention_heads", "query_groups": "num_key_value_heads", "head_dim": "head_dim"},
    "-": {"ffn": "intermediate_size"},
    "E": {
        "experts": "n_routed_experts",
        "expert_ffn": "moe_intermediate_size",
        "shared_expert_ffn": "moe_shared_expert_intermediate_size",
        "top_k": "num_experts_per_tok",
    },
}
"""Kind of layer -> size in `ModelShape` -> field of the configuration."""

SHORTEST_TIME_STEP = 1e-9
"""A `time_step_min` that changes no time step: transformers 5 raises shorter ones to it, Megatron has no such limit."""

_DEFAULTS: dict[str, Any] = {"conv_kernel": 4, "layer_norm_epsilon": 1e-5, "routed_scaling_factor": 1.0}


@dataclass(frozen=True)
class _Demand:
    """What a field must say, because Megatron's model does this and nothing else."""

    field: str
    allowed: tuple[Any, ...]
    reason: str
    kinds: str = "M*-E"
    """The layers that it concerns."""


_NO_BIAS = "no elastic layer has a bias there"
_NO_GROUPS = "experts are chosen among all of them"

_DEMANDS = (
    _Demand("tie_word_embeddings", (None, False), "tied embeddings have no elastic layer"),
    _Demand("use_bias", (None, False), _NO_BIAS, "M"),
    _Demand("mamba_proj_bias", (None, False), _NO_BIAS, "M"),
    _Demand("use_conv_bias", (None, True), "Megatron's convolution always has a bias", "M"),
    _Demand("conv_kernel", (None, 4), "a constant in Megatron's Mamba mixer", "M"),
    _Demand("mamba_hidden_act", (None, "silu"), "a constant in Megatron's Mamba mixer", "M"),
    _Demand("attention_bias", (None, False), _NO_BIAS, "*"),
    _Demand("sliding_window", (None,), "every token attends to all before it", "*"),
    _Demand("mlp_bias", (None, False), _NO_BIAS, "-E"),
    _Demand("mlp_hidden_act", (None, "relu2"), "the MLPs of this format are squared ReLU", "-E"),
    _Demand("moe_latent_size", (None,), "experts in a latent space have no elastic layer", "E"),
    _Demand("n_shared_experts", (None, 0, 1), "one shared expert, of any width, or none is carried", "E"),
    _Demand("n_group", (None, 1), _NO_GROUPS, "E"),
    _Demand("topk_group", (None, 1), _NO_GROUPS, "E"),
    _Demand("residual_in_fp32", (None, False), "the residual is kept in the parameters' type"),
    _Demand("num_nextn_predict_layers", (None, 0), "multi-token prediction has no elastic layer"),
    _Demand("quantization_config", (None,), "quantised weights cannot be trained: take the model in bf16"),
)


@dataclass(frozen=True)
class HFModel:
    """A model as its `config.json` describes it.

    Attributes:
        shape: its sizes.
        flags: Megatron's model flags, as in a recipe's `megatron` section; where layers differ, the largest of them.
        raw: the file's content, kept so that what is not a size can be written back.
    """

    shape: ModelShape
    flags: dict[str, Any]
    raw: dict[str, Any]


def load_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file.

    Raises:
        HFError: no such file, or no JSON object in it.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise HFError([f"it cannot be read ({error})"], str(path)) from error
    if not isinstance(value, dict):
        raise HFError(["it holds no JSON object"], str(path))
    return value


def read_config(source: str | Path | Mapping[str, Any]) -> HFModel:
    """Reads the configuration of a `nemotron_h` or `nemotron_h_puzzle` model.

    Layer types may go by today's names, by the older ones, or be a pattern string.

    Args:
        source: a `config.json`, the folder it is in, or its content.

    Raises:
        HFError: with everything that is missing, contradictory, or has no counterpart in Megatron.
    """
    if isinstance(source, Mapping):
        raw, name = dict(source), CONFIG
    else:
        path = Path(source) / CONFIG if Path(source).is_dir() else Path(source)
        raw, name = load_json(path), str(path)
    return _Reader(raw).read(name)


class _Reader:
    """One configuration being read, and the faults found in it."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = dict(raw)
        self.faults: list[str] = []

    def field(self, name: str) -> Any:
        """A field by any of its names; None where it is absent."""
        found = [self.raw[key] for key in (name, *_ALIASES.get(name, ())) if self.raw.get(key) is not None]
        return found[0] if found else _DEFAULTS.get(name)

    def read(self, name: str) -> HFModel:
        kind = self.raw.get("model_type")
        if kind not in (UNIFORM, PUZZLE):
            raise HFError([f"model_type is {kind!r}: {UNIFORM} and {PUZZLE} are read"], name)
        pattern = self._pattern()
        if self.faults:
            raise HFError(self.faults, name)
        kinds = "".join(kind for kind in LAYER_KINDS if kind in pattern)
        self._demands(kinds)
        sizes = self._sizes(pattern, kinds)
        if self.faults:
            raise HFError(self.faults, name)
        shape = ModelShape(pattern=pattern, expert_bias="E" in kinds, **sizes)
        self._normalised(shape)
        self.faults.extend(shape.faults())
        if self.faults:
            raise HFError(self.faults, name)
        return HFModel(shape, self._flags(shape), self.raw)

    def _pattern(self) -> str:
        """The layers, from every field that names them."""
        found: dict[str, str] = {}
        given = self.field("hybrid_override_pattern")
        if given is not None:
            found["hybrid_override_pattern"] = str(given).replace("|", "")
        blocks = self.raw.get("block_configs")
        types = {"layers_block_type": self.field("layers_block_type")}
        if isinstance(blocks, list) and all(isinstance(block, dict) for block in blocks):
            types["block_configs"] = [block.get("block_type") for block in blocks]
        elif blocks is not None:
            self.faults.append("block_configs must be a list with one object a layer")
        elif self.raw.get("model_type") == PUZZLE:
            self.faults.append(f"block_configs: required where model_type is {PUZZLE}")
        for field, names in types.items():
            if names is None:
                continue
            unknown = sorted({str(n) for n in names if n not in _KINDS}) if isinstance(names, list) else [str(names)]
            if unknown:
                self.faults.append(f"{field}: {unknown} are no layer types: {sorted(_KINDS)} are")
            else:
                found[field] = "".join(_KINDS[each] for each in names)
        if not found and not self.faults:
            self.faults.append("layers_block_type or hybrid_override_pattern: required, it says what the layers are")
        if len(set(found.values())) > 1:
            self.faults.append(f"the layers are named differently: {found}")
        pattern = next(iter(found.values()), "")
        if set(pattern) - set(LAYER_KINDS):
            self.faults.append(f"hybrid_override_pattern {pattern!r}: its letters must be of {''.join(LAYER_KINDS)!r}")
        layers = self.raw.get("num_hidden_layers")
        if pattern and layers not in (None, len(pattern)):
            self.faults.append(f"num_hidden_layers is {layers}, {len(pattern)} layers are named")
        return pattern

    def _demands(self, kinds: str) -> None:
        for demand in _DEMANDS:
            value = self.field(demand.field)
            if set(demand.kinds) & set(kinds) and value not in demand.allowed:
                self.faults.append(f"{demand.field} {value!r}: {demand.reason}")
        if "M" in kinds and not _unlimited(self.field("time_step_limit")):
            limit = self.field("time_step_limit")
            self.faults.append(f"time_step_limit {limit!r}: Megatron's time steps have none, which is [0, Infinity]")
        epsilon = self.field("layer_norm_epsilon")
        if "M" in kinds and epsilon != 1e-5:
            self.faults.append(f"layer_norm_epsilon {epsilon}: 1e-05 is a constant in Megatron's Mamba mixer")

    def _number(self, field: str, value: Any, *, least: int = 1) -> int:
        if value is None:
            self.faults.append(f"{field}: required, it is part of the model's shape")
        elif isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.faults.append(f"{field}: {value!r} must be a whole number, at least {least}")
        else:
            return value
        return least

    def _sizes(self, pattern: str, kinds: str) -> dict[str, Any]:
        sizes: dict[str, Any] = {
            "vocab": self._number("vocab_size", self.field("vocab_size")),
            "hidden": self._number("hidden_size", self.field("hidden_size")),
        }
        for kind in kinds:
            for name, field in _SIZES[kind].items():
                sizes[name] = self._size(name, field, [number for number, each in enumerate(pattern) if each == kind])
        return sizes

    def _size(self, name: str, field: str, layers: Sequence[int]) -> Size:
        """One number, or one for each layer of the kind where `block_configs` lets them differ."""
        value = self.field(field)
        if name == "query_groups" and value is None:
            value = self.field("num_attention_heads")
        if name == "shared_expert_ffn" and self.field("n_shared_experts") == 0:
            return 0
        blocks = self.raw.get("block_configs")
        each = [value] if blocks is None else [blocks[number].get(field, value) for number in layers]
        found = tuple(self._number(field, one) for one in each)
        if len(set(found)) == 1:
            return found[0]
        if name not in PER_LAYER_AXES:
            self.faults.append(f"{field} differs between layers ({sorted(set(found))}): no elastic layer carries that")
        return found

    def _normalised(self, shape: ModelShape) -> None:
        """Megatron divides the chosen experts' scores by their sum where there are several, and only there."""
        given = self.raw.get("norm_topk_prob", True)
        if "E" in shape.pattern and bool(given) != (shape.top_k > 1):
            self.faults.append(
                f"norm_topk_prob {given!r} with num_experts_per_tok {shape.top_k}: Megatron normalises where more than "
                "one expert is chosen, and nowhere else"
            )

    def _flags(self, shape: ModelShape) -> dict[str, Any]:
        flags = {
            # Megatron's parser asks for attention heads whether or not there is attention.
            "num-attention-heads": self.field("num_attention_heads") or 1,
            "hidden-size": shape.hidden,
            # Megatron pads a vocabulary: this one is as it is.
            "vocab-size": shape.vocab,
            "make-vocab-size-divisible-by": 1,
            "squared-relu": True,
            "normalization": "RMSNorm",
            "norm-epsilon": float(self.field("layer_norm_epsilon")),
            "position-embedding-type": "none",
            "untie-embeddings-and-output-weights": True,
            "disable-bias-linear": True,
            "hidden-dropout": 0.0,
            "attention-dropout": 0.0,
        }
        if "E" in shape.pattern:
            flags["moe-router-score-function"] = "sigmoid"
            flags["moe-router-enable-expert-bias"] = True
            flags["moe-router-dtype"] = "fp32"
            if self.field("routed_scaling_factor") != 1:
                flags["moe-router-topk-scaling-factor"] = float(self.field("routed_scaling_factor"))
        return shape_flags(shape, flags)


def _largest(size: Size) -> int:
    return max(size) if isinstance(size, tuple) else size


def _unlimited(limit: Any) -> bool:
    """Whether a time step limit is none: [0, infinity], also as transformers writes infinity into JSON."""
    if limit is None:
        return True
    ends = (
        [end.get("__float__") if isinstance(end, Mapping) else end for end in limit]
        if isinstance(limit, list | tuple)
        else []
    )
    return ends in ([0, float("inf")], [0, "Infinity"])


_MEGATRON = {
    "position-embedding-type": ("none", "the format has no positions"),
    "normalization": ("RMSNorm", "the format has RMSNorm alone"),
    "squared-relu": (True, "its MLPs are squared ReLU"),
}


def export_faults(shape: ModelShape, flags: Mapping[str, Any]) -> list[str]:
    """Every reason why the format cannot hold a model (empty when it can).

    Args:
        shape: of the model.
        flags: Megatron's model flags.
    """
    faults = [
        f"{flag} {flags.get(flag)!r}: {reason}"
        for flag, (value, reason) in _MEGATRON.items()
        if flags.get(flag) != value
    ]
    if shape.gated:
        faults.append("gated MLPs: the format's are not")
    if "E" in shape.pattern:
        if flags.get("moe-router-score-function") != "sigmoid":
            faults.append("moe-router-score-function: the format's routers are sigmoid")
        if flags.get("moe-router-num-groups") not in (None, 1):
            faults.append("moe-router-num-groups: experts in groups are not carried")
    return faults


def export_warnings(shape: ModelShape) -> list[str]:
    """What a user must know before a model of this shape is written: which stock engine loads it, where not all do.

    Args:
        shape: of the model to be exported (`Selection.submodel`).
    """
    found = []
    if isinstance(shape.mamba_heads, tuple):
        found.append("mamba_heads differ between layers: no engine loads that, only megatron-elastic import")
    if isinstance(shape.attention_heads, tuple):
        found.append(
            "attention_heads differ between layers: block_configs says it, but no engine is known to load that, only "
            "megatron-elastic import"
        )
    engines = [axis for axis in ("ffn", "experts", "expert_ffn") if isinstance(getattr(shape, axis), tuple)]
    if engines and not found:
        found.append(
            f"{' and '.join(engines)} differ between layers: exported as {PUZZLE}, which vLLM and TensorRT-LLM load "
            "and transformers does not"
        )
    if "E" in shape.pattern and not shape.shared_expert_ffn:
        found.append("MoE layers without a shared expert: transformers builds one all the same, so it does not load")
    return found


def make_config(
    shape: ModelShape, flags: Mapping[str, Any], raw: Mapping[str, Any], dtype: str, max_positions: int = 4096
) -> dict[str, Any]:
    """The configuration of a model, for transformers and for engines with the older names alike.

    Args:
        shape: of the model.
        flags: Megatron's model flags.
        raw: the configuration that it came with, whose other fields are kept; empty where it came with none.
        dtype: of most of its weights, `bfloat16` for one.
        max_positions: the longest sequence, where `raw` does not say it.

    Raises:
        HFError: the format cannot hold this model.
    """
    faults = export_faults(shape, flags)
    if faults:
        raise HFError(faults, f"this model is not of format {UNIFORM}")
    kind = UNIFORM if shape.uniform else PUZZLE
    made: dict[str, Any] = {**_OF_MEGATRON, "max_position_embeddings": max_positions, **raw}
    if raw:
        made["time_step_min"] = raw.get("time_step_min", raw.get("mamba_dt_min", 0.001))
    stale = [*(alias for aliases in _ALIASES.values() for alias in aliases), "auto_map", "block_configs"]
    for name in (*stale, "mtp_block_configs", "blockwise_members"):
        made.pop(name, None)
    made.update(
        architectures=[_ARCHITECTURES[kind]],
        model_type=kind,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=len(shape.pattern),
        layers_block_type=[_BLOCK_TYPES[each] for each in shape.pattern],
        hybrid_override_pattern=shape.pattern,
        layer_norm_epsilon=float(flags.get("norm-epsilon", 1e-5)),
        dtype=dtype,
        torch_dtype=dtype,
    )
    for each in set(shape.pattern):
        made.update((field, _largest(getattr(shape, name))) for name, field in _SIZES[each].items())
    if "E" in shape.pattern:
        made["routed_scaling_factor"] = flags.get("moe-router-topk-scaling-factor") or 1.0
        made["norm_topk_prob"] = shape.top_k > 1
        made["n_shared_experts"] = int(shape.shared_expert_ffn > 0)
    if kind == PUZZLE:
        made["block_configs"] = list(_blocks(shape))
    return made


def _blocks(shape: ModelShape) -> Iterable[dict[str, Any]]:
    """What each layer is: the sizes that the published `block_configs` have, and those that differ besides."""
    count = dict.fromkeys(_SIZES, 0)
    for kind in shape.pattern:
        block: dict[str, Any] = {"block_type": _BLOCK_TYPES[kind]}
        for name, field in _SIZES[kind].items():
            size = getattr(shape, name)
            if isinstance(size, tuple):
                block[field] = size[count[kind]]
            elif kind in "-E":
                block[field] = size
        count[kind] += 1
        yield block


_OF_MEGATRON: dict[str, Any] = {
    # No token is special unless the tokenizer's files say so.
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sliding_window"), None),
    **dict.fromkeys(("tie_word_embeddings", "use_bias", "attention_bias", "mlp_bias", "mamba_proj_bias"), False),
    **{"use_conv_bias": True, "mamba_hidden_act": "silu", "mlp_hidden_act": "relu2", "residual_in_fp32": False},
    "time_step_min": SHORTEST_TIME_STEP,
    **{"n_group": 1, "topk_group": 1, "chunk_size": 128, "expand": 2, "use_cache": True},
}
"""Fields that are the same for every model that Megatron trains here."""
