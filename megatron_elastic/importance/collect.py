"""Measures importance on a built model: hooks where the paper scores, and nothing but forward passes.

Scoring sites (Nemotron Elastic, eqs 1-4; Minitron-SSM, eqs 19-27):

- hidden: the output of the norm before each layer, `|LN(X)_i|`; one score a norm, summed over the norms. The final norm
  is not one of them: the papers score the channels that layers use.
- FFN neurons: the output of fc1, before the activation.
- Mamba heads: the part `x` of in_proj's output.
- attention heads: the input of linear_proj, L2 inside each head. The paper has no formula; its authors' own pruning
  library scores here.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mlp_layer import MLPLayer
from torch import Tensor

from megatron_elastic.errors import ElasticError
from megatron_elastic.importance.scores import Scores, SequenceNorms, mamba_head_scores

Take = Callable[[Tensor], Tensor]


class _Sites:
    """The scoring sites of a model: one accumulator a norm, and one a layer."""

    def __init__(self, model: Any) -> None:
        self.norms: dict[int, SequenceNorms] = {}
        self.entries: dict[int, tuple[str, SequenceNorms]] = {}
        self._finish: dict[int, Take] = {}
        self._handles: list[Any] = []
        for layer in model.decoder.layers:
            self._watch(layer.layer_number - 1, layer)

    def _watch(self, number: int, layer: Any) -> None:
        self.norms[number] = SequenceNorms()
        if isinstance(layer, MLPLayer):
            self._output(layer.pre_mlp_layernorm, torch.abs, self.norms[number])
            self._output(layer.mlp.linear_fc1, torch.abs, self._entry(number, "ffn"))
        elif isinstance(layer, MambaLayer):
            self._output(layer.norm, torch.abs, self.norms[number])
            mixer = layer.mixer
            width, heads = mixer.d_inner_local_tp, mixer.nheads_local_tp
            # Columns of in_proj: the gate z, then x.
            self._output(mixer.in_proj, lambda zx: zx[..., width : 2 * width].abs(), self._entry(number, "mamba_heads"))
            self._finish[number] = lambda channels: mamba_head_scores(channels, heads)
        else:
            self._output(layer.input_layernorm, torch.abs, self.norms[number])
            attention = layer.self_attention
            heads = attention.num_attention_heads_per_partition
            entry = self._entry(number, "attention_heads")

            def seen(module: Any, inputs: tuple[Tensor, ...], entry: SequenceNorms = entry, heads: int = heads) -> None:
                context = inputs[0].detach()
                entry.add(torch.linalg.vector_norm(context.view(*context.shape[:-1], heads, -1), dim=-1))

            self._handles.append(attention.linear_proj.register_forward_pre_hook(seen))

    def _entry(self, number: int, axis: str) -> SequenceNorms:
        self.entries[number] = axis, SequenceNorms()
        return self.entries[number][1]

    def _output(self, module: Any, take: Take, into: SequenceNorms) -> None:
        def seen(module: Any, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            # Core's linears return their bias beside the output.
            into.add(take((output[0] if isinstance(output, tuple) else output).detach()))

        self._handles.append(module.register_forward_hook(seen))

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def scores(self, calibration: Mapping[str, Any]) -> Scores:
        """What was seen so far."""
        hidden = torch.stack([norm.value() for norm in self.norms.values()]).sum(dim=0)
        layers = {
            number: {axis: self._finish.get(number, lambda scores: scores)(entry.value())}
            for number, (axis, entry) in self.entries.items()
        }
        return Scores(hidden, layers, dict(calibration))


@contextlib.contextmanager
def _trunk_only(model: Any) -> Iterator[None]:
    """Ends the forward before the LM head, whose logits would be the largest tensor by far; evaluation mode."""
    trained, head = model.training, model.post_process
    model.eval()
    model.post_process = False
    try:
        yield
    finally:
        model.post_process = head
        model.train(trained)


def collect_scores(
    model: Any, batches: Iterable[Tensor], calibration: Mapping[str, Any] | None = None
) -> Scores:
    """Importance of every axis of a model, at full width.

    Args:
        model: core's `HybridModel` on the plain spec, or `ElasticHybridModel`; whole, on one process.
        batches: tokens, each `[b, s]`.
        calibration: facts to keep with the scores.

    Raises:
        ElasticError: in a run of several processes, or without a batch.
    """
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if ranks > 1:
        raise ElasticError(f"importance on {ranks} processes: it is measured on one; start it without torchrun")
    device, sites, seen = next(model.parameters()).device, _Sites(model), 0
    try:
        with torch.no_grad(), _trunk_only(model):
            for tokens in batches:
                positions = torch.arange(tokens.shape[1], device=device).expand(tokens.shape[0], -1)
                model(tokens.to(device), positions, None)
                seen += tokens.shape[0]
        if not seen:
            raise ElasticError("importance: no calibration sample; set elastic.calibration.samples to 1 or more")
        return sites.scores(calibration or {})
    finally:
        sites.close()
