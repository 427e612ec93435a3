"""T5's relative position bias against transformers' T5: buckets, biases, gradients, whole attention layers."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from minillm.layers import (
    KVCache,
    MultiHeadAttention,
    RelativePositionBias,
    causal_mask,
    scaled_dot_product_attention,
    t5_bucket,
)

T5_ATTENTION = partial(scaled_dot_product_attention, scale=1.0)  # T5 does not divide its scores
shapes = st.tuples(st.booleans(), st.integers(2, 40), st.integers(1, 300)).map(
    lambda drawn: (drawn[0], 2 * drawn[1] if drawn[0] else drawn[1], drawn[1] // 2 + drawn[2])
)  # bidirectional, n_buckets, max_distance


def t5_attention(n_heads, *, decoder, n_buckets=32, max_distance=128):
    config = T5Config(
        d_model=4 * n_heads,
        d_kv=8,
        num_heads=n_heads,
        is_decoder=decoder,
        relative_attention_num_buckets=n_buckets,
        relative_attention_max_distance=max_distance,
        attn_implementation="eager",
    )
    return T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval()


def twins(n_heads, *, decoder, dtype=torch.float32):
    theirs = t5_attention(n_heads, decoder=decoder)
    torch.nn.init.normal_(theirs.relative_attention_bias.weight)  # far from 0, so that a wrong bucket shows
    ours = MultiHeadAttention(4 * n_heads, n_heads, head_dim=8, bias=False)
    positions = RelativePositionBias(n_heads, bidirectional=not decoder)
    with torch.no_grad():
        ours.qkv.weight.copy_(torch.cat([theirs.q.weight, theirs.k.weight, theirs.v.weight]))
        ours.output.weight.copy_(theirs.o.weight)
        positions.weight.copy_(theirs.relative_attention_bias.weight)
    return theirs.to(dtype), ours.to(dtype), positions.to(dtype)


@pytest.mark.parametrize("max_distance", [20, 128, 161, 256, 800, 1000, 5000])
@pytest.mark.parametrize("n_buckets", [4, 8, 16, 32, 64, 128, 320])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_t5s_integer_for_integer(bidirectional, n_buckets, max_distance):
    max_distance = max(max_distance, n_buckets)  # more than have a bucket of their own
    relative = torch.arange(-5000, 5001)
    expected = T5Attention._relative_position_bucket(relative, bidirectional, n_buckets, max_distance)
    got = t5_bucket(relative, bidirectional=bidirectional, n_buckets=n_buckets, max_distance=max_distance)
    assert got.dtype is torch.int64
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("n", "max_distance", "edge"), [(9, 128, 8), (17, 343, 28), (20, 320, 20), (30, 480, 30)])
def test_on_the_edge_of_a_bucket_float32_decides_as_in_t5(n, max_distance, edge):
    # In float64 these distances come out a bucket lower or higher.
    relative = torch.arange(-600, 1)
    expected = T5Attention._relative_position_bucket(relative, False, n, max_distance)
    got = t5_bucket(relative, bidirectional=False, n_buckets=n, max_distance=max_distance)
    assert torch.equal(got, expected)
    exact = n // 2
    wide = exact + int(math.log(edge / exact) / math.log(max_distance / exact) * (n - exact))
    assert abs(got[-1 - edge].item() - wide) == 1


def test_buckets_of_t5_by_hand():
    # 32 buckets, 16 a direction: 0-7 exact, then eight a factor of 16 in distance, that is two each doubling.
    got = t5_bucket(
        torch.tensor([0, -1, -7, -8, -11, -12, -15, -16, -127, -128, -9999, 1, 8, 9999]), bidirectional=True
    )
    assert got.tolist() == [0, 1, 7, 8, 8, 9, 9, 10, 15, 15, 15, 17, 24, 31]


@settings(max_examples=100, deadline=None)
@given(shapes, st.sampled_from([torch.int64, torch.int32, torch.int16]))
def test_buckets_equal_t5s_for_any_shape_of_table(shape, dtype):
    bidirectional, n_buckets, max_distance = shape
    relative = torch.arange(-700, 701, dtype=dtype).view(3, 467)
    expected = T5Attention._relative_position_bucket(relative.long(), bidirectional, n_buckets, max_distance)
    got = t5_bucket(relative, bidirectional=bidirectional, n_buckets=n_buckets, max_distance=max_distance)
    assert torch.equal(got, expected)


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_buckets_grow_with_the_distance_and_keep_the_directions_apart(shape):
    bidirectional, n_buckets, max_distance = shape
    kind = {"bidirectional": bidirectional, "n_buckets": n_buckets, "max_distance": max_distance}
    distances = torch.arange(max_distance + 50)
    left, right = t5_bucket(-distances, **kind), t5_bucket(distances, **kind)
    assert (left.diff() >= 0).all()
    assert left[0] == 0
    half = n_buckets // 2 if bidirectional else n_buckets
    assert (left[max_distance:] == half - 1).all()
    assert torch.equal(left[: half // 2], distances[: half // 2])
    assert torch.equal(right[1:], left[1:] + half) if bidirectional else not right.any()


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize(("query_length", "key_length", "past"), [(40, 40, 0), (3, 300, 297), (1, 9, 8), (7, 20, 0)])
def test_bias_and_its_gradient_equal_t5s(decoder, query_length, key_length, past):
    theirs, _, positions = twins(6, decoder=decoder)
    expected = theirs.compute_bias(query_length, key_length, past_seen_tokens=past)[0]
    got = positions(query_length, key_length, offset=past)
    assert torch.equal(got, expected)
    if past == key_length - query_length:
        assert torch.equal(positions(query_length, key_length), expected)
    cotangent = torch.randn_like(got)
    got.backward(cotangent)
    expected.backward(cotangent)
    torch.testing.assert_close(positions.weight.grad, theirs.relative_attention_bias.weight.grad, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 40), st.integers(1, 40), st.none() | st.integers(-60, 60))
def test_bias_is_the_weight_of_each_pairs_bucket(shape, query_length, key_length, offset):
    bidirectional, n_buckets, max_distance = shape
    kind = {"bidirectional": bidirectional, "n_buckets": n_buckets, "max_distance": max_distance}
    positions = RelativePositionBias(3, **kind)
    first = key_length - query_length if offset is None else offset
    relative = torch.arange(key_length) - (first + torch.arange(query_length)[:, None])
    expected = positions.weight[t5_bucket(relative, **kind)].permute(2, 0, 1)
    assert torch.equal(positions(query_length, key_length, offset=offset), expected)


@settings(max_examples=40, deadline=None)
@given(st.booleans(), st.integers(1, 200), st.data())
def test_a_cached_step_sees_the_last_rows_of_the_full_bias(bidirectional, length, data):
    last, row = data.draw(st.integers(1, length)), data.draw(st.integers(0, length - 1))
    positions = RelativePositionBias(2, bidirectional=bidirectional)
    full = positions(length, length)
    assert torch.equal(positions(last, length), full[:, length - last :])
    assert torch.equal(positions(1, length, offset=row)[:, 0], full[:, row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decoder", [False, True])
def test_attention_equals_t5s_attention_layer_forward_and_backward(decoder, dtype):
    theirs, ours, positions = twins(6, decoder=decoder, dtype=dtype)
    length = 45
    x = torch.randn(2, length, 24, dtype=dtype)
    kept = torch.ones(2, 1, 1, length, dtype=torch.bool)
    kept[1, ..., 30:] = False
    mask = kept & causal_mask(length, length) if decoder else kept
    shut = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    expected, _, probabilities = theirs(x, mask=shut)
    bias = positions(length, length)
    assert bias.dtype is dtype
    got, weights = ours(x, mask=kept, bias=bias, causal=decoder, attend=T5_ATTENTION, return_weights=True)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(weights, probabilities, rtol=0, atol=tolerance)
    if dtype is torch.float32:
        cotangent = torch.randn_like(got)
        ours(x, mask=kept, bias=bias, causal=decoder, attend=T5_ATTENTION).backward(cotangent)
        expected.backward(cotangent)
        theirs_qkv = torch.cat([theirs.q.weight.grad, theirs.k.weight.grad, theirs.v.weight.grad])
        torch.testing.assert_close(ours.qkv.weight.grad, theirs_qkv, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            positions.weight.grad, theirs.relative_attention_bias.weight.grad, rtol=1e-4, atol=1e-4
        )


def test_steps_from_a_cache_equal_t5s():
    theirs, ours, positions = twins(2, decoder=True)
    x = torch.randn(1, 12, 8)
    cache, their_cache = KVCache(1, 1, 2, 8, 12).layers[0], DynamicCache()
    seen = 0
    for new in (5, 1, 1, 4, 1):
        step = x[:, seen : seen + new]
        seen += new
        allowed = causal_mask(new, seen)
        shut = torch.zeros(1, 1, new, seen).masked_fill(~allowed, torch.finfo(torch.float32).min)
        expected = theirs(step, mask=shut, past_key_values=their_cache)[0]
        got = ours(step, bias=positions(new, seen), causal=True, cache=cache, attend=T5_ATTENTION)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RelativePositionBias(0), ValueError, "n_heads must be at least 1, got 0"),
        (lambda: RelativePositionBias(2, n_buckets=7), ValueError, "n_buckets must be even if bidirectional .* got 7"),
        (lambda: RelativePositionBias(2, n_buckets=2), ValueError, "n_buckets must be at least 4 .* got 2"),
        (
            lambda: t5_bucket(torch.tensor(3), bidirectional=False, n_buckets=1),
            ValueError,
            "n_buckets must be at least 2 with bidirectional=False, got 1",
        ),
        (lambda: RelativePositionBias(2, max_distance=8), ValueError, "max_distance must be above 8, .* got 8"),
        (lambda: RelativePositionBias(2, max_distance=0), ValueError, "max_distance must be above 8, .* got 0"),
        (
            lambda: t5_bucket(torch.tensor(3), bidirectional=False, max_distance=16),
            ValueError,
            "max_distance must be above 16, .* got 16",
        ),
        (lambda: t5_bucket(torch.tensor(3.0), bidirectional=True), TypeError, "must be integers, got torch.float32"),
        (lambda: RelativePositionBias(2)(-1, 4), ValueError, "query_length and key_length must be at least 0, got -1"),
        (lambda: RelativePositionBias(2)(1, 4, offset=0.5), TypeError, "offset must be a whole number, got 0.5"),
    ],
)
def test_bad_input_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()
