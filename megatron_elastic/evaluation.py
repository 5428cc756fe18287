"""The loss of a model or of a budget inside its family, on the same tokens in the same order for every one of them."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from megatron_elastic.asked import asked_selection
from megatron_elastic.budget import Selection
from megatron_elastic.checkpoint import find_verified, model_flags, read_family, read_metadata
from megatron_elastic.errors import CheckpointError, CorpusError
from megatron_elastic.metadata import Metadata
from megatron_elastic.standalone import build_elastic_model, build_plain_model, load_weights, single_process

DEFAULT_SEQUENCE_LENGTH = 256
"""Tokens of context where the caller gives none; the same for every model, so that losses can be compared."""


def windows(data: str | Path, sequence_length: int, tokens: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive windows over a data set's documents, joined in file order.

    Args:
        data: prefix of the `.bin` and `.idx` files.
        sequence_length: predictions a window.
        tokens: predictions in all; None for as many whole windows as there are.

    Yields:
        Inputs and labels, `[sequence_length]` int64; the last window may be shorter.

    Raises:
        CorpusError: no such data, or fewer tokens than asked for.
    """
    if not Path(f"{data}.idx").exists() or not Path(f"{data}.bin").exists():
        raise CorpusError(f"{data}: no {data}.bin and {data}.idx: give a data set's prefix (megatron-elastic corpus)")
    dataset = IndexedDataset(str(data))
    text = torch.cat([torch.from_numpy(dataset[number].astype("int64")) for number in range(len(dataset))])
    wanted = (len(text) - 1) // sequence_length * sequence_length if tokens is None else tokens
    if wanted < 1 or wanted > len(text) - 1:
        asked = max(wanted, 1)
        raise CorpusError(f"{data}: {len(text) - 1} predictions there, {asked} asked for: use --tokens or more text")
    for start in range(0, wanted, sequence_length):
        stop = min(start + sequence_length, wanted)
        yield text[start:stop], text[start + 1 : stop + 1]


def unigram_entropy(batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Entropy in nats of the labels under their own frequencies: what a model without context can reach at best."""
    counts = torch.bincount(torch.cat([labels for _, labels in batches])).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def _submodel(path: Path, metadata: Metadata | None, budget: str | None) -> tuple[Any, Selection | None, int]:
    """Builds and loads what is to be judged: the model, its selection inside a family, and its parameters."""
    if metadata is None or metadata.kind != "family":
        if budget is not None:
            raise CheckpointError(f"{path}: --budget {budget!r} is for a family; this is a model of its own")
        flags = model_flags(path) if metadata is None else metadata.flags
        model = build_plain_model(flags, shape=None if metadata is None else metadata.shape)
        load_weights(model, path)
        return model, None, sum(parameter.numel() for parameter in model.parameters())
    name = budget or metadata.budgets[0].name
    selection = asked_selection(path, metadata, name)
    family = metadata.family
    elastic = build_elastic_model(metadata.flags, family)
    load_weights(elastic, path)
    return elastic, selection, int(family.selection_cost(selection))


@torch.no_grad()
def mean_loss(
    model: Any, batches: Iterable[tuple[Tensor, Tensor]], selection: Selection | None = None, batch_size: int = 16
) -> tuple[float, int]:
    """Mean cross entropy in nats per token, and the tokens counted.

    Args:
        model: a stock hybrid model, or an elastic one with a selection.
        batches: inputs and labels `[s]`.
        selection: of the elastic model.
        batch_size: windows run together.
    """
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    pending: list[tuple[Tensor, Tensor]] = []

    def flush() -> float:
        tokens, labels = (torch.stack(side).to(device) for side in zip(*pending, strict=True))
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        if selection is None:
            return float(model(tokens, positions, None, labels=labels).double().sum())
        mask = torch.ones(tokens.shape, device=device)
        return float(model(tokens, positions, selection=selection, labels=labels, loss_mask=mask))

    for tokens, labels in batches:
        if pending and (len(pending) == batch_size or len(pending[0][0]) != len(tokens)):
            total, pending = total + flush(), []
        pending.append((tokens, labels))
        count += len(tokens)
    if pending:
        total += flush()
    return total / count, count


def evaluate(
    checkpoint: str | Path,
    *,
    data: str | Path,
    budget: str | None = None,
    tokens: int | None = None,
    sequence_length: int | None = None,
) -> dict[str, Any]:
    """Judges a family's budget, an extracted model, a sorted parent or a stock Megatron hybrid checkpoint, in fp32.

    Args:
        checkpoint: folder.
        data: prefix of the token data.
        budget: name, for a family (its largest where None).
        tokens: predictions to count (default: all whole windows).
        sequence_length: context in tokens (default 256).

    Returns:
        `loss` (nats per token), `tokens`, `parameters`, `sequence_length`, `unigram_entropy` (of the predicted tokens
        under their own frequencies, nats), and for a family `budget` and `selection`.

    Raises:
        CheckpointError: missing, damaged, foreign, or without that budget.
        CorpusError: no such data.
    """
    path = find_verified(checkpoint)
    metadata = read_metadata(path)
    if metadata is not None and metadata.kind == "family":
        metadata = read_family(path)
    length = sequence_length or DEFAULT_SEQUENCE_LENGTH
    batches = list(windows(data, length, tokens))
    with single_process():
        model, selection, size = _submodel(path, metadata, budget)
        loss, count = mean_loss(model, batches, selection)
    result: dict[str, Any] = {
        "loss": loss,
        "tokens": count,
        "parameters": size,
        "sequence_length": length,
        "unigram_entropy": unigram_entropy(batches),
    }
    if selection is not None:
        assert metadata is not None
        result.update(budget=budget or metadata.budgets[0].name, selection=selection.as_dict())
    return result
