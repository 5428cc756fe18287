"""One pipeline stage of a plain model, run layer by layer without gradients: what importance is measured on."""

import contextlib
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from megatron_elastic.errors import ElasticError

Streams = MutableMapping[int, Tensor]
"""Layer number -> the residual stream that enters the layer, `[s, b, h]`."""


class Trunk:
    """This rank's stage of core's `HybridModel` on the plain spec: embedding, layers, final norm.

    Stages hand the residual stream on themselves: a forward pass alone needs none of Megatron's schedules.

    Attributes:
        layers: layer number (of the whole model, from 0) -> layer.
        begin, end: this stage has the layers from `begin` on, up to `end` without it.
        total: layers of the whole model.
        layer_forwards: layers run so far on this rank, each on one batch.
    """

    def __init__(self, model: Any) -> None:
        if model.share_embeddings_and_output_weights:
            raise ElasticError("importance: the embedding is tied to the LM head, which is not supported: untie them")
        self.model, self.groups = model, model.pg_collection
        self.layers: dict[int, Any] = {layer.layer_number - 1: layer for layer in model.decoder.layers}
        self.layer_forwards = 0
        self.device = next(model.parameters()).device
        pipeline = self.groups.pp
        self._stages = torch.distributed.get_process_group_ranks(pipeline)
        self._stage = pipeline.rank()
        counts: list[Any] = [None] * len(self._stages)
        torch.distributed.all_gather_object(counts, len(self.layers), group=pipeline)
        self.begin = sum(counts[: self._stage])
        self.end = self.begin + len(self.layers)
        self.total = sum(counts)

    @property
    def first(self) -> bool:
        """Whether this is the first stage."""
        return self._stage == 0

    @property
    def last(self) -> bool:
        """Whether this is the last stage."""
        return self._stage == len(self._stages) - 1

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Evaluation mode without gradients, and the model as it was afterwards."""
        trained = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(trained)

    def enter(self, tokens: Tensor) -> Tensor:
        """What enters this stage's first layer: embeddings, or what the stage before sends.

        Args:
            tokens: `[b, s]`; on every stage, for the shape.

        Returns:
            `[s, b, h]`, or `[s / TP, b, h]` with sequence parallelism.
        """
        samples, length = tokens.shape
        if self.first:
            positions = torch.arange(length, device=self.device).expand(samples, -1)
            embedded: Tensor = self.model.embedding(input_ids=tokens.to(self.device), position_ids=positions)
            return embedded
        config = self.model.config
        local = length // self.groups.tp.size() if config.sequence_parallel else length
        received = torch.empty(local, samples, config.hidden_size, dtype=config.params_dtype, device=self.device)
        torch.distributed.recv(received, self._stages[self._stage - 1], group=self.groups.pp)
        return received

    def leave(self, x: Tensor) -> None:
        """Sends what leaves this stage's last layer to the next stage."""
        torch.distributed.send(x.contiguous(), self._stages[self._stage + 1], group=self.groups.pp)

    def run(self, x: Tensor, numbers: Iterable[int], keep: Streams | None = None) -> Tensor:
        """Runs layers of this stage.

        Args:
            x: the residual stream.
            numbers: of the layers, ascending.
            keep: takes over what enters each of them, on the CPU.
        """
        length = x.size(0) * (self.groups.tp.size() if self.model.config.sequence_parallel else 1)
        rotary = self.model.rotary_pos_emb(length) if self.model.position_embedding_type == "rope" else None
        for number in numbers:
            if keep is not None:
                keep[number] = x.to("cpu")
            x = self.layers[number](hidden_states=x, attention_mask=None, rotary_pos_emb=rotary)
            x = x[0] if isinstance(x, tuple) else x  # attention and MLP layers return a context beside it
            self.layer_forwards += 1
        return x

    def final(self, x: Tensor) -> Tensor:
        """The final norm, on the last stage."""
        normed: Tensor = self.model.decoder.final_norm(x)
        return normed
