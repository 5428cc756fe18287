"""The elastic stack: a short layer loop that carries the selection as an argument, recompute included.

Core's `HybridStack.forward` and `checkpointed_forward` have closed argument lists. A selection that sat on the modules
instead would be another budget's by the time 1F1B runs a backward, or recompute replays a forward.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_elastic.budget import Selection
from megatron_elastic.family import Family, LayerPlan, SlicePlan, SlicePlans
from megatron_elastic.layers.moe_role import MoeRole
from megatron_elastic.layers.norm import ElasticRMSNorm
from megatron_elastic.layers.plain import LocalHybridStack
from megatron_elastic.layers.recompute import layer_precision
from megatron_elastic.masks import MaskTables, effective_width
from megatron_elastic.ops.unused import unused

EXPERTS = "mlp.experts.experts.linear_fc1.weight"
"""Stock name of what the routed experts' first weights are stored under."""


def _skip(layer: Any, plan: LayerPlan, x: Tensor) -> Tensor:
    """A layer that is not run, as its owners see it: its weights were gathered, and get a gradient of nothing.

    Data-parallel ranks may run different budgets. Their buckets must be gathered and reduced in one order all the
    same, so the hooks that start a gather run here too (without gradients also: so does recompute's first forward), and
    every weight reports; both one after the other as in a layer that runs.
    """
    # A plan names weights in the order of their use; several of one name (experts) follow each other.
    places = {name: place for place, name in enumerate(plan.segments)}
    names = [name for name, _ in layer.named_parameters()]
    called = set()
    for name in sorted(names, key=lambda name: places.get(name, places.get(EXPERTS, 0))):
        path = name.split(".")[:-1]
        for module in (layer.get_submodule(".".join(path[:depth])) for depth in range(len(path) + 1)):
            if module not in called:
                called.add(module)
                for hook in tuple(module._forward_pre_hooks.values()):
                    hook(module, ())
        if torch.is_grad_enabled():
            x = unused(x, layer.get_parameter(name))
    return x


class ElasticStack(LocalHybridStack):
    """`HybridStack` whose forward takes a soft or hard selection."""

    def __init__(self, config: Any, submodules: Any, *args: Any, family: Family, **kwargs: Any) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        if self.post_process:
            self.final_norm = ElasticRMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        tp, ep, etp = (self.pg_collection.tp.size(), self.pg_collection.ep.size(), self.pg_collection.expt_tp.size())
        self.plans = SlicePlans(family, tp, ep, etp)
        self.mask_tables = MaskTables(family, tp, etp)

    def forward(
        self,
        hidden_states: Tensor | None,
        rotary_pos_emb: Tensor | None = None,
        *,
        selection: Selection | None = None,
        probabilities: Mapping[str, Tensor] | None = None,
        documents: Tensor | None = None,
        moe: MoeRole | None = None,
    ) -> Tensor:
        """Runs this stage's layers.

        Args:
            hidden_states: embeddings `[s, b, h]` on the first stage, else ignored for the received tensor.
            rotary_pos_emb: rotary table or None.
            selection: runs the slice of this selection.
            probabilities: axis -> `[uses, choices]`: runs at full width under soft masks. Neither: the plain parent.
            documents: number of each token's document, `[b, s * CP]` in the order of the text; None for one document.
            moe: part of this microbatch in the balance of experts.

        Returns:
            `[s, b, kept hidden]` after the final norm on the last stage, `[s, b, h]` (padded) before it.
        """
        if selection is not None and probabilities is not None:
            raise ValueError("selection and probabilities exclude each other: one submodel runs sliced or masked")
        x = hidden_states if self.pre_process else self.input_tensor
        assert x is not None
        plan = None if selection is None else self.plans.of(selection)
        mixed: Sequence[Tensor] = ()
        if probabilities is not None:
            mixed = [mask.to(x.dtype) for mask in self.mask_tables(probabilities)]
        if plan is not None:
            x = x[..., : plan.hidden]
        elif mixed and self.pre_process:
            x = x * mixed[0][0]  # `hidden` is the first axis
        x = self._layers(x, mixed, plan, moe, rotary_pos_emb, documents)
        if self.post_process and mixed:
            x = self.final_norm(x, width=effective_width(mixed[0][0]))
        elif self.post_process:
            x = self.final_norm(x, segments=None if plan is None else plan.segments["decoder.final_norm.weight"])
        elif plan is not None and plan.hidden < self.config.hidden_size:
            # Constant shapes between stages: the schedules then run every budget as they run the parent.
            x = F.pad(x, (0, self.config.hidden_size - plan.hidden))
        return make_viewless_tensor(inp=x, requires_grad=x.requires_grad, keep_graph=True)

    def _run(
        self, numbers: Sequence[int], plan: SlicePlan | None, moe: MoeRole | None, x: Tensor, *rest: Tensor | None
    ) -> Tensor:
        rotary, documents, *given = rest
        # Rotary embeddings and documents may be absent: masks come all together or not at all.
        mixed = [mask for mask in given if mask is not None]
        for number in numbers:
            layer = self.layers[number]
            position = layer.layer_number - 1  # in the whole model
            own = None if plan is None else plan.layers[position]
            if own is not None and own.skipped:
                x = _skip(layer, own, x)
                continue
            masks = self.mask_tables.of_layer(mixed, position) if mixed else None
            # In here, and so in a recompute's replay too.
            with layer_precision(self.config, layer.layer_number):
                x = layer(x, masks=masks, plan=own, rotary_pos_emb=rotary, documents=documents, moe=moe)
        return x

    def _layers(
        self,
        x: Tensor,
        mixed: Sequence[Tensor],
        plan: SlicePlan | None,
        moe: MoeRole | None,
        rotary: Tensor | None,
        documents: Tensor | None,
    ) -> Tensor:
        config, count, rest = self.config, len(self.layers), (rotary, documents, *mixed)
        if config.recompute_granularity != "full" or not self.training:
            return self._run(range(count), plan, moe, x, *rest)
        size = config.recompute_num_layers if config.recompute_method == "uniform" else 1
        checkpointed = count if config.recompute_method == "uniform" else min(count, config.recompute_num_layers)
        for start in range(0, checkpointed, size):
            numbers = range(start, min(start + size, checkpointed))

            def replay(x: Tensor, *rest: Tensor | None, numbers: range = numbers) -> Tensor:
                return self._run(numbers, plan, moe, x, *rest)

            x = tensor_parallel.checkpoint(replay, config.distribute_saved_activations, x, *rest)
        return self._run(range(checkpointed, count), plan, moe, x, *rest)
