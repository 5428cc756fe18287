import contextlib
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_elastic.ops.sliced_parameter import DummyGradients, packed_again, sliced_parameter, sliced_parameter_ref
from tests.unit.ops.tensor_watch import TensorWatch

ROWS = {"all": None, "prefix": ((0, 4),), "strided": ((0, 2), (4, 7)), "joined": ((0, 3), (3, 8)), "none": ((2, 2),)}
COLUMNS = {"all": None, "prefix": ((0, 3),), "strided": ((1, 2), (3, 5), (5, 6))}


def make_weight(dtype=torch.float64):
    return torch.arange(48, dtype=dtype).view(8, 6).sin().requires_grad_()


def with_main_grad(weight, dtype=None):
    weight.main_grad = torch.ones_like(weight, dtype=dtype or weight.dtype, requires_grad=False)
    weight.grad_added_to_main_grad = False
    return weight


@pytest.mark.parametrize(("rows", "columns"), list(itertools.product(ROWS, COLUMNS)))
def test_equals_index_select(rows, columns):
    segments = ROWS[rows], COLUMNS[columns]
    weight, other, engine = make_weight(), make_weight(), with_main_grad(make_weight())
    packed, expected, in_engine = (
        sliced_parameter(weight, *segments), sliced_parameter_ref(other, *segments), sliced_parameter(engine, *segments)
    )  # fmt: skip
    assert packed.is_contiguous()
    assert torch.equal(packed, expected)
    for out in (packed, expected, in_engine):
        out.square().sum().backward()
    assert torch.equal(weight.grad, other.grad)
    # The same products on top of ones: exact, as autograd adds them in the same way.
    assert torch.equal(engine.main_grad, other.grad + 1)
    assert engine.grad_added_to_main_grad
    assert engine.grad.eq(0).all()


def test_hundreds_of_equal_pieces_are_two_operations():
    # Head channels: a prefix of every head's rows, of z and of x, and the rows of B, C and dt as they are.
    rows = (*((start, start + 3) for start in range(0, 1600, 4)), (1600, 1610))
    weight, other = with_main_grad(torch.randn(1610, 6, requires_grad=True)), torch.randn(1610, 6)
    other.copy_(weight.detach()).requires_grad_()
    packed = sliced_parameter(weight, rows, ((0, 4),))
    expected = sliced_parameter_ref(other, rows, ((0, 4),))
    assert torch.equal(packed, expected)
    seen = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Count():
        sliced_parameter(weight, rows, ((0, 4),)).backward(torch.ones_like(packed))
    expected.sum().backward()
    assert torch.equal(weight.main_grad, other.grad + 1)
    assert seen.count("aten.copy_.default") == seen.count("aten.add_.Tensor") == 2
    # Pieces at uneven distances take one operation each.
    seen.clear()
    uneven = ((0, 2), (3, 5), (9, 11), (12, 13))
    with Count():
        assert torch.equal(sliced_parameter(weight, uneven), sliced_parameter_ref(other, uneven))
    assert seen.count("aten.copy_.default") == 3


def test_another_slice_differs():
    weight = make_weight()
    assert not torch.equal(sliced_parameter(weight, ((0, 4),)), sliced_parameter(weight, ((1, 5),)))
    sliced_parameter(weight, ((0, 4),)).sum().backward()
    assert weight.grad[:4].eq(1).all()
    assert weight.grad[4:].eq(0).all()


def test_contiguous_slices_are_not_copied():
    weight = make_weight()
    for segments in [(), (None, None), (((0, 8),), ((0, 2), (2, 6))), (((2, 5),), None)]:
        packed = sliced_parameter(weight, *segments)
        assert packed.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    assert sliced_parameter(weight, None, ((0, 3),)).untyped_storage().nbytes() == 8 * 3 * 8


def test_one_dimensional_and_three_dimensional_parameters():
    bias = torch.arange(6.0).requires_grad_()
    assert sliced_parameter(bias, ((0, 1), (4, 6))).tolist() == [0, 4, 5]
    kernel = torch.randn(6, 1, 4, requires_grad=True)
    assert torch.equal(sliced_parameter(kernel, ((1, 2), (3, 5))), kernel[[1, 3, 4]])


