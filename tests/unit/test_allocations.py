"""The counter that the memory benchmarks share."""

import torch

from benchmarks.memory import Allocations

SIZE = 4 * 2**20


def tensor() -> torch.Tensor:
    return torch.empty(2**20)


def test_the_peak_is_what_was_held_at_once() -> None:
    before = tensor()
    with Allocations() as allocations:
        kept, gone = tensor(), tensor()
        del gone, before
        marker = tensor()
        later = tensor()
        del later
    assert SIZE * 3 <= allocations.peak() < SIZE * 3 + 1024
    assert allocations.peak([kept]) == allocations.peak() - SIZE
    assert SIZE * 2 <= allocations.peak(until=marker) < SIZE * 2 + 1024


def test_temporaries_inside_an_operator_and_in_the_backward_count() -> None:
    x = torch.ones(4, 2**18, requires_grad=True)
    with Allocations() as allocations:
        made = x.detach().logsumexp(-1)  # one temporary of the input's size
    assert SIZE <= allocations.peak([made]) < SIZE * 1.1
    with Allocations() as allocations:
        (gradient,) = torch.autograd.grad(x.exp().sum(), x)
    # The exponential, kept for the backward, and the gradient; a few scalars come and go.
    assert 2 * SIZE <= allocations.peak() < 2 * SIZE + 1024
    assert SIZE <= allocations.peak([gradient]) < SIZE + 1024


def test_a_tensor_left_out_may_have_an_address_that_was_used_before() -> None:
    with Allocations() as allocations:
        for _ in range(3):
            kept = tensor()  # the last one is where the first one was
        other = tensor()
        del other
    without = allocations.peak([kept])
    # Two are alive while the loop's next is made; the last one counts for nothing.
    assert SIZE * 2 <= without < SIZE * 2 + 1024
