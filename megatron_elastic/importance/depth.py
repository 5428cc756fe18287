"""Ranks the layers of a model by how much its logits change without them (Nemotron Elastic, eq 5).

    s_j = sum (M_full - M_-j)^2 / sum M_full^2        over all calibration tokens and the vocabulary

Iterative: the layer of the lowest score is removed, and the rest is judged again without it. One-shot: one round.

What is computed, and kept:

- A candidate runs the layers after it, from the residual stream that enters it. The streams of the current model are
  kept on the CPU in the model's type, `layers x calibration tokens x hidden` over the ranks of a data-parallel replica,
  and so are those of the best candidate of a round: when it wins, nothing is run again. At most three such sets are
  alive, of which two hold only the layers after a candidate.
- The logits never exist. The LM head is linear, so their difference is `W d` for a difference `d` of final hidden
  states, and with `W = Q R` its norm is that of `R d`: `R` is `[h, h]`, made once from slices of the vocabulary.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_elastic.checkpoint.integrity import write_atomically
from megatron_elastic.errors import CheckpointError, ElasticError
from megatron_elastic.importance.accumulators import joined, summed, wide
from megatron_elastic.importance.scores import DepthRanking
from megatron_elastic.importance.trunk import Streams, Trunk

METHODS = ("iterative", "one-shot")

_NOTHING = -1
"""Instead of a layer's number: no layer is left out."""

_VOCABULARY_SLICE = 8192
"""Rows of the LM head that are factorised at once."""


def triangular_factor(weight: Tensor, groups: Any) -> Tensor:
    """`R` of `W = Q R`, so that `||W d|| = ||R d||`.

    Args:
        weight: rows of the LM head on this rank, `[V / TP, h]`.
        groups: for the tensor-parallel group that the rows are split over.

    Returns:
        `[h, h]` (fewer rows for a vocabulary below `h`), fp32 or wider, on every rank of the group.
    """
    factor = weight.new_empty((0, weight.size(1)), dtype=wide(weight.dtype))
    for rows in weight.detach().split(_VOCABULARY_SLICE):
        factor = torch.linalg.qr(torch.cat([factor, rows.to(factor.dtype)]), mode="r").R
    if groups.tp.size() > 1:
        factor = torch.linalg.qr(joined(factor, groups.tp), mode="r").R
    return factor


@dataclass
class _State:
    """What is done; in a file that is rewritten after every round."""

    rounds: list[dict[int, float]] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    layer_forwards: int = 0
    naive: int = 0


