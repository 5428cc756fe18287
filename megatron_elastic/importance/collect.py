"""Measures the width scores on a built model: hooks where the paper scores, and nothing but forward passes.

Scoring sites (Nemotron Elastic, eqs 1-4; Minitron-SSM, eqs 19-27; Star Elastic for experts):

- hidden: the output of the norm before each layer, `|LN(X)_i|`; one score a norm, summed over the norms. The final norm
  is not one of them: the papers score the channels that layers use.
- neurons of an MLP, the shared expert and each routed expert: the output of fc1, before the activation; of gated ones
  the product that enters fc2, since two projections meet in it.
- Mamba heads and their channels: the part `x` of in_proj's output.
- attention heads: the input of linear_proj, L2 inside each head. The paper has no formula; its authors' own pruning
  library scores here.
- experts: REAP, the mean over the tokens routed to an expert of its gate times the L2 norm of its output.

Under tensor, sequence, pipeline, expert and data parallelism every rank scores what it holds, on its own samples; at
the end the parts are summed or joined, and every rank has the scores of the whole model.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_elastic.errors import ElasticError
from megatron_elastic.importance.accumulators import RoutedMeans, SequenceNorms, joined, summed
from megatron_elastic.importance.scores import Scores, mamba_scores
from megatron_elastic.importance.trunk import Trunk

Take = Callable[[Tensor], Tensor]
Value = Callable[[], Mapping[str, Tensor]]


class _Sites:
    """The scoring sites of a stage: one accumulator a norm, and those of each layer's own axes."""

    def __init__(self, trunk: Trunk, head_channels: int | None) -> None:
        self.groups, self.config, self.device = trunk.groups, trunk.model.config, trunk.device
        self.head_channels = head_channels
        self.norms: dict[int, SequenceNorms] = {}
        self.values: dict[int, Value] = {}
        self._handles: list[Any] = []
        for number, layer in trunk.layers.items():
            self._watch(number, layer)

    def _watch(self, number: int, layer: Any) -> None:
        if isinstance(layer, MambaLayer):
            norm, value = layer.norm, self._mamba(layer.mixer)
        elif isinstance(layer, MLPLayer):
            norm, value = layer.pre_mlp_layernorm, self._neurons(layer.mlp, "ffn")
        elif isinstance(getattr(layer, "mlp", None), MoELayer):
            norm, value = layer.pre_mlp_layernorm, self._moe(layer.mlp)
        else:
            norm, value = layer.input_layernorm, self._attention(layer.self_attention)
        split = self.config.sequence_parallel and self.groups.tp.size() > 1
        self.norms[number] = SequenceNorms(self.groups.tp if split else None)
        self._output(norm, torch.abs, self.norms[number])
        self.values[number] = value

    def _mamba(self, mixer: Any) -> Value:
        width, heads = mixer.d_inner_local_tp, mixer.nheads_local_tp
        channels = SequenceNorms()
        # Columns of in_proj: the gate z, then x.
        self._output(mixer.in_proj, lambda zx: zx[..., width : 2 * width].abs(), channels)

        def value() -> Mapping[str, Tensor]:
            whole = joined(channels.value(self.groups.dp).view(heads, -1), self.groups.tp)
            return mamba_scores(whole, self.head_channels or whole.size(1))

        return value

    def _attention(self, attention: Any) -> Value:
        heads, norms = attention.num_attention_heads_per_partition, SequenceNorms()

        def seen(module: Any, inputs: tuple[Tensor, ...]) -> None:
            context = inputs[0]
            norms.add(torch.linalg.vector_norm(context.view(*context.shape[:-1], heads, -1), dim=-1))

        self._handles.append(attention.linear_proj.register_forward_pre_hook(seen))
        return lambda: {"attention_heads": joined(norms.value(self.groups.dp), self.groups.tp)}

    def _activity(self, output: Tensor) -> Tensor:
        """What is scored of fc1's output."""
        if not self.config.gated_linear_unit:
            return output.abs()
        gate, value = output.chunk(2, dim=-1)
        product: Tensor = self.config.activation_func(gate) * value
        return product.abs()

    def _neurons(self, mlp: Any, axis: str) -> Value:
        neurons = SequenceNorms()
        self._output(mlp.linear_fc1, self._activity, neurons)
        return lambda: {axis: joined(neurons.value(self.groups.dp), self.groups.tp)}

    def _moe(self, moe: Any) -> Value:
        if not isinstance(moe.experts, SequentialMLP) or getattr(moe.experts, "grouped", False):
            raise ElasticError(
                f"importance of {type(moe.experts).__name__}: experts are scored one by one: leave moe-grouped-gemm out"
            )
        experts = moe.experts.local_experts
        gains, neurons = RoutedMeans(len(experts)), RoutedMeans(len(experts))
        for number, expert in enumerate(experts):
            self._expert(number, expert, gains, neurons)
        shared: Value = dict
        if moe.shared_experts is not None:
            shared = self._neurons(moe.shared_experts, "shared_expert_ffn")

        def value() -> Mapping[str, Tensor]:
            groups = self.groups
            own = joined(neurons.value(groups.expt_dp), groups.expt_tp, 1)
            return {
                "experts": joined(gains.value(groups.expt_dp)[:, 0], groups.ep),
                "expert_ffn": joined(own, groups.ep),
                **shared(),
            }

        return value

    def _expert(self, number: int, expert: Any, gains: RoutedMeans, neurons: RoutedMeans) -> None:
        def seen(module: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
            # Core scales the neurons by the gate, so that the output is the gate times the expert's own; with expert
            # tensor parallelism it is a part of the sum, which core makes when it sends the tokens back.
            gains.add(number, torch.linalg.vector_norm(summed(output[0], self.groups.expt_tp), dim=-1, keepdim=True))

        def fc1(module: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
            neurons.add(number, self._activity(output[0]))

        self._handles += [expert.register_forward_hook(seen), expert.linear_fc1.register_forward_hook(fc1)]

    def _output(self, module: Any, take: Take, into: SequenceNorms) -> None:
        def seen(module: Any, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            # Core's linears return their bias beside the output.
            into.add(take(output[0] if isinstance(output, tuple) else output))

        self._handles.append(module.register_forward_hook(seen))

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def scores(self, hidden_size: int) -> tuple[Tensor, dict[int, Mapping[str, Tensor]]]:
        """What was seen so far, of the whole model, on the CPU."""
        hidden = torch.zeros(hidden_size, dtype=torch.float64, device=self.device)
        for norm in self.norms.values():
            hidden += norm.value(self.groups.dp)
        own = {
            number: {axis: tensor.cpu() for axis, tensor in value().items()} for number, value in self.values.items()
        }
        stages: list[Any] = [None] * self.groups.pp.size()
        torch.distributed.all_gather_object(stages, own, group=self.groups.pp)
        layers = {number: axes for stage in stages for number, axes in stage.items()}
        return summed(hidden, self.groups.pp).cpu(), layers


def collect_scores(
    model: Any,
    batches: Iterable[Tensor],
    calibration: Mapping[str, Any] | None = None,
    *,
    head_channels: int | None = None,
) -> Scores:
    """Importance of every entry of every axis but `depth`, at full width; the same on every rank.

    Args:
        model: core's `HybridModel` on the plain spec; this rank's stage of it.
        batches: this data-parallel rank's tokens, each `[b, s]`; equally many on every rank.
        calibration: facts to keep with the scores.
        head_channels: of how many channels Mamba heads are judged by (D_top); None for all.

    Raises:
        ElasticError: without a batch.
    """
    trunk = Trunk(model)
    sites, seen = _Sites(trunk, head_channels), 0
    try:
        with trunk.measuring():
            for tokens in batches:
                x = trunk.run(trunk.enter(tokens), trunk.layers)
                if not trunk.last:
                    trunk.leave(x)
                seen += tokens.shape[0]
        if not seen:
            raise ElasticError("importance: no calibration sample; set elastic.calibration.samples to 1 or more")
        hidden, layers = sites.scores(model.config.hidden_size)
        return Scores(hidden, layers, dict(calibration or {}))
    finally:
        sites.close()
