"""What a selection costs: parameters, memory, floating point operations, latency.

One formula, ints or tensors in: ints give the exact count, expected sizes the differentiable one, and the two are the
same number where every choice is certain.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_elastic.axes import AXES_OF_KIND
from megatron_elastic.budget import UNITS
from megatron_elastic.errors import ElasticError
from megatron_elastic.latency import LatencyTable
from megatron_elastic.layout import ModelShape, sizes_of_layer

if TYPE_CHECKING:
    from torch import Tensor


class Profile(NamedTuple):
    """Bytes per element of what a deployed model holds."""

    weights: float
    kv: float
    ssm: float
    conv: float
    activations: float


PROFILES: Mapping[str, Profile] = {
    "bf16": Profile(2, 2, 2, 2, 2),
    "bf16_ssm_fp32": Profile(2, 2, 4, 2, 2),
    "fp8_kv": Profile(2, 1, 2, 2, 2),
    "fp8_kv_ssm": Profile(2, 1, 1, 2, 2),
    "fp8": Profile(1, 2, 2, 2, 2),
    "fp8_all": Profile(1, 1, 1, 1, 1),
    "int8": Profile(1, 2, 2, 2, 2),
    "nvfp4": Profile(0.5625, 1, 2, 2, 2),
}
"""By name. `nvfp4`: half a byte and one FP8 scale for every 16 weights, KV cache in FP8. Layers that a quantised
checkpoint keeps in BF16 (attention, the first and last ones) are not known here and counted like all others."""


@dataclass(frozen=True)
class Deployment:
    """Where memory and FLOPs are counted.

    Attributes:
        batch: sequences.
        context: tokens of each, all cached; FLOPs are those of a token in such a sequence.
        prefill_chunk: tokens of each sequence that are prefilled at once (the MoE buffers' size).
        profile: bytes per element, a name of `PROFILES`.

    Raises:
        ElasticError: a size below 1, or an unknown profile.
    """

    batch: int = 1
    context: int = 8192
    prefill_chunk: int = 8192
    profile: str = "bf16"

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ("batch", "context", "prefill_chunk"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ElasticError(f"deployment.{name}: {value!r} must be a whole number, at least 1")
        if self.profile not in PROFILES:
            raise ElasticError(f"deployment.profile: {self.profile!r} must be one of {list(PROFILES)}")

    @property
    def bytes(self) -> Profile:
        """Bytes per element."""
        return PROFILES[self.profile]


def _mlp[Size: (int, Tensor)](shape: ModelShape, hidden: Size, ffn: Size) -> Size:
    return (3 if shape.gated else 2) * hidden * ffn


def layer_parameters(shape: ModelShape, kind: str, sizes: Mapping[str, Any], *, active: bool = False) -> Any:
    """Parameters of one layer of a kind; with `active`, of its experts only the `top_k` that a token goes to."""
    hidden = sizes["hidden"]
    if kind == "M":
        heads = sizes["mamba_heads"]
        inner = heads * sizes["mamba_head_dim"]
        states = 2 * shape.mamba_groups * shape.mamba_state
        conv = (inner + states) * (shape.conv_kernel + 1)
        return hidden + hidden * (2 * inner + states + heads) + conv + 3 * heads + inner + inner * hidden
    if kind == "*":
        query = sizes["attention_heads"] * shape.head_dim
        return hidden + hidden * (query + 2 * shape.query_groups * shape.head_dim) + query * hidden
    if kind == "-":
        return hidden + _mlp(shape, hidden, sizes["ffn"])
    routed = shape.top_k if active else sizes["experts"]
    shared = _mlp(shape, hidden, sizes["shared_expert_ffn"]) if shape.shared_expert_ffn else 0
    return hidden + sizes["experts"] * hidden + routed * _mlp(shape, hidden, sizes["expert_ffn"]) + shared


def layer_flops(shape: ModelShape, kind: str, sizes: Mapping[str, Any], sequence_length: int) -> Any:
    """Floating point operations of one layer's forward for one token: GEMMs, convolution, SSD, causal attention."""
    hidden = sizes["hidden"]
    if kind == "M":
        heads = sizes["mamba_heads"]
        inner, states = heads * sizes["mamba_head_dim"], shape.mamba_groups * shape.mamba_state
        products = hidden * (2 * inner + 2 * states + heads) + inner * hidden
        return 2 * (products + (inner + 2 * states) * shape.conv_kernel + 3 * inner * shape.mamba_state)
    if kind == "*":
        query = sizes["attention_heads"] * shape.head_dim
        products = hidden * (query + 2 * shape.query_groups * shape.head_dim) + query * hidden
        return 2 * (products + query * sequence_length)
    if kind == "-":
        return 2 * _mlp(shape, hidden, sizes["ffn"])
    shared = _mlp(shape, hidden, sizes["shared_expert_ffn"]) if shape.shared_expert_ffn else 0
    return 2 * (hidden * sizes["experts"] + shape.top_k * _mlp(shape, hidden, sizes["expert_ffn"]) + shared)


class Layers(NamedTuple):
    """Layers of one kind with the same sizes.

    Attributes:
        kind: their symbol.
        sizes: `hidden` and the axes of the kind, each one number.
        count: how many are kept: the sum of their gates.
        any: the largest of their gates.
    """

    kind: str
    sizes: Mapping[str, Any]
    count: Any
    any: Any


def layer_groups(pattern: str, sizes: Mapping[str, Any], gates: Sequence[Any] | None) -> Iterator[Layers]:
    """The layers of a model: all of a kind at once where the kind's sizes do not vary, else one by one."""
    weights: Sequence[Any] = [1] * len(pattern) if gates is None else gates
    for kind in sorted(set(pattern)):
        numbers = [number for number, symbol in enumerate(pattern) if symbol == kind]
        if any(isinstance(sizes.get(axis), Sequence) for axis in AXES_OF_KIND[kind]):
            for number in numbers:
                yield Layers(kind, sizes_of_layer(sizes, pattern, number), weights[number], weights[number])
        else:
            kept = [weights[number] for number in numbers]
            yield Layers(kind, sizes_of_layer(sizes, pattern, numbers[0]), sum(kept), max(kept))


class CostFormula:
    """The cost of a submodel in one unit: a sum over its layers, and what belongs to none.

    - `parameters`, `active_parameters`: exact; a router's expert bias is a buffer and not counted.
    - `memory`: bytes of weights, KV cache, SSM and convolution state at a deployment, and the largest MoE layer's
      buffers: of the tokens of a prefill chunk, `top_k` copies, their neurons and results.
    - `flops`: of one forward pass for one token in a sequence of the deployment's context.
    - `latency`: measured by the user, see `LatencyTable`.

    Args:
        shape: the parent.
        unit: one of `UNITS`.
        deployment: for `memory` and `flops`; None for the default one.
        table: for `latency`.

    Raises:
        ElasticError: the unit is unknown, or `latency` and no table is given.
    """

    def __init__(
        self,
        shape: ModelShape,
        unit: str = "parameters",
        deployment: Deployment | None = None,
        table: LatencyTable | None = None,
    ) -> None:
        if unit not in UNITS:
            raise ElasticError(f"unit {unit!r} must be one of {list(UNITS)}")
        if unit == "latency" and table is None:
            raise ElasticError("unit 'latency' needs a table of measured latencies: give one (elastic.latency_table)")
        self.shape, self.unit, self.table = shape, unit, table
        self.deployment = deployment or Deployment()

    def outside(self, hidden: Any) -> Any:
        """Embedding, final norm and LM head."""
        shape = self.shape
        if self.unit == "latency":
            assert self.table is not None
            return self.table.outside.at({"hidden": hidden})
        if self.unit == "flops":
            return 2 * shape.vocab * hidden
        count = 2 * shape.vocab * hidden + hidden
        return self.deployment.bytes.weights * count if self.unit == "memory" else count

    def layer(self, kind: str, sizes: Mapping[str, Any]) -> Any:
        """One layer: `hidden` and the axes of its kind, each one number."""
        if self.unit == "latency":
            assert self.table is not None
            return self.table.layer(kind, sizes)
        if self.unit == "flops":
            return layer_flops(self.shape, kind, sizes, self.deployment.context)
        count = layer_parameters(self.shape, kind, sizes, active=self.unit == "active_parameters")
        if self.unit == "memory":
            return self.deployment.bytes.weights * count + self._cache(kind, sizes)
        return count

    def _cache(self, kind: str, sizes: Mapping[str, Any]) -> Any:
        shape, size, batch = self.shape, self.deployment.bytes, self.deployment.batch
        if kind == "*":
            return size.kv * 2 * batch * self.deployment.context * shape.query_groups * shape.head_dim
        if kind == "M":
            inner = sizes["mamba_heads"] * sizes["mamba_head_dim"]
            columns = inner + 2 * shape.mamba_groups * shape.mamba_state
            return batch * (size.ssm * inner * shape.mamba_state + size.conv * columns * shape.conv_kernel)
        return 0

    def buffer(self, kind: str, sizes: Mapping[str, Any]) -> Any:
        """What layers of a kind take once, however many there are: layers run one after the other."""
        if self.unit != "memory" or kind != "E":
            return 0
        shape, place = self.shape, self.deployment
        inputs = 2 if shape.gated else 1
        routed = shape.top_k * (2 * sizes["hidden"] + inputs * sizes["expert_ffn"])
        shared = inputs * sizes["shared_expert_ffn"] if shape.shared_expert_ffn else 0
        tokens = place.batch * min(place.prefill_chunk, place.context)
        return place.bytes.activations * tokens * (routed + shared)

    def of(self, sizes: Mapping[str, Any], gates: Sequence[Any] | None = None) -> Any:
        """The cost of a submodel; see `cost`."""
        total, buffers = self.outside(sizes["hidden"]), list[Any]()
        for group in layer_groups(self.shape.pattern, sizes, gates):
            total = total + group.count * self.layer(group.kind, group.sizes)
            buffers.append(group.any * self.buffer(group.kind, group.sizes))
        return total + max(buffers)


def cost(
    shape: ModelShape,
    sizes: Mapping[str, Any],
    gates: Sequence[Any] | None = None,
    unit: str = "parameters",
    *,
    deployment: Deployment | None = None,
    table: LatencyTable | None = None,
) -> Any:
    """What the submodel with the given size on each axis costs, in one of the units of `UNITS`.

    Args:
        shape: the parent, with the same sizes in all layers of a kind.
        sizes: axis -> kept entries, or one number for each of the parent's layers that have the axis where layers
            differ; ints for the exact count, 0-dim tensors (expected sizes, fp64) for the differentiable one.
        gates: for each of the parent's layers the share of it that is kept, 1 or 0 where it is decided; None keeps all.
        unit: see `CostFormula`.
        deployment: where memory and FLOPs are counted.
        table: of measured latencies.

    Returns:
        A number, or a 0-dim tensor where any size or gate is one. Bytes may be fractional (`nvfp4`).
    """
    return CostFormula(shape, unit, deployment, table).of(sizes, gates)


def parameters(
    shape: ModelShape, sizes: Mapping[str, Any], gates: Sequence[Any] | None = None, *, active: bool = False
) -> Any:
    """Parameters of the submodel; with `active` only the experts that one token goes to. Arguments as in `cost`."""
    return cost(shape, sizes, gates, "active_parameters" if active else "parameters")


def forward_flops_per_token(
    shape: ModelShape, sizes: Mapping[str, Any], sequence_length: int, gates: Sequence[Any] | None = None
) -> Any:
    """Floating point operations of one forward pass for one token: GEMMs, LM head, causal attention, SSD.

    Args:
        shape: the parent.
        sizes: as in `cost`.
        sequence_length: tokens; attention over it costs half, being causal.
        gates: as in `cost`.
    """
    return cost(shape, sizes, gates, "flops", deployment=Deployment(context=sequence_length))


def training_flops_per_token(
    shape: ModelShape, sizes: Mapping[str, Any], sequence_length: int, gates: Sequence[Any] | None = None
) -> Any:
    """Forward and backward of one token, three times the forward; arguments as in `forward_flops_per_token`."""
    return 3 * forward_flops_per_token(shape, sizes, sequence_length, gates)