def _read(path: Path, key: Mapping[str, Any]) -> _State:
    """The state of an interrupted ranking.

    Raises:
        CheckpointError: the file is damaged, or of another ranking.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
        before = dict(found.pop("key"))
        found["rounds"] = [{int(number): score for number, score in each.items()} for each in found["rounds"]]
        state = _State(**found)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: no state of a depth ranking ({error!r}): delete it") from error
    different = [name for name in {**key, **before} if key.get(name) != before.get(name)]
    if different:
        told = "; ".join(f"{name}: {before.get(name)!r} there, {key.get(name)!r} here" for name in different)
        raise CheckpointError(
            f"{path} is what an interrupted ranking of another parent or text left ({told}): delete it, or write the "
            "scores to another file"
        )
    return state


def _resumed(path: Path | None, key: Mapping[str, Any]) -> _State:
    """What rank 0 finds in the file, on every rank."""
    found: list[Any] = [_State()]
    if path is not None and torch.distributed.get_rank() == 0 and path.exists():
        try:
            found = [_read(path, key)]
        except CheckpointError as error:
            found = [error]
    torch.distributed.broadcast_object_list(found)
    if isinstance(found[0], CheckpointError):
        raise found[0]
    state: _State = found[0]
    return state


class _Pruned:
    """The parent without the layers removed so far: what enters each of its layers, on every batch."""

    def __init__(self, trunk: Trunk, batches: Sequence[Tensor], removed: Sequence[int]) -> None:
        self.trunk, self.batches = trunk, batches
        self.remaining = [number for number in range(trunk.total) if number not in removed]
        self.factor = triangular_factor(trunk.model.output_layer.weight, trunk.groups) if trunk.last else None
        self.streams: list[Streams] = [{} for _ in batches]
        self.references: list[Tensor | None] = []
        for tokens, streams in zip(batches, self.streams, strict=True):
            final = self._run(tokens, range(trunk.total), _NOTHING, {}, None if removed else streams)
            self.references.append(None if final is None else final.to("cpu"))
        if removed:
            for tokens, streams in zip(batches, self.streams, strict=True):
                self._run(tokens, self.remaining, _NOTHING, {}, streams)
        self.size = self._total(self.references)

    def _run(
        self, tokens: Tensor, numbers: Sequence[int], without: int, streams: Streams, keep: Streams | None
    ) -> Tensor | None:
        """Runs the layers of `numbers` that come after the layer `without`.

        Args:
            tokens: of the batch.
            numbers: layers of the model.
            without: the candidate; `_NOTHING` begins with the embedding.
            streams: what enters this stage's layers.
            keep: takes over what enters the layers that are run; None keeps nothing.

        Returns:
            The final hidden states on the last stage, `[s, b, h]`; None elsewhere.
        """
        trunk = self.trunk
        if without >= trunk.end:
            return None  # a later stage begins
        x = streams[without].to(trunk.device) if without >= trunk.begin else trunk.enter(tokens)
        x = trunk.run(x, [number for number in numbers if number in trunk.layers and number > without], keep)
        if trunk.last:
            return trunk.final(x)
        trunk.leave(x)
        return None

    def _total(self, differences: Iterable[Tensor | None]) -> float:
        """`sum ||W d||^2` over all tokens of all ranks."""
        trunk, found = self.trunk, torch.zeros((), dtype=torch.float64, device=self.trunk.device)
        for difference in differences:
            if difference is not None:
                assert self.factor is not None
                logits = difference.to(self.factor) @ self.factor.t()
                found += logits.square().sum(dtype=torch.float64)
        if not trunk.model.config.sequence_parallel and trunk.groups.tp.rank():
            found.zero_()  # every tensor-parallel rank has the same tokens: one of them counts
        torch.distributed.all_reduce(found)
        return float(found)

    def candidate(self, number: int, keep: bool) -> tuple[float, list[Streams | None]]:
        """The score of the current model without one more layer, and what enters the layers after it then (`keep`)."""
        kept: list[Streams | None] = [{} if keep else None for _ in self.batches]

        def differences() -> Iterator[Tensor | None]:
            batches = zip(self.batches, self.streams, kept, self.references, strict=True)
            for tokens, streams, keep, reference in batches:
                final = self._run(tokens, self.remaining, number, streams, keep)
                if final is None or reference is None or self.factor is None:
                    yield None  # another stage has them
                else:
                    yield reference.to(self.factor) - final.to(self.factor)

        score = self._total(differences()) / self.size
        if not math.isfinite(score):
            raise ElasticError(f"depth ranking: without layer {number} the logits are not finite: {score}")
        return score, kept

    def remove(self, number: int, kept: Sequence[Streams | None]) -> None:
        """Takes the layer out, with what enters the layers after it."""
        self.remaining.remove(number)
        self.streams = [
            {**{n: x for n, x in before.items() if n < number}, **(after or {})}
            for before, after in zip(self.streams, kept, strict=True)
        ]


def _least(scores: Mapping[int, float]) -> list[int]:
    """Layer numbers, least important first; of equal ones the first layer."""
    return sorted(scores, key=lambda number: (scores[number], number))


def planned_forwards(layers: int, rounds: int) -> int:
    """Layers that are run on the whole calibration text."""
    return layers + sum(left * (left - 1) // 2 for left in range(layers, layers - rounds, -1))


def rank_depth(
    model: Any,
    batches: Sequence[Tensor],
    *,
    removals: int,
    method: str = "iterative",
    state: Path | None = None,
    key: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DepthRanking:
    """Orders the layers of a model, least important first; the same on every rank.

    Args:
        model: core's `HybridModel` on the plain spec; this rank's stage of it.
        batches: this data-parallel rank's tokens, each `[b, s]`; equally many on every rank.
        removals: layers that are removed one after the other (iterative); the others are ordered by the last round.
        method: one of `METHODS`.
        state: file that an interrupted ranking goes on from; None keeps none.
        key: what the state is of: parent and calibration text.
        progress: called with the layer forwards done and planned.

    Raises:
        CheckpointError: the state is damaged, or another ranking's.
        ElasticError: a fault in the arguments, or logits that are not finite.
    """
    trunk = Trunk(model)
    rounds = 1 if method == "one-shot" else removals
    if method not in METHODS or not 1 <= rounds < trunk.total or not batches:
        raise ElasticError(
            f"depth ranking, {method}, of {removals} removals: a method of {METHODS}, 1 to {trunk.total - 1} removals "
            "and calibration text are needed"
        )
    key = {**(key or {}), "method": method, "layers": trunk.total}
    done = _resumed(state, key)
    counted = done.layer_forwards

    def forwards() -> int:
        own = torch.tensor(trunk.layer_forwards // len(batches), device=trunk.device)
        return counted + int(summed(own, trunk.groups.pp))

    with trunk.measuring():
        if len(done.rounds) < rounds:
            pruned = _Pruned(trunk, batches, done.removed)
            done.naive = done.naive or trunk.total
        while len(done.rounds) < rounds:
            numbers, scores = list(pruned.remaining), dict[int, float]()
            best: list[Streams | None] = []
            passed = planned_forwards(trunk.total, len(done.rounds))
            for place, number in enumerate(numbers):
                scores[number], kept = pruned.candidate(number, keep=len(done.rounds) + 1 < rounds)
                if number == _least(scores)[0]:
                    best = kept
                passed += len(numbers) - 1 - place
                progress(passed, planned_forwards(trunk.total, rounds))
            done.rounds.append(scores)
            done.naive += len(numbers) * (len(numbers) - 1)
            if method == "iterative":
                done.removed.append(_least(scores)[0])
                pruned.remove(done.removed[-1], best)
            done.layer_forwards = forwards()
            if state is not None and torch.distributed.get_rank() == 0:
                state.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(state, json.dumps({"key": key, **asdict(done)}))
    rest = [number for number in _least(done.rounds[-1]) if number not in done.removed]
    return DepthRanking(method, (*done.removed, *rest), tuple(done.rounds), done.layer_forwards, done.naive)
