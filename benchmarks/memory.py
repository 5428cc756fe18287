"""Bytes that torch's allocator holds while something runs: what every memory benchmark counts with."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import torch
from torch._C._profiler import _EventType
from torch.autograd.profiler import profile


class Allocations:
    """Every allocation and release of torch's CPU allocator between `with` and its end, in order.

    What was there before is not counted, and neither is its release. The counter sits in the allocator, so temporaries
    inside an operator count too; a kernel's own scratch memory outside the allocator (MKL's, gloo's) does not.
    """

    def __enter__(self) -> Self:
        self._profile = profile(use_kineto=True, profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        found = self._profile.kineto_results
        assert found is not None
        events = [each for each in _flat(found.experimental_event_tree()) if each.tag == _EventType.Allocation]
        fields = [each.extra_fields for each in sorted(events, key=lambda each: each.start_time_ns)]
        self._events = [(each.ptr, each.alloc_size) for each in fields if each.device.type == "cpu"]

    def peak(self, without: Iterable[torch.Tensor] = (), until: torch.Tensor | None = None) -> int:
        """Most bytes held at once.

        Args:
            without: tensors made meanwhile and still alive, whose memory is not counted.
            until: what came after this tensor, made meanwhile and still alive, is not counted.
        """
        left_out = {tensor.untyped_storage().data_ptr() for tensor in without}
        # An address may have been used before: the tensor's own is the last allocation there.
        last = {pointer: index for index, (pointer, size) in enumerate(self._events) if size > 0}
        held, alive, most = dict[int, int](), 0, 0
        for index, (pointer, size) in enumerate(self._events):
            if until is not None and index > last[until.untyped_storage().data_ptr()]:
                break
            if size > 0 and not (pointer in left_out and last[pointer] == index):
                held[pointer] = size
                alive += size
                most = max(most, alive)
            elif size < 0:
                alive -= held.pop(pointer, 0)
        return most


def peak_of(run: Callable[[], object]) -> int:
    """Most bytes that torch's allocator holds while `run` runs, beyond what it held before; a GPU's where there is one.

    What `run` returns is let go at once.
    """
    if not torch.cuda.is_available():
        with Allocations() as found:
            run()
        return found.peak()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def available() -> int:
    """Bytes that can be had without swapping."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def _flat(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _flat(event.children)
