"""A hook that counts how many weights are quantised in every step."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def count(rank: int, words: Sequence[str], *, out: str) -> None:
    """Writes `{iteration: weights}` to `out-rank` when the rank ends its training; evaluation after a step is its."""
    from megatron_elastic import training as elastic_training
    from megatron_elastic.forward_step import JointStep
    from megatron_elastic.layers import fp8_weight

    seen: Counter[int] = Counter()
    now = [0]
    begin, quantise, pretrain = JointStep._begin, fp8_weight.quantise_weight, elastic_training.pretrain

    def begin_counted(step: JointStep, iteration: int) -> None:
        now[0] = iteration
        begin(step, iteration)

    def quantise_counted(*args: Any) -> Any:
        seen[now[0]] += 1
        return quantise(*args)

    def pretrain_counted(*args: Any, **kwargs: Any) -> None:
        try:
            pretrain(*args, **kwargs)
        finally:
            Path(f"{out}-{rank}").write_text(json.dumps(seen))

    JointStep._begin = begin_counted  # type: ignore[method-assign]
    fp8_weight.quantise_weight = quantise_counted
    elastic_training.pretrain = pretrain_counted
