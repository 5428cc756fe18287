"""Elastic attention on Transformer Engine's kernels, which choose between flash and fused attention themselves.

Query heads are narrowed inside their KV group and no group is left out, so one module runs every selection.
"""

import os
import weakref
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_elastic.errors import ElasticError
from megatron_elastic.layers.attention import ElasticSelfAttention
from megatron_elastic.layers.packing import documents_of
from megatron_elastic.layers.te_module import transformer_engine
from megatron_elastic.ops.packing import check_documents

_CP_STREAMS: dict[int, Any] = {}
"""Device -> the second stream of context-parallel attention: one for all layers, as in core."""


class DocumentEnds:
    """Where the documents of a packed batch end, made once for all layers of a microbatch.

    Their number depends on the text, so the host waits for the device here: once a microbatch, not once a layer.
    """

    def __init__(self) -> None:
        """Knows none yet."""
        self._of: weakref.ref[Tensor] | None = None
        self._ends = torch.empty(0)

    def __call__(self, documents: Tensor) -> Tensor:
        """Numbers of documents `[b, s]` -> `[documents + 1]` int32: 0 and every end, row after row."""
        if self._of is None or self._of() is not documents:
            first = torch.ones_like(documents, dtype=torch.bool)
            first[:, 1:] = documents[:, 1:] != documents[:, :-1]
            starts = first.flatten().nonzero().flatten().to(torch.int32)
            self._ends = torch.cat([starts, starts.new_tensor([documents.numel()])])
            self._of = weakref.ref(documents)
        return self._ends


_ENDS = DocumentEnds()


class EngineAttention:
    """Causal attention of Transformer Engine. No module of its owner: nothing of it is saved.

    Args:
        config: of the model.
        groups: key and value heads on this rank.
        heads: query heads on this rank at full size.
        width: channels of a head.
        scale: factor on the scores.
        layer_number: from 1.
        cp_group: the context-parallel ranks.

    Raises:
        ElasticError: Transformer Engine cannot run here, or is not told to be deterministic where core is.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        groups: int,
        heads: int,
        width: int,
        scale: float,
        layer_number: int,
        cp_group: Any,
    ) -> None:
        if config.deterministic_mode and os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") != "0":
            raise ElasticError(
                "deterministic-mode: Transformer Engine's attention is deterministic only with "
                "NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 in the environment: set it"
            )
        engine = transformer_engine()
        split: dict[str, Any] = {}
        if cp_group.size() > 1:
            device = torch.cuda.current_device()
            split = {
                "cp_group": cp_group,
                "cp_global_ranks": torch.distributed.get_process_group_ranks(cp_group),
                "cp_stream": _CP_STREAMS.setdefault(device, torch.cuda.Stream()),
                "cp_comm_type": _cp_comm_type(config, layer_number),
            }
        self.cp_size = cp_group.size()
        # This rank's heads as the whole: nothing here crosses tensor-parallel ranks.
        self.attention = engine.DotProductAttention(
            heads,
            width,
            num_gqa_groups=groups,
            attention_dropout=0.0,
            qkv_format="sbhd",
            attn_mask_type="causal",
            softmax_scale=scale,
            layer_number=layer_number,
            attention_type="self",
            **split,
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None = None) -> Tensor:
        """Args:
            query: `[s / CP, b, heads, d]`; any number of heads that the groups divide.
            key, value: `[s / CP, b, groups, d]`.
            documents: `[b, s]`, or None for one document a row.

        Returns:
            `[s / CP, b, heads * d]`.

        Raises:
            ElasticError: for documents on a sequence that is split over ranks.
        """
        if documents is None:
            out: Tensor = self.attention(query, key, value, attn_mask_type="causal", qkv_format="sbhd")
            return out
        if self.cp_size > 1:
            raise ElasticError(
                "documents and context parallelism: Transformer Engine would have every document split by itself; "
                "use --transformer-impl local, or leave out --dataloader-inter-document-masking"
            )
        length, batch = query.shape[:2]
        check_documents(documents, batch, length)
        ends = _ENDS(documents)
        # One row after the other, without padding: what it calls `thd`.
        rows = [each.transpose(0, 1).flatten(0, 1) for each in (query, key, value)]
        packed: Tensor = self.attention(
            *rows,
            attn_mask_type="padding_causal",
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=length,
            max_seqlen_kv=length,
        )
        return packed.view(batch, length, -1).transpose(0, 1).contiguous()


def _cp_comm_type(config: TransformerConfig, layer_number: int) -> str:
    kinds = config.cp_comm_type
    kind = kinds[(layer_number - 1) % len(kinds)] if isinstance(kinds, list) else kinds
    return kind or "p2p"


class TEElasticSelfAttention(ElasticSelfAttention):
    """`ElasticSelfAttention` whose scores and sums are Transformer Engine's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what core's layer takes."""
        super().__init__(*args, **kwargs)
        self.engine = EngineAttention(
            self.config,
            groups=self.num_query_groups_per_partition,
            heads=self.num_attention_heads_per_partition,
            width=self.hidden_size_per_attention_head,
            scale=self.scale,
            layer_number=self.layer_number,
            cp_group=self.pg_collection.cp,
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> Tensor:
        """As of the local layer."""
        return self.engine(query, key, value, documents)


class TECoreAttention(torch.nn.Module):
    """`EngineAttention` behind the interface that core's own attention layer calls: for plain models."""

    def __init__(self, config: TransformerConfig, layer_number: int, *_: Any, pg_collection: Any, **other: Any) -> None:
        """Takes what core passes to its core attention."""
        super().__init__()
        tp = pg_collection.tp.size()
        width = config.kv_channels
        self.engine = EngineAttention(
            config,
            groups=config.num_query_groups // tp,
            heads=config.num_attention_heads // tp,
            width=width,
            scale=other.get("softmax_scale") or width**-0.5,
            layer_number=layer_number,
            cp_group=pg_collection.cp,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *_: Any,
        packed_seq_params: Any = None,
        **__: Any,
    ) -> Tensor:
        """Query, key and value `[s / CP, b, heads or groups, d]` -> `[s / CP, b, heads * d]`.

        Raises:
            ElasticError: for a mask, or packed sequences that are not from `packed_documents`.
        """
        if attention_mask is not None:
            raise ElasticError(
                "attention_mask: Transformer Engine's attention is causal here; pass None "
                "(--no-create-attention-mask-in-dataloader)"
            )
        return self.engine(query, key, value, documents_of(packed_seq_params))