def test_full_weight_takes_the_same_way():
    weight = with_main_grad(make_weight())
    sliced_parameter(weight).sum().backward()
    assert weight.grad_added_to_main_grad
    assert weight.main_grad.eq(2).all()


def test_budgets_accumulate_and_other_dtypes_are_cast():
    weight = with_main_grad(make_weight(torch.bfloat16), torch.float32)
    sliced_parameter(weight, ((0, 4),)).sum().backward()
    sliced_parameter(weight, ((2, 6),), ((0, 3),)).sum().backward()
    expected = torch.ones(8, 6)
    expected[:4] += 1
    expected[2:6, :3] += 1
    assert torch.equal(weight.main_grad, expected)


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda w: sliced_parameter(w, ((0, 2), (4, 7)), ((1, 3),)), make_weight())


def test_frozen_weight_does_no_gradient_work():
    weight = with_main_grad(make_weight().detach())
    packed = sliced_parameter(weight, ((0, 4),))
    assert not packed.requires_grad
    (packed * torch.ones(4, 6, dtype=packed.dtype, requires_grad=True)).sum().backward()
    assert weight.main_grad.eq(1).all()
    assert not weight.grad_added_to_main_grad


def backward_storage(weight, *segments):
    packed = sliced_parameter(weight, *segments)
    grad = torch.ones_like(packed)
    with TensorWatch().know(grad, *filter(lambda t: t is not None, [getattr(weight, "main_grad", None)])) as watch:
        packed.backward(grad)
    return watch


def test_no_full_size_temporary_beside_main_grad():
    segments = ((0, 16), (64, 80)), ((0, 32),)
    full = 128 * 128 * 4
    weight = torch.randn(128, 128, requires_grad=True)
    assert backward_storage(weight, *segments).largest == full
    with_main_grad(weight)
    # The pool's buffer is made once, and then nothing at all is.
    weight.grad = None
    sliced_parameter(weight, *segments).sum().backward()
    pool = weight.grad
    weight.grad = None
    packed = sliced_parameter(weight, *segments)
    grad = torch.ones_like(packed)
    with TensorWatch().know(grad, weight.main_grad, pool) as watch:
        packed.backward(grad)
    assert watch.made == 0
    assert weight.grad.untyped_storage().data_ptr() == pool.untyped_storage().data_ptr()


@pytest.mark.parametrize("segments", [(((0, 2), (4, 7)), ((1, 3),)), (None, ((0, 4),)), (((0, 4),), None)])
def test_a_slice_that_is_packed_again_is_not_held_and_gives_the_same_gradients(segments):
    x = torch.randn(5, sliced_parameter(make_weight(), *segments).size(1), dtype=torch.float64, requires_grad=True)
    found = []
    for again in (True, False):
        weight, x.grad = with_main_grad(make_weight()), None
        packed = sliced_parameter(weight, *segments)
        is_view = packed.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        with packed_again(packed, weight, *segments) if again else contextlib.nullcontext():
            out = x @ packed.t()
        saved = out.grad_fn._saved_mat2
        assert (saved.data_ptr() == packed.data_ptr()) == (is_view or not again)
        assert torch.equal(saved, packed.t())
        out.square().sum().backward()
        found.append((x.grad, weight.main_grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_dummies_share_one_buffer_of_zeros_a_dtype():
    dummies = DummyGradients()
    first = dummies.like(torch.empty(4, 5))
    second = dummies.like(torch.empty(2, 3))
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert second.shape == (2, 3)
    assert dummies.like(torch.empty(6, 5)).shape == (6, 5)
    other = dummies.like(torch.empty(4, 5, dtype=torch.bfloat16))
    assert other.dtype == torch.bfloat16
    assert other.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
    # Tied embeddings (`zero_out_wgrad`) add it to their gradient.
    assert all(d.eq(0).all() for d in (first, second, other))


@pytest.mark.parametrize("segments", [((0, 9),), ((4, 2),), ((3, 5), (4, 6)), ((-1, 2),)])
def test_bad_segments_are_refused(segments):
    with pytest.raises(ValueError, match="of a dimension of size 8"):
        sliced_parameter(make_weight(), segments)


def test_too_many_segment_lists_are_refused():
    with pytest.raises(ValueError, match="3 segment lists for 2 dimensions"):
        sliced_parameter(make_weight(), None, None, None)
