"""Ranks a parent: its scores on the calibration text of a recipe, in one process or on the ranks of a launcher."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_elastic.backend import FLAG, LOCAL
from megatron_elastic.checkpoint import find_checkpoint
from megatron_elastic.checkpoint.names import INDEX, MANIFEST
from megatron_elastic.config import Recipe
from megatron_elastic.errors import ElasticError
from megatron_elastic.importance.calibration import CalibrationText
from megatron_elastic.importance.scores import DepthRanking, Scores


def _shown(batches: Sequence[Tensor], progress: bool) -> Iterator[Tensor]:
    from tqdm import tqdm

    yield from tqdm(batches, desc="width", unit="batch", disable=not progress)


def _fingerprint(path: Path) -> str:
    """What tells a checkpoint from another one in the same place: of its digests, or without them of its index."""
    file = path / MANIFEST
    return hashlib.sha256((file if file.exists() else path / INDEX).read_bytes()).hexdigest()


def dealt_flags(flags: Mapping[str, Any], samples: Iterable[int], ranks: int) -> dict[str, Any]:
    """Megatron's flags for texts of so many samples that are dealt over data-parallel ranks.

    Where ranks have unequal numbers of tokens, experts need the dispatcher that allows it: core's default one gathers
    equal numbers from every rank.
    """
    return {**flags, "moe-token-dispatcher-type": "alltoall"} if any(n % ranks for n in samples) else dict(flags)


def depth_method(recipe: Recipe, asked: str | None = None) -> str:
    """How layers are ranked: as asked for, or `iterative` where depth is elastic and no order given, else `none`."""
    family = recipe.family
    return asked or ("iterative" if len(family.choices["depth"]) > 1 and not family.depth_ranking else "none")


def removals(recipe: Recipe) -> int:
    """Layers that the smallest choice of `depth` leaves out; where depth is fixed, all but one."""
    choices = recipe.family.choices["depth"]
    return choices[0] - choices[-1] if len(choices) > 1 else choices[0] - 1


def _rank_depth(
    model: Any, batches: Sequence[Tensor], recipe: Recipe, method: str, state: Path, key: dict[str, Any], progress: bool
) -> DepthRanking:
    from tqdm import tqdm

    from megatron_elastic.importance.depth import rank_depth

    with tqdm(desc="depth", unit="layer", disable=not progress) as bar:

        def show(done: int, planned: int) -> None:
            bar.total = planned
            bar.update(done - bar.n)

        return rank_depth(model, batches, removals=removals(recipe), method=method, state=state, key=key, progress=show)


def rank_parent(
    recipe: Recipe, checkpoint: str | Path, out: str | Path, *, depth: str | None = None, progress: bool = False
) -> Scores:
    """Measures the importance of every axis of a parent, and writes it to one file.

    Under a launcher of several ranks the parent is split over them as the recipe says (context-parallel ranks become
    data-parallel ones), and the scores are those of one process up to rounding. On GPUs it runs in bf16 where the
    recipe does, otherwise in fp32. An interrupted depth ranking goes on from `OUT.depth.json`.

    Args:
        recipe: for the parent's flags, the training data, the axes and the calibration settings.
        checkpoint: of the parent.
        out: the file; rank 0 writes it.
        depth: `iterative`, `one-shot` or `none`; None: iterative where the recipe's depth is elastic and it does not
            give the order itself.
        progress: show bars on standard error (rank 0).

    Raises:
        CheckpointError: no checkpoint there, or another parent's; or a state of another depth ranking.
        CorpusError: the training data cannot be used.
        ElasticError: the ranks or the sequences cannot be split as the recipe says.
    """
    path, wanted = find_checkpoint(checkpoint), recipe.calibration

    def opened(samples: int) -> CalibrationText:
        vocab, length = recipe.family.shape.vocab, wanted.sequence_length
        return CalibrationText(recipe.train_data, samples=samples, sequence_length=length, vocab=vocab)

    text, method = opened(wanted.samples), depth_method(recipe, depth)
    depth_text = opened(min(text.samples, wanted.depth_samples))
    import torch
    from megatron.core import parallel_state

    from megatron_elastic.importance.collect import collect_scores
    from megatron_elastic.standalone import build_plain_model, launched, launched_processes, single_process
    from megatron_elastic.training import load_parent

    tp = int(recipe.megatron.get("tensor-model-parallel-size", 1))
    if launched() > 1 and recipe.megatron.get("sequence-parallel") and wanted.sequence_length % tp:
        raise ElasticError(
            f"elastic.calibration.sequence_length {wanted.sequence_length}: with sequence-parallel it must be a "
            f"multiple of tensor-model-parallel-size {tp}"
        )
    channels = recipe.family.choices.get("mamba_head_dim", (None,))[-1]
    key = {
        "samples": text.samples,
        "sequence_length": text.sequence_length,
        "data": text.prefix,
        "checkpoint": str(checkpoint),
        "fingerprint": _fingerprint(path),
    }
    # The windows follow from the data alone; nothing is drawn.
    facts = {**key, "depth_samples": depth_text.samples, "seed": None, "head_channels": channels}
    low = bool(recipe.megatron.get("bf16")) and torch.cuda.is_available()
    with launched_processes(recipe.megatron) if launched() > 1 else single_process():
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        first = torch.distributed.get_rank() == 0
        flags = dealt_flags(recipe.megatron, (text.samples, depth_text.samples), ranks)
        if "E" in str(flags["hybrid-layer-pattern"]):
            flags = {**flags, FLAG: LOCAL}  # experts are scored one by one, and Transformer Engine's run all at once
        model = build_plain_model(flags, torch.bfloat16 if low else torch.float32)
        load_parent(model, path)

        def dealt(whole: CalibrationText) -> list[Tensor]:
            return [whole.tokens(batch) for batch in whole.batches(max(1, wanted.batch_size), rank, ranks)]

        scores = collect_scores(model, _shown(dealt(text), progress and first), facts, head_channels=channels)
        state = Path(f"{out}.depth.json")
        if method != "none":
            key["samples"] = depth_text.samples
            order = _rank_depth(model, dealt(depth_text), recipe, method, state, key, progress and first)
            scores = Scores(scores.hidden, scores.layers, scores.calibration, order)
        faults = scores.faults(recipe.family.shape)
        if faults:
            raise ElasticError(f"importance: {'; '.join(faults[:5])}")
        if first:
            scores.save(out)
            state.unlink(missing_ok=True)
        torch.distributed.barrier()
    return scores
