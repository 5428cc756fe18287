"""The elastic attention layer: query heads narrowed inside their KV group, hidden channels in and out."""

from functools import partial

from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_elastic.family import LayerPlan
from megatron_elastic.layers.context_parallel import context_parallel_attention
from megatron_elastic.layers.moe_role import MoeRole
from megatron_elastic.layers.recompute import residual_branch
from megatron_elastic.masks import Masks
from megatron_elastic.ops.masking import masked


class NoCoreAttention:
    """Stands in the spec where core wants a core-attention module: the elastic layer calls its op itself."""

    def __init__(self, **_: object) -> None:
        """Takes what core passes; holds nothing."""


class ElasticSelfAttention(SelfAttention):
    """Grouped-query causal self-attention on all query heads, with a mask, or on a slice of them."""

    @property
    def scale(self) -> float:
        """Factor on the scores: the head's width is no axis, so that of every selection."""
        scale: float = self.config.softmax_scale or self.hidden_size_per_attention_head**-0.5
        return scale

    def attend(self, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> Tensor:
        """Query `[s, b, heads, d]`, key and value `[s, b, groups, d]` -> `[s, b, heads * d]`."""
        return context_parallel_attention(query, key, value, self.scale, documents, self.pg_collection.cp)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        mask: Tensor | None = None,
        plan: LayerPlan | None = None,
        rotary_pos_emb: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Args:
            hidden_states: normalised input, `[s, b, kept hidden]`, `s` being this rank's tokens.
            mask: soft mask of the query heads, `[heads / TP]`, on the heads' outputs.
            plan: slice to run instead.
            rotary_pos_emb: `[s, 1, 1, d]` or None.
            documents: of the whole sequence, `[b, s * CP]`, or None.

        Returns:
            `[s, b, kept hidden]`.
        """
        segments = plan.segments if plan is not None else {}
        heads = self.num_attention_heads_per_partition if plan is None else plan.sizes["attention_heads"]
        groups, width = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        qkv, _ = self.linear_qkv(hidden_states, segments=segments.get("self_attention.linear_qkv.weight"))
        packed = qkv.unflatten(-1, (groups, (heads // groups + 2) * width))
        query, key, value = packed.split([heads // groups * width, width, width], dim=-1)
        query = query.reshape(*query.shape[:2], heads, width)
        if rotary_pos_emb is not None:
            rotate = partial(apply_rotary_pos_emb, config=self.config, cp_group=self.pg_collection.cp)
            query, key = rotate(query, rotary_pos_emb), rotate(key, rotary_pos_emb)
        if self.checkpoint_core_attention and self.training:
            context = tensor_parallel.checkpoint(self.attend, False, query, key, value, documents)
        else:
            context = self.attend(query, key, value, documents)
        if mask is not None:
            context = masked(context, mask.repeat_interleave(width))
        out, _ = self.linear_proj(context, segments=segments.get("self_attention.linear_proj.weight"))
        return out


class ElasticAttentionLayer(TransformerLayer):
    """Residual attention layer on a masked or sliced residual stream."""

    def forward(
        self,
        hidden_states: Tensor,
        *,
        masks: Masks | None,
        plan: LayerPlan | None,
        rotary_pos_emb: Tensor | None = None,
        documents: Tensor | None = None,
        moe: MoeRole | None = None,
    ) -> Tensor:
        """`[s, b, kept hidden]` -> the same shape. `moe` is not used."""
        segments = None if plan is None else plan.segments["input_layernorm.weight"]

        def body(x: Tensor) -> Tensor:
            mask = None if masks is None else masks.axes["attention_heads"]
            return self.self_attention(x, mask=mask, plan=plan, rotary_pos_emb=rotary_pos_emb, documents=documents)

        return residual_branch(
            hidden_states,
            self.input_layernorm,
            body,
            masks=masks,
            segments=segments,
            recompute=self.recompute_input_layernorm and self.training,
        )
