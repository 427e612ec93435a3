"""Flat buckets: DDP's own assignment, and gradients that become views of one flat tensor."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minillm.distributed.buckets import GradientBucket, assign_buckets

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@settings(deadline=None)
@given(
    tensors=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(DTYPES)), max_size=25),
    bucket_bytes=st.integers(1, 300),
    first=st.none() | st.integers(1, 300),
)
def test_ddp_assigns_the_same_buckets(
    tensors: list[tuple[int, torch.dtype]], bucket_bytes: int, first: int | None
) -> None:
    made = [torch.zeros(size, dtype=dtype) for size, dtype in tensors]
    ours = assign_buckets(made, bucket_bytes, first_bucket_bytes=first)
    if made:
        theirs, _ = dist._compute_bucket_assignment_by_size(made, [first or bucket_bytes, bucket_bytes])
        # DDP skips nothing, but sorts by the first member; we by the last, with which a bucket is full.
        assert sorted(ours) == sorted(theirs)
    assert sorted(index for bucket in ours for index in bucket) == list(range(len(made)))
    assert ours == sorted(ours, key=lambda bucket: bucket[-1])
    for bucket in ours:
        assert bucket == sorted(bucket)
        assert len({made[index].dtype for index in bucket}) == 1
        held = sum(made[index].nbytes for index in bucket[:-1])
        assert held < max(bucket_bytes, first or 0)


def test_sizes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^bucket_bytes must be at least 1 byte, got 0"):
        assign_buckets([], 0)
    with pytest.raises(ValueError, match="first_bucket_bytes must be at least 1"):
        assign_buckets([], 1, first_bucket_bytes=-3)


def test_a_full_bucket_is_the_gradients_one_behind_the_other() -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (), (0, 4), (5,))]
    gradients = [torch.randn(parameter.shape) for parameter in parameters]
    bucket = GradientBucket(parameters)
    assert (bucket.n_elements, bucket.missing, bucket.flat) == (12, 4, None)
    for place in (2, 0, 3, 1):
        parameters[place].grad = gradients[place].clone()
        bucket.fill(place, 0.5)
        assert bucket.filled(place)
    assert bucket.missing == 0
    assert bucket.flat is not None
    assert torch.equal(bucket.flat, 0.5 * torch.cat([gradient.flatten() for gradient in gradients]))
    bucket.flat.mul_(4)
    for place, gradient in enumerate(gradients):
        assert torch.equal(bucket.place(place), 2 * gradient)
    bucket.release()
    assert (bucket.missing, bucket.flat, bucket.filled(0)) == (4, None, False)


def test_no_gradient_is_zeros_and_filling_twice_counts_once() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    bucket = GradientBucket([parameter, nn.Parameter(torch.zeros(1))])
    bucket.fill(0, 1.0)
    assert torch.equal(bucket.place(0), torch.zeros(3))
    parameter.grad = torch.ones(3)
    bucket.fill(0, 3.0)
    assert torch.equal(bucket.place(0), torch.full((3,), 3.0))
    assert bucket.missing == 1


@pytest.mark.parametrize(
    ("values", "dense"),
    [
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.zeros(3, 4).t(), True),
        (torch.zeros(1, 4, 3).transpose(1, 2), True),
        (torch.zeros(6, 2)[::2], False),
        (torch.zeros(3, 1).expand(3, 4), False),
    ],
)
def test_a_gradient_has_its_parameters_strides_where_they_are_dense(values: Tensor, dense: bool) -> None:
    parameter = nn.Parameter(values)
    parameter.grad = torch.randn(values.shape)
    bucket = GradientBucket([nn.Parameter(torch.zeros(3)), parameter])
    bucket.fill(1, 1.0)
    view = bucket.place(1)
    assert torch.equal(view, parameter.grad)
    assert view.stride() == (values.stride() if dense else torch.empty(values.shape).stride())
    assert bucket.flat is not None
    assert view.untyped_storage().data_ptr() == bucket.flat.untyped_storage().data_ptr()
    assert torch.equal(bucket.flat[3:].sort().values, parameter.grad.flatten().sort().values)
