"""When a slice of a weight must be quantised: once for a budget between two steps of the optimizer.

A module that quantises its weight owns a `QuantizedOnce` under the attribute `quantized_once`; what trains tells all of
them together when the weights change. Nothing is kept here: what was made of a slice, its owner keeps.
"""

from collections.abc import Hashable

import torch


class QuantizedOnce:
    """Which slices of one weight were quantised since it last changed.

    Until somebody tells it of a change it says so: then nobody would tell of the next one either, and a kept slice
    could be another weight's.
    """

    def __init__(self) -> None:
        """Starts untold."""
        self._changes = 0
        self._seen: dict[Hashable, int] = {}

    def changed(self) -> None:
        """The weight may be another from now on: every slice is to be quantised at its next use."""
        self._changes += 1

    def first_use(self, kept: Hashable) -> bool | None:
        """Asks once for every use of a slice, before it.

        Args:
            kept: what is kept of the weight (its segments), and whatever else makes a quantised copy another one.

        Returns:
            True: quantise, and keep what was made. False: what was kept is the weight's still. None: quantise for this
            use alone, nobody tells when the weight changes.
        """
        if not self._changes:
            return None
        first = self._seen.get(kept) != self._changes
        self._seen[kept] = self._changes
        return first


def weights_changed(model: torch.nn.Module) -> None:
    """Tells every weight of a model that it may be another: after its weights are loaded, and before every step's end.

    A frozen model (the teacher) is told once, and quantises each weight once.

    Args:
        model: wrapped by data parallelism or not.
    """
    for module in model.modules():
        found = getattr(module, "quantized_once", None)
        if isinstance(found, QuantizedOnce):
            found.changed()
