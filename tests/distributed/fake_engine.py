"""A Transformer Engine that computes with torch, on any device and in any precision, behind the real one's arguments.

Its modules take what the real ones take and nothing else, communicate where those do, keep for the backward what those
keep, and quantise weights and inputs where an autocast is open: to a grid of steps of the largest value, with a copy of
the weight that lives as long as the real one's.
"""

import contextlib
import itertools
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_elastic import backend
from megatron_elastic.layers import te_module
from megatron_elastic.ops.attention import causal_attention

STEPS = 32
"""Of the grid, between 0 and the largest value: rough enough to show."""
STATE = types.SimpleNamespace(quantised=False, weights=0, calls=[])
"""Whether an autocast is open, how many weights were quantised, and what modules were called with."""


def grid(x: Tensor) -> Tensor:
    """`x` on a grid that its largest value sets."""
    if not x.numel():
        return x
    step = x.detach().abs().max().clamp(min=1e-30) / STEPS
    return (x.detach() / step).round() * step


@contextlib.contextmanager
def autocast(enabled: bool = True) -> Iterator[None]:
    """What core opens around a layer."""
    before, STATE.quantised = STATE.quantised, enabled
    try:
        yield
    finally:
        STATE.quantised = before


class _Product(torch.autograd.Function):
    """`x w^T` that keeps the weight twice, as it runs and as it was given; the gradients are of what ran."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ran: Tensor | None) -> Tensor:
        used = weight if ran is None else ran
        seen = x if ran is None else grid(x)
        ctx.save_for_backward(seen, used, weight)
        return torch.nn.functional.linear(seen, used)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        seen, used, weight = ctx.saved_tensors
        assert weight.shape == used.shape
        flat = grad.flatten(0, -2)
        return grad @ used, flat.t() @ seen.flatten(0, -2), None


class _Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._workspaces: dict[str, Tensor] = {}

    def get_extra_state(self) -> Tensor:
        """The real modules have one."""
        return torch.empty(0, dtype=torch.uint8)

    def quantised(self, name: str, weight: Tensor, first: bool | None) -> Tensor | None:
        """What runs in the place of a weight; None for the weight itself."""
        if not STATE.quantised:
            return None
        if first is not None and not first and name in self._workspaces:
            return self._workspaces[name]
        STATE.weights += 1
        made = grid(weight)
        if first is not None:
            self._workspaces[name] = made
        return made


class Linear(_Module):
    """`transformer_engine.pytorch.Linear`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: str = "cuda",
    ) -> None:
        super().__init__()
        assert not bias
        assert not fuse_wgrad_accumulation  # it would overwrite what other budgets have added
        assert device == "meta"
        self.tp_group, self.tp_size, self.mode = tp_group, tp_size, parallel_mode
        self.sequence_parallel = sequence_parallel and tp_size > 1
        rows = out_features // (tp_size if parallel_mode == "column" else 1)
        columns = in_features // (tp_size if parallel_mode == "row" else 1)
        self.sizes = rows, columns
        self.weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=params_dtype, device=device))

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        weight = self.weight
        STATE.calls.append((type(self).__name__, tuple(weight.shape), tuple(inp.shape), is_first_microbatch))
        assert tuple(weight.shape) == self.sizes
        if self.mode == "column" and self.sequence_parallel:
            inp = gather_from_sequence_parallel_region(inp, group=self.tp_group)
        elif self.mode == "column" and self.tp_size > 1:
            inp = copy_to_tensor_model_parallel_region(inp, group=self.tp_group)
        ran = self.quantised("weight", weight, is_first_microbatch)
        out: Tensor = _Product.apply(inp, weight, ran)  # type: ignore[no-untyped-call]
        if self.mode == "row" and self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        if self.mode == "row" and self.tp_size > 1:
            return reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        return out


class GroupedLinear(_Module):
    """`transformer_engine.pytorch.GroupedLinear`."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        fuse_wgrad_accumulation: bool = False,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: str = "cuda",
    ) -> None:
        super().__init__()
        assert not bias
        assert not fuse_wgrad_accumulation
        assert parallel_mode is None
        for number in range(num_gemms):
            weight = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
            self.register_parameter(f"weight{number}", torch.nn.Parameter(weight))
        self.num_gemms = num_gemms

    def forward(self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        names = [f"weight{number}" for number in range(self.num_gemms)]
        weights = [getattr(self, name) for name in names]
        STATE.calls.append((type(self).__name__, tuple(m_splits), tuple(weights[0].shape), is_first_microbatch))
        assert not STATE.quantised or all(rows % 16 == 0 for rows in m_splits)
        ran = [
            self.quantised(name, weight, is_first_microbatch) for name, weight in zip(names, weights, strict=True)
        ]
        parts = zip(inp.split(m_splits), weights, ran, strict=True)
        return torch.cat([_Product.apply(rows, weight, used) for rows, weight, used in parts])  # type: ignore[no-untyped-call]


class DotProductAttention(_Module):
    """`transformer_engine.pytorch.DotProductAttention`."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        layer_number: int | None = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
    ) -> None:
        super().__init__()
        assert (attention_dropout, attention_type) == (0.0, "self")
        self.heads, self.width, self.groups, self.scale = (
            num_attention_heads, kv_channels, num_gqa_groups, softmax_scale,
        )  # fmt: skip
        self.split = cp_group, cp_global_ranks, cp_stream, cp_comm_type

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
    ) -> Tensor:
        assert attention_mask is None
        assert key_layer.shape[-2:] == value_layer.shape[-2:] == (self.groups, self.width)
        assert self.scale is not None
        STATE.calls.append((type(self).__name__, qkv_format, tuple(query_layer.shape), attn_mask_type))
        if qkv_format == "sbhd":
            assert attn_mask_type == "causal"
            return causal_attention(query_layer, key_layer, value_layer, self.scale)
        assert (qkv_format, attn_mask_type) == ("thd", "padding_causal")
        assert cu_seqlens_q is not None
        assert cu_seqlens_q.dtype is torch.int32
        assert cu_seqlens_kv is not None
        assert torch.equal(cu_seqlens_q, cu_seqlens_kv)
        assert max_seqlen_q == max_seqlen_kv
        ends = cu_seqlens_q.tolist()
        assert max(b - a for a, b in itertools.pairwise(ends)) <= (max_seqlen_q or 0)
        documents = [
            causal_attention(*(t[start:stop].unsqueeze(1) for t in (query_layer, key_layer, value_layer)), self.scale)
            for start, stop in itertools.pairwise(ends)
        ]
        return torch.cat(documents).squeeze(1)


@contextlib.contextmanager
def installed() -> Iterator[types.SimpleNamespace]:
    """Has the package find this one, as if there were a device for it; yields what was counted."""
    made, pytorch = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    vars(pytorch).update(Linear=Linear, GroupedLinear=GroupedLinear, DotProductAttention=DotProductAttention)
    made.pytorch = pytorch  # type: ignore[attr-defined]
    names = {"transformer_engine": made, "transformer_engine.pytorch": pytorch}
    before = {name: sys.modules.get(name) for name in names}
    right = te_module.transformer_engine_fault
    STATE.quantised, STATE.weights = False, 0
    STATE.calls.clear()
    sys.modules.update(names)
    backend._import_fault.cache_clear()
    te_module.transformer_engine_fault = lambda *, cuda: right(cuda=True)
    try:
        yield STATE
    finally:
        te_module.transformer_engine_fault = right
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
        backend._import_fault.cache_clear()
