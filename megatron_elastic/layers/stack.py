"""The elastic stack: a short layer loop that carries the selection as an argument, recompute included.

Core's `HybridStack.forward` and `checkpointed_forward` have closed argument lists. A selection that sat on the modules
instead would be another budget's by the time 1F1B runs a backward, or recompute replays a forward.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_elastic.budget import Selection
from megatron_elastic.family import Family, SlicePlan, SlicePlans
from megatron_elastic.layers.norm import ElasticRMSNorm
from megatron_elastic.layers.plain import LocalHybridStack
from megatron_elastic.masks import Masks, MaskTables


class ElasticStack(LocalHybridStack):
    """`HybridStack` whose forward takes a soft or hard selection."""

    def __init__(self, config: Any, submodules: Any, *args: Any, family: Family, **kwargs: Any) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        if self.post_process:
            self.final_norm = ElasticRMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.plans = SlicePlans(family, self.tp_group.size())
        self.mask_tables = MaskTables(family.orders, family.choices, self.tp_group.size())

    def forward(
        self,
        hidden_states: Tensor | None,
        rotary_pos_emb: Tensor | None = None,
        *,
        selection: Selection | None = None,
        probabilities: Mapping[str, Tensor] | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Runs this stage's layers.

        Args:
            hidden_states: embeddings `[s, b, h]` on the first stage, else ignored for the received tensor.
            rotary_pos_emb: rotary table or None.
            selection: runs the slice of this selection.
            probabilities: axis -> `[choices]`: runs at full width under soft masks. Neither: the plain parent.
            documents: number of each token's document, `[b, s * CP]` in the order of the text; None for one document.

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
            x = x * mixed[0]
        x = self._layers(x, mixed, plan, rotary_pos_emb, documents)
        if self.post_process and mixed:
            x = self.final_norm(x, width=mixed[0].sum())
        elif self.post_process:
            x = self.final_norm(x, segments=None if plan is None else plan.segments["decoder.final_norm.weight"])
        elif plan is not None and plan.hidden < self.config.hidden_size:
            # Constant shapes between stages: the schedules then run every budget as they run the parent.
            x = F.pad(x, (0, self.config.hidden_size - plan.hidden))
        return make_viewless_tensor(inp=x, requires_grad=x.requires_grad, keep_graph=True)

    def _run(self, numbers: Sequence[int], plan: SlicePlan | None, x: Tensor, *rest: Tensor | None) -> Tensor:
        rotary, documents, *mixed = rest
        # Rotary embeddings and documents may be absent: masks come all together or not at all.
        masks = Masks(*(mask for mask in mixed if mask is not None)) if mixed else None
        for number in numbers:
            x = self.layers[number](x, masks=masks, plan=plan, rotary_pos_emb=rotary, documents=documents)
        return x

    def _layers(
        self,
        x: Tensor,
        mixed: Sequence[Tensor],
        plan: SlicePlan | None,
        rotary: Tensor | None,
        documents: Tensor | None,
    ) -> Tensor:
        config, count, rest = self.config, len(self.layers), (rotary, documents, *mixed)
        if config.recompute_granularity != "full" or not self.training:
            return self._run(range(count), plan, x, *rest)
        size = config.recompute_num_layers if config.recompute_method == "uniform" else 1
        checkpointed = count if config.recompute_method == "uniform" else min(count, config.recompute_num_layers)
        for start in range(0, checkpointed, size):
            numbers = range(start, min(start + size, checkpointed))

            def replay(x: Tensor, *rest: Tensor | None, numbers: range = numbers) -> Tensor:
                return self._run(numbers, plan, x, *rest)

            x = tensor_parallel.checkpoint(replay, config.distribute_saved_activations, x, *rest)
        return self._run(range(checkpointed, count), plan, x, *rest)
