"""A hook that counts where this package waits for a device: every read of a tensor's value, by the file that asks."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import megatron_elastic

PACKAGE = Path(megatron_elastic.__file__).parent
READS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")
"""Of a tensor on a device each of them waits for it."""


def count(rank: int, words: Sequence[str], *, out: str) -> None:
    """Writes `{iteration: {"file:function:read": calls}}` to `out-rank` when the rank ends its training."""
    from megatron_elastic import training as elastic_training
    from megatron_elastic.forward_step import JointStep

    seen: dict[int, Counter[str]] = {}
    begin = JointStep._begin

    def begin_counted(step: JointStep, iteration: int) -> None:
        seen.setdefault(iteration, Counter())
        begin(step, iteration)

    JointStep._begin = begin_counted  # type: ignore[method-assign]

    def watched(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            while frame.f_back is not None and Path(frame.f_code.co_filename) == PACKAGE / "cpu" / "adaptation.py":
                frame = frame.f_back  # it stands around torch's constructors, whoever calls them
            file = Path(frame.f_code.co_filename)
            if seen and file.is_relative_to(PACKAGE):
                seen[max(seen)][f"{file.relative_to(PACKAGE)}:{frame.f_code.co_name}:{name}"] += 1
            return read(tensor, *args, **kwargs)

        return counted

    for name in READS:
        setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
    pretrain = elastic_training.pretrain

    def pretrain_counted(*args: Any, **kwargs: Any) -> None:
        try:
            pretrain(*args, **kwargs)
        finally:
            Path(f"{out}-{rank}").write_text(json.dumps(seen))

    elastic_training.pretrain = pretrain_counted
