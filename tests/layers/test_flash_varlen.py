"""Packed sequences give what each gives alone, whatever stands beside it."""

import math
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from minillm.layers import alibi_slopes
from minillm.layers.flash_varlen import flash_attention_varlen


def _packed(
    query_lengths: list[int], key_lengths: list[int], *, heads: tuple[int, int] = (4, 2), value_dim: int = 6
) -> tuple[list[Tensor], list[Tensor]]:
    """Query, key and value, and the offsets of queries and keys."""
    shapes = [
        (heads[0], sum(query_lengths), 8),
        (heads[1], sum(key_lengths), 8),
        (heads[1], sum(key_lengths), value_dim),
    ]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return inputs, [torch.tensor([0, *accumulate(lengths)]) for lengths in (query_lengths, key_lengths)]


def _expected(
    inputs: list[Tensor], offsets: list[Tensor], *, causal: bool, window: int | None, slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All sequences as one, under a matrix that lets each look at its own keys only."""
    query, key, value = inputs
    heads = query.size(0)
    bias = torch.full((heads, query.size(1), key.size(1)), -math.inf, dtype=torch.float64)
    ends = [list(pairwise(offset.tolist())) for offset in offsets]
    for (first, last), (low, high) in zip(*ends, strict=True):
        back = torch.arange(last - first)[:, None] + (high - low) - (last - first) - torch.arange(high - low)
        seen = back >= 0 if causal else torch.ones_like(back, dtype=torch.bool)
        if window is not None:
            seen = seen & (back.abs() < window)
        penalty = torch.zeros(heads, 1, 1) if slopes is None else slopes[:, None, None]
        bias[:, first:last, low:high] = (-penalty.double() * back.abs()).masked_fill(~seen, -math.inf)
    output = F.scaled_dot_product_attention(query[None], key[None], value[None], bias[None], enable_gqa=True)[0]
    scores = query @ key.repeat_interleave(heads // key.size(0), 0).mT / 8**0.5 + bias
    return output, scores.logsumexp(-1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=5),
    st.sampled_from([(1, 1), (4, 2), (4, 1)]),
    st.booleans(),
    st.none() | st.integers(1, 8),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_each_sequence_is_attended_alone(lengths, heads, causal, window, alibi, seed):
    torch.manual_seed(seed)
    inputs, offsets = _packed([q for q, _ in lengths], [k for _, k in lengths], heads=heads)
    slopes = torch.rand(heads[0]) if alibi else None
    output, log_sums = flash_attention_varlen(
        *inputs, *offsets, causal=causal, window=window, alibi_slopes=slopes, return_lse=True, backend="reference"
    )
    expected, expected_log_sums = _expected(inputs, offsets, causal=causal, window=window, slopes=slopes)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_sums, expected_log_sums, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(output)
    for one, other in zip(
        torch.autograd.grad(output, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_every_backend_and_one_set_of_offsets(backend, dtype):
    inputs, (offsets, _) = _packed([5, 1, 0, 9], [5, 1, 0, 9], value_dim=8)
    output = flash_attention_varlen(*inputs, offsets.to(dtype), causal=True, backend=backend)
    expected, _ = _expected(inputs, [offsets, offsets], causal=True, window=None, slopes=None)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(output.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_scores_are_scaled_as_asked(backend):
    (query, key, value), (offsets, _) = _packed([5, 1, 9], [5, 1, 9], value_dim=8)
    output = flash_attention_varlen(query, key, value, offsets, scale=-0.7, backend=backend)
    expected, _ = _expected(
        [-0.7 * 8**0.5 * query, key, value], [offsets, offsets], causal=False, window=None, slopes=None
    )
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_torch_takes_all_sequences_or_none():
    inputs, offsets = _packed([5, 3], [5, 4], value_dim=8)
    with pytest.raises(ValueError, match="3 queries and 4 keys"):
        flash_attention_varlen(*inputs, *offsets, causal=True, backend="torch")
    output = flash_attention_varlen(*inputs, *offsets, causal=True)
    expected, _ = _expected(inputs, offsets, causal=True, window=None, slopes=None)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_one_launch_of_the_kernels_is_all_sequences():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs, offsets = _packed([11, 0, 40], [20, 10, 40], value_dim=8)
    expected, expected_log_sums = _expected(inputs, offsets, causal=True, window=None, slopes=None)
    single = [tensor.detach().float().to(device).requires_grad_() for tensor in inputs]
    packed = flash_attention_varlen(*single, *offsets, causal=True, return_lse=True, backend="triton")
    for one, other in zip(packed, (expected, expected_log_sums), strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(packed[0].sum(), single), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-5, atol=1e-5)


def test_neighbours_are_not_seen():
    inputs, (offsets, _) = _packed([4, 6, 3], [4, 6, 3])
    changed = [tensor.detach().clone() for tensor in inputs]
    for tensor in changed:
        tensor[:, :4] = torch.nan
        tensor[:, 10:] = torch.inf
    one, other = (
        flash_attention_varlen(*tensors, offsets, alibi_slopes=alibi_slopes(4))[:, 4:10]
        for tensors in (inputs, changed)
    )
    assert torch.equal(one, other)


def test_half_precision_keeps_its_dtype():
    inputs, (offsets, _) = _packed([40, 25], [40, 25])
    half = [tensor.detach().bfloat16() for tensor in inputs]
    output, log_sums = flash_attention_varlen(*half, offsets, return_lse=True)
    assert (output.dtype, log_sums.dtype) == (torch.bfloat16, torch.float32)
    expected, _ = _expected(
        [tensor.double() for tensor in half], [offsets, offsets], causal=False, window=None, slopes=None
    )
    torch.testing.assert_close(output.double(), expected, rtol=2e-2, atol=2e-2)


def _call(**change: object) -> dict[str, object]:
    return {
        "query": torch.randn(2, 5, 4),
        "key": torch.randn(2, 5, 4),
        "value": torch.randn(2, 5, 4),
        "query_offsets": torch.tensor([0, 2, 5]),
    } | change


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (_call(query=torch.randn(1, 2, 5, 4)), ValueError, "query must be packed"),
        (_call(key=torch.randn(3, 5, 4), value=torch.randn(3, 5, 4)), ValueError, "multiple of the heads"),
        (_call(query_offsets=torch.tensor([0, 2, 4])), ValueError, "query_offsets must rise from 0 to the 5 tokens"),
        (_call(query_offsets=torch.tensor([1, 5])), ValueError, "query_offsets must rise"),
        (_call(query_offsets=torch.tensor([0, 4, 2, 5])), ValueError, "query_offsets must rise"),
        (_call(query_offsets=torch.tensor([0.0, 5.0])), ValueError, "must be int32 or int64"),
        (_call(query_offsets=torch.tensor([], dtype=torch.int64)), ValueError, "must be int32 or int64"),
        (_call(key_offsets=torch.tensor([0, 5])), ValueError, "as many sequences, got 2 and 1"),
        (
            _call(key=torch.randn(2, 6, 4), value=torch.randn(2, 6, 4)),
            ValueError,
            "for keys too, must rise from 0 to the 6",
        ),
        (_call(window=0), ValueError, "window must be at least 1"),
        (_call(scale=math.nan), ValueError, "scale must be finite, got nan"),
        (_call(alibi_slopes=torch.ones(3)), ValueError, "alibi_slopes must be"),
        (_call(return_lse=1), TypeError, "return_lse must be True or False"),
        (_call(return_lse=True, backend="torch"), ValueError, "log-sum-exp"),
    ],
)
def test_refuses_what_does_not_fit(arguments, error, words):
    with pytest.raises(error, match=words):
        flash_attention_varlen(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_on_a_gpu_too(backend):
    inputs, (offsets, _) = _packed([70, 1, 0, 130], [70, 1, 0, 130], value_dim=8)
    expected, _ = _expected(inputs, [offsets, offsets], causal=True, window=None, slopes=None)
    cuda = [tensor.detach().float().cuda().requires_grad_() for tensor in inputs]
    output = flash_attention_varlen(*cuda, offsets.cuda(), causal=True, backend=backend)
    torch.testing.assert_close(output.cpu().double(), expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(output.sum(), cuda), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-4, atol=1e-4)
