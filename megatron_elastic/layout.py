"""What the parent is, and how each of its parameters is laid out along the elastic axes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_elastic.axes import LAYER_KINDS, BlockOrder, Dimension, Item, Part, layer_kinds


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a hybrid model, in Megatron's terms.

    Attributes:
        pattern: hybrid layer pattern without pipeline separators (`M` Mamba-2, `*` attention, `-` MLP).
        vocab: padded vocabulary.
        head_dim: `kv_channels` of attention.
    """

    pattern: str
    vocab: int
    hidden: int
    ffn: int
    attention_heads: int
    query_groups: int
    head_dim: int
    mamba_heads: int
    mamba_head_dim: int
    mamba_groups: int
    mamba_state: int
    conv_kernel: int = 4

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelShape":
        """Reads what `as_dict` wrote."""
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @property
    def full(self) -> dict[str, int]:
        """Full size of every axis."""
        return {
            "hidden": self.hidden,
            "ffn": self.ffn,
            "mamba_heads": self.mamba_heads,
            "attention_heads": self.attention_heads,
        }

    def resized(self, kept: Mapping[str, int]) -> "ModelShape":
        """The shape of the submodel that keeps `kept` entries of each axis."""
        return ModelShape(**{**asdict(self), **kept})

    def faults(self) -> list[str]:
        """Every reason why no elastic layer carries this parent."""
        found = []
        unknown = sorted(set(layer_kinds(self.pattern)) - set(LAYER_KINDS))
        if unknown:
            found.append(f"layer kinds {unknown} of pattern {self.pattern!r} have no elastic layer: {LAYER_KINDS} do")
        for heads, groups in (("mamba_heads", "mamba_groups"), ("attention_heads", "query_groups")):
            if self.full[heads] % getattr(self, groups):
                found.append(f"{heads} {self.full[heads]} must be a multiple of {groups} {getattr(self, groups)}")
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

    def orders(self, ffn_blocks: int) -> dict[str, BlockOrder]:
        """The block order of every axis; `ffn_blocks` is the only free number of blocks."""
        return {
            "hidden": BlockOrder(self.hidden, 1),
            "ffn": BlockOrder(self.ffn, ffn_blocks),
            "mamba_heads": BlockOrder(self.mamba_heads, self.mamba_groups, pinned=True),
            "attention_heads": BlockOrder(self.attention_heads, self.query_groups, pinned=True),
        }


def _fixed(size: int, blocks: int = 1) -> Part:
    return Part(blocks, (Item(None, size // blocks),))


class Layout:
    """The dimensions of every parameter of a parent, by stock Megatron name."""

    def __init__(self, shape: ModelShape, ffn_blocks: int) -> None:
        self.shape = shape
        self.orders = shape.orders(ffn_blocks)
        self.hidden = Dimension((Part(1, (Item("hidden", shape.hidden),)),))
        self.ffn = self._axis("ffn", 1)
        self.heads = self._axis("mamba_heads", 1)
        self.inner = self._axis("mamba_heads", shape.mamba_head_dim)
        self.attention_out = self._axis("attention_heads", shape.head_dim)
        groups, state = shape.mamba_groups, shape.mamba_groups * shape.mamba_state
        self.zxbcdt = Dimension(
            (*self.inner.parts * 2, _fixed(state, groups), _fixed(state, groups), *self.heads.parts), sharded=True
        )
        self.xbc = Dimension((*self.inner.parts, _fixed(state, groups), _fixed(state, groups)), sharded=True)
        per_group = shape.attention_heads // shape.query_groups
        query = Item("attention_heads", per_group, shape.head_dim)
        self.qkv = Dimension((Part(shape.query_groups, (query, Item(None, 2 * shape.head_dim))),), sharded=True)

    def _axis(self, axis: str, width: int) -> Dimension:
        order = self.orders[axis]
        return Dimension((Part(order.blocks, (Item(axis, order.size // order.blocks, width),)),), sharded=True)

    def _layer(self, kind: str) -> dict[str, tuple[Dimension, ...]]:
        if kind == "M":
            one, kernel = Dimension((_fixed(1),)), Dimension((_fixed(self.shape.conv_kernel),))
            return {
                "norm.weight": (self.hidden,),
                "mixer.in_proj.weight": (self.zxbcdt, self.hidden),
                "mixer.conv1d_weight": (self.xbc, one, kernel),
                "mixer.conv1d_bias": (self.xbc,),
                "mixer.dt_bias": (self.heads,),
                "mixer.A_log": (self.heads,),
                "mixer.D": (self.heads,),
                "mixer.norm.weight": (self.inner,),
                "mixer.out_proj.weight": (self.hidden, self.inner),
            }
        if kind == "*":
            return {
                "input_layernorm.weight": (self.hidden,),
                "self_attention.linear_qkv.weight": (self.qkv, self.hidden),
                "self_attention.linear_proj.weight": (self.hidden, self.attention_out),
            }
        return {
            "pre_mlp_layernorm.weight": (self.hidden,),
            "mlp.linear_fc1.weight": (self.ffn, self.hidden),
            "mlp.linear_fc2.weight": (self.hidden, self.ffn),
        }

    def parameters(self) -> dict[str, tuple[Dimension, ...]]:
        """Stock name -> its dimensions, for the whole model (global layer numbers)."""
        vocab = Dimension((_fixed(self.shape.vocab),), sharded=True)
        found: dict[str, tuple[Dimension, ...]] = {"embedding.word_embeddings.weight": (vocab, self.hidden)}
        for number, kind in enumerate(layer_kinds(self.shape.pattern)):
            for name, dimensions in self._layer(kind).items():
                found[f"decoder.layers.{number}.{name}"] = dimensions
        found["decoder.final_norm.weight"] = (self.hidden,)
        found["output_layer.weight"] = (vocab, self.hidden)
        return found
