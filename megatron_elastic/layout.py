"""What the parent is, and how each of its parameters is laid out along the elastic axes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from megatron_elastic.axes import (
    AXES,
    AXES_OF_KIND,
    LAYER_KINDS,
    PER_LAYER_AXES,
    BlockOrder,
    Dimension,
    Item,
    Part,
    index_in_kind,
    layer_kinds,
)

LAYER = "decoder.layers."
"""Beginning of the names of what belongs to a layer; its number follows."""
BUFFERS = (".expert_bias",)
"""Ends of the names of what is stored beside parameters, and counted as none."""

Size = int | tuple[int, ...]
"""Entries of an axis: one number, or one for every layer that has the axis where layers differ."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a hybrid model, in Megatron's terms; those of layers that the pattern does not have are 0.

    A parent has the same sizes in all layers of a kind; a submodel may have a tuple on the axes of `PER_LAYER_AXES`,
    one number for each layer of that kind.

    Attributes:
        pattern: hybrid layer pattern without pipeline separators (`M` Mamba-2, `*` attention, `-` MLP, `E` MoE).
        vocab: padded vocabulary.
        head_dim: `kv_channels` of attention.
        experts: routed experts of a MoE layer.
        expert_ffn: width of a routed expert.
        shared_expert_ffn: width of the shared expert, 0 without one.
        top_k: routed experts that a token goes to.
        expert_bias: whether the MoE router has a bias for each expert.
        gated: whether MLPs and experts are gated (SwiGLU): two input projections.
    """

    pattern: str
    vocab: int
    hidden: int
    ffn: Size = 0
    attention_heads: Size = 0
    query_groups: int = 0
    head_dim: int = 0
    mamba_heads: Size = 0
    mamba_head_dim: int = 0
    mamba_groups: int = 0
    mamba_state: int = 0
    conv_kernel: int = 4
    experts: Size = 0
    expert_ffn: Size = 0
    shared_expert_ffn: int = 0
    top_k: int = 0
    expert_bias: bool = False
    gated: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelShape":
        """Reads what `as_dict` wrote, from JSON too."""
        read: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        return cls(**read)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that this model has: those of its layer kinds, `hidden` and `depth`."""
        found = {"hidden", "depth", *(axis for kind in set(self.pattern) for axis in AXES_OF_KIND.get(kind, ()))}
        return tuple(a for a in AXES if a in found and not (a == "shared_expert_ffn" and not self.shared_expert_ffn))

    @property
    def full(self) -> dict[str, Any]:
        """Full size of every axis that the model has, without `depth`."""
        return {axis: getattr(self, axis) for axis in self.axes if axis != "depth"}

    @property
    def choices(self) -> dict[str, tuple[int, ...]]:
        """The choices of a model of which nothing is narrowed: full sizes, and all layers."""
        return {**{axis: (size,) for axis, size in self.full.items()}, "depth": (len(self.pattern),)}

    @property
    def uniform(self) -> bool:
        """Whether all layers of a kind have the same sizes."""
        return not any(isinstance(getattr(self, axis), tuple) for axis in PER_LAYER_AXES)

    def layers_with(self, axis: str) -> tuple[int, ...]:
        """Numbers of the layers that have an axis; all of them for `hidden` and `depth`."""
        return tuple(n for n, k in enumerate(self.pattern) if axis in ("hidden", "depth", *AXES_OF_KIND[k]))

    def layer(self, number: int) -> dict[str, int]:
        """Sizes of the axes that one layer has, `hidden` included."""
        return sizes_of_layer(self.full, self.pattern, number)

    def resized(self, sizes: Mapping[str, Size], skipped: Sequence[int] = ()) -> "ModelShape":
        """The shape of the submodel that keeps `sizes` of each axis (missing ones whole) and not the layers `skipped`.

        Sizes that vary over the parent's layers lose the entries of skipped ones; equal ones become one number.
        """
        kept: dict[str, Any] = {axis: size for axis, size in sizes.items() if axis != "depth"}
        for axis, size in list(kept.items()):
            if isinstance(size, tuple):
                numbers = self.layers_with(axis)
                left = tuple(s for n, s in zip(numbers, size, strict=True) if n not in skipped)
                kept[axis] = left[0] if len(set(left)) == 1 else left
        pattern = "".join(kind for number, kind in enumerate(self.pattern) if number not in skipped)
        absent = {axis: 0 for kind, axes in AXES_OF_KIND.items() if kind not in pattern for axis in axes}
        return replace(self, **{**kept, **absent, "pattern": pattern})

    def faults(self) -> list[str]:
        """Every reason why no elastic layer carries this parent."""
        found = []
        kinds = set(layer_kinds(self.pattern))
        unknown = sorted(kinds - set(LAYER_KINDS))
        if unknown:
            found.append(f"layer kinds {unknown} of pattern {self.pattern!r} have no elastic layer: {LAYER_KINDS} do")
        for kind, heads, groups in (
            ("M", "mamba_heads", "mamba_groups"),
            ("*", "attention_heads", "query_groups"),
        ):
            size = getattr(self, heads)
            if kind in kinds and any(
                each % getattr(self, groups) for each in (size if isinstance(size, tuple) else [size])
            ):
                found.append(f"{heads} {getattr(self, heads)} must be a multiple of {groups} {getattr(self, groups)}")
        if "E" in kinds and not 0 < self.top_k <= smallest(self.experts):
            found.append(f"top_k {self.top_k} must lie in 1..{self.experts}, the experts there are")
        return found

    def context_parallel_faults(self, mamba_heads: Sequence[int], tp: int, cp: int) -> list[str]:
        """Every reason why the Mamba layers cannot trade the sequence for heads.

        Each context-parallel rank gets the same number of the heads of its tensor-parallel shard, and either whole SSM
        groups or, with others, one group.

        Args:
            mamba_heads: numbers of heads to run.
            tp: tensor-parallel size; it divides the groups.
            cp: context-parallel size.
        """
        if "M" not in self.pattern or cp == 1:
            return []
        found = []
        groups = max(1, self.mamba_groups // tp)
        if max(groups, cp) % min(groups, cp):
            found.append(
                f"mamba_groups / TP = {groups} and CP = {cp}: one must be a multiple of the other, so that each "
                "context-parallel rank has whole SSM groups, or a share of one"
            )
        uneven = [heads for heads in mamba_heads if heads % (tp * cp)]
        if uneven:
            found.append(
                f"{uneven} heads do not divide over TP x CP = {tp} x {cp} ranks: take multiples of {tp * cp}, or a "
                "smaller CP"
            )
        return found

    def orders(self, ffn_blocks: int, expert_blocks: int = 1) -> dict[str, BlockOrder]:
        """The block order of every axis that has one (all but `depth`).

        Args:
            ffn_blocks: of the neurons of MLPs, experts and the shared expert: a multiple of every (expert) TP size.
            expert_blocks: of the experts: a multiple of every EP size.
        """
        made = {
            "hidden": (1, False),
            "ffn": (ffn_blocks, False),
            "mamba_heads": (self.mamba_groups, True),
            "mamba_head_dim": (1, False),
            "attention_heads": (self.query_groups, True),
            "experts": (expert_blocks, False),
            "expert_ffn": (ffn_blocks, False),
            "shared_expert_ffn": (ffn_blocks, False),
        }
        return {axis: BlockOrder(getattr(self, axis), *made[axis]) for axis in self.axes if axis != "depth"}


def layer_number(name: str) -> int | None:
    """Number of the layer that a parameter belongs to; None for those of no layer."""
    return int(name.removeprefix(LAYER).split(".")[0]) if name.startswith(LAYER) else None


def smallest(size: Size) -> int:
    """The smallest entry of a size that may vary over layers."""
    return min(size) if isinstance(size, tuple) else size


def sizes_of_layer(sizes: Mapping[str, Any], pattern: str, number: int) -> dict[str, Any]:
    """What a selection (or a shape) says of one layer: `hidden` and the axes of its kind, each one number.

    Args:
        sizes: axis -> size, or one size for each layer that has the axis.
        pattern: of all layers, without separators.
        number: of the layer, from 0.
    """
    found = {"hidden": sizes["hidden"]}
    for axis in AXES_OF_KIND[pattern[number]]:
        if axis in sizes:
            size = sizes[axis]
            found[axis] = size[index_in_kind(pattern, number)] if isinstance(size, Sequence) else size
    return found


def _fixed(size: int, blocks: int = 1) -> Part:
    return Part(blocks, (Item(None, size // blocks),))


class Layout:
    """The dimensions of every parameter of a parent (uniform layers), by stock Megatron name.

    The routed experts of a layer are one tensor each for fc1 and fc2, `[experts, ...]`, as Megatron stores them.
    """

    sharded: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("ffn", "mamba_heads", "attention_heads", "shared_expert_ffn"), "tp"),
        **{"expert_ffn": "etp", "experts": "ep", "mamba_head_dim": "", "hidden": "", "depth": ""},
    }
    """The ranks that each axis is split over (see `Dimension`)."""

    def __init__(self, shape: ModelShape, ffn_blocks: int, expert_blocks: int = 1) -> None:
        self.shape = shape
        self.orders = shape.orders(ffn_blocks, expert_blocks)
        self.hidden = Dimension((Part(1, (Item("hidden", shape.hidden),)),))

    def _axis(self, axis: str, width: int = 1, *, width_axis: str | None = None) -> Dimension:
        order = self.orders[axis]
        item = Item(axis, order.size // order.blocks, width, width_axis)
        return Dimension((Part(order.blocks, (item,)),), self.sharded[axis])

    def _mamba(self) -> dict[str, tuple[Dimension, ...]]:
        shape = self.shape
        one, kernel = Dimension((_fixed(1),)), Dimension((_fixed(shape.conv_kernel),))
        groups, state = shape.mamba_groups, shape.mamba_groups * shape.mamba_state
        heads = self._axis("mamba_heads")
        inner = self._axis("mamba_heads", shape.mamba_head_dim, width_axis="mamba_head_dim")
        states = (_fixed(state, groups), _fixed(state, groups))
        zxbcdt = Dimension((*inner.parts * 2, *states, *heads.parts), "tp")
        xbc = Dimension((*inner.parts, *states), "tp")
        return {
            "norm.weight": (self.hidden,),
            "mixer.in_proj.weight": (zxbcdt, self.hidden),
            "mixer.conv1d_weight": (xbc, one, kernel),
            "mixer.conv1d_bias": (xbc,),
            "mixer.dt_bias": (heads,),
            "mixer.A_log": (heads,),
            "mixer.D": (heads,),
            "mixer.norm.weight": (inner,),
            "mixer.out_proj.weight": (self.hidden, inner),
        }

    def _attention(self) -> dict[str, tuple[Dimension, ...]]:
        shape = self.shape
        heads = shape.full["attention_heads"]
        query = Item("attention_heads", heads // shape.query_groups, shape.head_dim)
        qkv = Dimension((Part(shape.query_groups, (query, Item(None, 2 * shape.head_dim))),), "tp")
        return {
            "input_layernorm.weight": (self.hidden,),
            "self_attention.linear_qkv.weight": (qkv, self.hidden),
            "self_attention.linear_proj.weight": (self.hidden, self._axis("attention_heads", shape.head_dim)),
        }

    def _pair(self, prefix: str, axis: str, *outer: Dimension) -> dict[str, tuple[Dimension, ...]]:
        """fc1 and fc2 around neurons; a gated fc1 has the gate's rows before the others."""
        neurons = self._axis(axis)
        inputs = Dimension(neurons.parts * 2, neurons.sharded) if self.shape.gated else neurons
        return {
            f"{prefix}.linear_fc1.weight": (*outer, inputs, self.hidden),
            f"{prefix}.linear_fc2.weight": (*outer, self.hidden, neurons),
        }

    def _experts(self) -> dict[str, tuple[Dimension, ...]]:
        routed = self._axis("experts")
        everywhere = Dimension(routed.parts)  # the router knows all experts on every rank
        found = {"pre_mlp_layernorm.weight": (self.hidden,), "mlp.router.weight": (everywhere, self.hidden)}
        if self.shape.expert_bias:
            found["mlp.router.expert_bias"] = (everywhere,)
        found.update(self._pair("mlp.experts.experts", "expert_ffn", routed))
        if self.shape.shared_expert_ffn:
            found.update(self._pair("mlp.shared_experts", "shared_expert_ffn"))
        return found

    def of_kind(self, kind: str) -> dict[str, tuple[Dimension, ...]]:
        """Name without layer prefix -> its dimensions, for a layer of one kind."""
        if kind == "M":
            return self._mamba()
        if kind == "*":
            return self._attention()
        if kind == "E":
            return self._experts()
        return {"pre_mlp_layernorm.weight": (self.hidden,), **self._pair("mlp", "ffn")}

    def outside_layers(self) -> dict[str, tuple[Dimension, ...]]:
        """Stock name -> its dimensions, for what belongs to no layer."""
        vocab = Dimension((_fixed(self.shape.vocab),), "tp")
        return {
            "embedding.word_embeddings.weight": (vocab, self.hidden),
            "decoder.final_norm.weight": (self.hidden,),
            "output_layer.weight": (vocab, self.hidden),
        }

    def parameters(self) -> dict[str, tuple[Dimension, ...]]:
        """Stock name -> its dimensions, for the whole model (global layer numbers)."""
        kinds: Iterable[str] = layer_kinds(self.shape.pattern)
        made = {kind: self.of_kind(kind) for kind in set(kinds)}
        embedding, *after = self.outside_layers().items()
        layers = [
            (f"decoder.layers.{number}.{name}", dimensions)
            for number, kind in enumerate(kinds)
            for name, dimensions in made[kind].items()
        ]
        return dict([embedding, *layers, *after])
