"""Reads pickled values without trusting them: plain ones are kept, and nothing that they name is imported or run."""

import io
import pickle
from argparse import Namespace
from typing import Any

import torch


class _Foreign:
    """Stands for an object of a class that is not known here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes anything."""

    def __call__(self, *args: Any, **kwargs: Any) -> "_Foreign":
        """Makes another stand-in."""
        return _Foreign()

    def __setstate__(self, state: Any) -> None:
        """Takes anything."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Takes anything."""

    def extend(self, values: Any) -> None:
        """Takes anything."""

    append = extend


class _PlainUnpickler(pickle.Unpickler):
    """Reads plain values; neither runs nor imports what the bytes name."""

    def find_class(self, module: str, name: str) -> Any:
        """The class where it is a plain container or a dtype; a stand-in otherwise."""
        if (module, name) == ("argparse", "Namespace"):
            return Namespace
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        known = vars(torch).get(name) if module == "torch" else None
        # torch.load asks a tensor's storage class for its dtype, even where the tensor is left out.
        if isinstance(known, torch.dtype) or (isinstance(known, type) and name.endswith("Storage")):
            return known
        return type(name, (_Foreign,), {})


class _PlainPickle:
    """What `torch.load` asks of a pickle module."""

    Unpickler = _PlainUnpickler
    __name__ = "pickle"


_DROPPED = object()


def plain(value: Any) -> Any:
    """The value with everything left out that is not a plain value or a container of them."""
    if isinstance(value, Namespace):
        return Namespace(**plain(vars(value)))
    if isinstance(value, dict):
        kept = {key: plain(each) for key, each in value.items()}
        return {key: each for key, each in kept.items() if each is not _DROPPED}
    if isinstance(value, (list, tuple)):
        items = [plain(each) for each in value]
        return _DROPPED if any(each is _DROPPED for each in items) else type(value)(items)
    return value if value is None or type(value) in (bool, int, float, str, torch.dtype) else _DROPPED


def load_plain(source: io.BytesIO) -> Any:
    """What `torch.save` wrote, with everything left out that is no plain value or a container of them."""
    return plain(torch.load(source, map_location="cpu", weights_only=False, pickle_module=_PlainPickle))
