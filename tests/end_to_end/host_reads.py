"""A hook that counts where this package waits for a device, and what it makes anew in every step.

A wait is a read of a tensor's value, by the file that asks. What core has brought to the host itself, waiting for it,
is read without another wait: on the CPU it is known by where it came from.
"""

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
BUILT = {
    "axes": {"BlockOrder": ("mask_table", "permutation"), "Dimension": ("segments", "permutation")},
    "family": {"SlicePlans": ("_make", "_layer")},
}
"""Module -> class -> what makes masks or lists of indices."""


def count(rank: int, words: Sequence[str], *, out: str, unbrought: int | None = None) -> None:
    """Writes `{iteration: {"file:function:read": calls}}` to `out-rank` when the rank ends its training.

    Args:
        rank, words: as the rank server gives them.
        out: beginning of the file's name.
        unbrought: an iteration in which the tokens of each expert are as if nobody had brought them to the host.
    """
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_elastic import training as elastic_training
    from megatron_elastic.forward_step import JointStep
    from megatron_elastic.layers.moe import ElasticExperts

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
            result = read(tensor, *args, **kwargs)
            if not file.is_relative_to(PACKAGE):
                if name == "cpu":
                    result.on_host = True
            elif seen and not getattr(tensor, "on_host", False):
                seen[max(seen)][f"{file.relative_to(PACKAGE)}:{frame.f_code.co_name}:{name}"] += 1
            return result

        return counted

    for name in READS:
        setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))

    forward = ElasticExperts.forward

    def experts(module: Any, tokens: torch.Tensor, counts: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(module, tokens, counts.clone() if max(seen) == unbrought else counts, *args, **kwargs)

    ElasticExperts.forward = experts  # type: ignore[method-assign]

    def making(name: str, make: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if seen:
                seen[max(seen)][f"made:{name}"] += 1
            return make(*args, **kwargs)

        return counted

    for module, classes in BUILT.items():
        for owner, names in classes.items():
            found = getattr(sys.modules[f"megatron_elastic.{module}"], owner)
            for name in names:
                setattr(found, name, making(f"{owner}.{name}", getattr(found, name)))
    pretrain = elastic_training.pretrain

    def pretrain_counted(*args: Any, **kwargs: Any) -> None:
        # Not before: the CPU's adaptation has put its own there.
        bring = token_dispatcher.maybe_move_tensor_to_cpu

        def brought(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            result = bring(tensor, *args, **kwargs)
            if isinstance(result, torch.Tensor):
                result.on_host = True  # type: ignore[attr-defined]
            return result

        token_dispatcher.maybe_move_tensor_to_cpu = brought
        try:
            pretrain(*args, **kwargs)
        finally:
            token_dispatcher.maybe_move_tensor_to_cpu = bring
            Path(f"{out}-{rank}").write_text(json.dumps(seen))

    elastic_training.pretrain = pretrain_counted
