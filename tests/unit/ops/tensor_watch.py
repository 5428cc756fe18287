"""Counts what tensors an operation makes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class TensorWatch(TorchDispatchMode):
    """Largest storage made while active, and the most bytes of such storages alive at once."""

    def __init__(self):
        super().__init__()
        self.largest = self.peak = 0
        self.made = 0
        self._alive = WeakIdKeyDictionary()
        self._known = set()

    def know(self, *tensors):
        """Storages that were there before and do not count."""
        self._known |= {t.untyped_storage().data_ptr() for t in tensors}
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self._alive[tensor] = None
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
                self.made += 1
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._alive}
        self.peak = max(self.peak, sum(storages.values()))
        return out
