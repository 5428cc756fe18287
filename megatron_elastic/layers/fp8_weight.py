"""The quantised copies of one weight: made once for every slice of it between two steps of the optimizer."""

from collections.abc import Hashable

from torch import Tensor

from megatron_elastic.layers.quantized_once import QuantizedOnce
from megatron_elastic.ops.fp8 import Quantised, quantise_weight
from megatron_elastic.precision import Scaling

_ANY = "any slice"


class QuantisedWeight:
    """What a linear layer keeps of its weight in FP8: a copy of each slice, scaled by the slice's own magnitudes.

    Of a tensor-parallel weight it is the rank's shard that is scaled, as in Transformer Engine.

    Attributes:
        scaling: formats and recipe.
        once: is told when the weight changes.
    """

    def __init__(self, scaling: Scaling) -> None:
        """Starts with nothing kept."""
        self.scaling, self.once = scaling, QuantizedOnce()
        self._made: dict[Hashable, Quantised] = {}

    def of(self, kept: Tensor, slice_: Hashable) -> Quantised:
        """The FP8 copy of a slice.

        Args:
            kept: the slice `[outputs, inputs]`; its values are read where it has no copy of now.
            slice_: which slice that is.
        """
        if self.once.first_use(_ANY):
            self._made.clear()  # also of slices that are not asked for again
        again = self.once.first_use(slice_)
        if again is False:
            return self._made[slice_]
        made = quantise_weight(kept, self.scaling)
        if again:
            self._made[slice_] = made
        return made
