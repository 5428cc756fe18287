"""Ranks a parent: its scores on the calibration text of a recipe."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megatron_elastic.checkpoint import find_checkpoint
from megatron_elastic.config import Recipe
from megatron_elastic.importance.calibration import CalibrationText
from megatron_elastic.importance.scores import Scores


def _shown(batches: Iterator[Tensor], samples: int, progress: bool) -> Iterator[Tensor]:
    from tqdm import tqdm

    with tqdm(total=samples, desc="ranking", unit="sample", disable=not progress) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def rank_parent(recipe: Recipe, checkpoint: str | Path, out: str | Path, progress: bool = False) -> Scores:
    """Measures the importance of every axis of a parent on one process, and writes it to one file.

    Args:
        recipe: for the parent's flags, the training data and the calibration settings.
        checkpoint: of the parent.
        out: the file.
        progress: show a bar on standard error.

    Raises:
        CheckpointError: no checkpoint there, or another parent's.
        CorpusError: the training data cannot be used.
    """
    path, wanted = find_checkpoint(checkpoint), recipe.calibration
    text = CalibrationText(
        recipe.train_data,
        samples=wanted.samples,
        sequence_length=wanted.sequence_length,
        vocab=recipe.family.shape.vocab,
    )
    from megatron_elastic.importance.collect import collect_scores
    from megatron_elastic.standalone import build_plain_model, load_weights, single_process

    facts = {
        "samples": text.samples,
        "sequence_length": text.sequence_length,
        "data": text.prefix,
        "checkpoint": str(checkpoint),
        # The windows follow from the data alone; nothing is drawn.
        "seed": None,
    }
    with single_process():
        model = build_plain_model(recipe.megatron)
        load_weights(model, path)
        scores = collect_scores(model, _shown(text.batches(max(1, wanted.batch_size)), text.samples, progress), facts)
    scores.save(out)
    return scores
