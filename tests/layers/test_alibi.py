"""ALiBi against transformers' BLOOM and the published slopes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BloomConfig
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

from minillm.layers import (
    AlibiBias,
    KVCache,
    MultiHeadAttention,
    alibi_bias,
    alibi_slopes,
    causal_mask,
    scaled_dot_product_attention,
)

lengths = st.integers(1, 24)
offsets = st.none() | st.integers(-30, 30)


def test_slopes_of_eight_and_sixteen_heads_are_the_papers():
    assert alibi_slopes(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    torch.testing.assert_close(alibi_slopes(16), torch.tensor([2 ** (-h / 2) for h in range(1, 17)]))


def test_slopes_of_twelve_heads_take_every_other_of_sixteen():
    assert alibi_slopes(12)[:8].tolist() == alibi_slopes(8).tolist()
    assert alibi_slopes(12)[8:].tolist() == alibi_slopes(16)[::2][:4].tolist()


@pytest.mark.parametrize("n_heads", range(1, 130))
def test_slopes_equal_blooms_for_any_number_of_heads(n_heads):
    bloom = build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), n_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(n_heads), bloom, rtol=1e-6, atol=0)
    assert len(set(alibi_slopes(n_heads).tolist())) == n_heads


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), lengths, lengths, offsets, st.booleans())
def test_is_minus_slope_times_distance(n_heads, query_length, key_length, offset, symmetric):
    bias = alibi_bias(n_heads, query_length, key_length, offset=offset, symmetric=symmetric)
    assert bias.shape == (n_heads, query_length, key_length)
    assert bias.dtype is torch.float32
    slopes, first = alibi_slopes(n_heads).tolist(), key_length - query_length if offset is None else offset
    for head in range(n_heads):
        for i in range(query_length):
            for j in range(key_length):
                distance = first + i - j
                distance = abs(distance) if symmetric else max(distance, 0)
                assert bias[head, i, j].item() == pytest.approx(-slopes[head] * distance, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), lengths, st.data(), st.booleans())
def test_a_cached_step_sees_the_last_rows_of_the_full_bias(n_heads, length, data, symmetric):
    last = data.draw(st.integers(1, length))
    full = alibi_bias(n_heads, length, length, symmetric=symmetric)
    step = AlibiBias(n_heads, symmetric=symmetric)(last, length)
    torch.testing.assert_close(step, full[:, length - last :], rtol=0, atol=0)
    row = data.draw(st.integers(0, length - 1))
    here = alibi_bias(n_heads, 1, length, offset=row, symmetric=symmetric)
    torch.testing.assert_close(here[:, 0], full[:, row], rtol=0, atol=0)


@pytest.mark.parametrize("n_heads", [8, 12])
def test_differs_from_blooms_by_a_constant_in_each_row_which_softmax_does_not_see(n_heads):
    length = 50
    ours = alibi_bias(n_heads, length, length)
    bloom = build_alibi_tensor(torch.ones(1, length, dtype=torch.int64), n_heads, torch.float32)
    allowed = causal_mask(length, length)
    constant = alibi_slopes(n_heads)[:, None, None] * torch.arange(length)[:, None]
    torch.testing.assert_close((ours + constant)[:, allowed], bloom.expand_as(ours)[:, allowed])
    scores = torch.randn(n_heads, length, length).masked_fill(~allowed, -math.inf)
    torch.testing.assert_close((scores + ours).softmax(-1), (scores + bloom).softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_heads", [4, 6])
def test_attention_equals_blooms_attention_layer(n_heads, dtype):
    d_model, batch, length = 8 * n_heads, 2, 20
    bloom = BloomAttention(BloomConfig(hidden_size=d_model, n_head=n_heads), layer_idx=0).eval().to(dtype)
    ours = MultiHeadAttention(d_model, n_heads).to(dtype)
    with torch.no_grad():
        for name in ("weight", "bias"):  # BLOOM keeps query, key and value of a head together
            theirs = getattr(bloom.query_key_value, name)
            parts = theirs.view(n_heads, 3, 8, *theirs.shape[1:]).transpose(0, 1)
            getattr(ours.qkv, name).copy_(parts.reshape(theirs.shape))
            getattr(ours.output, name).copy_(getattr(bloom.dense, name))
    x = torch.randn(batch, length, d_model, dtype=dtype)
    kept = torch.ones(batch, length, dtype=torch.int64)
    kept[1, :6] = 0  # padded on the left; there BLOOM counts places from the first real token
    allowed = causal_mask(length, length) & kept[:, None, None, :].bool()
    shut = torch.zeros(batch, 1, length, length, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    expected, probabilities = bloom(
        x, torch.zeros_like(x), build_alibi_tensor(kept, n_heads, dtype), shut, output_attentions=True
    )
    bias = AlibiBias(n_heads)(length, length)
    mask = kept[:, None, None, :].bool()
    got, weights = ours(x, mask=mask, bias=bias, causal=True, return_weights=True)
    fused = ours(x, mask=mask, bias=bias, causal=True)
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    real = kept.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=tolerance)
    torch.testing.assert_close(fused[real], expected[real], rtol=0, atol=tolerance)
    torch.testing.assert_close(
        weights.transpose(1, 2)[real], probabilities.transpose(1, 2)[real], rtol=0, atol=tolerance
    )


def test_steps_from_a_cache_equal_the_whole_text_under_grouped_heads():
    attention, alibi = MultiHeadAttention(24, 6, n_kv_heads=2), AlibiBias(6)
    x = torch.randn(2, 9, 24)
    whole = attention(x, bias=alibi(9, 9), causal=True)
    cache = KVCache(1, 2, 2, 4, 9).layers[0]
    parts, seen = [], 0
    for new in (4, 1, 3, 1):
        seen += new
        parts.append(attention(x[:, seen - new : seen], bias=alibi(new, seen), causal=True, cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_gradients_of_queries_keys_and_values_are_those_of_brute_force():
    q, k, v = (torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    got = scaled_dot_product_attention(q, k, v, bias=alibi_bias(3, 7, 7), causal=True)
    distance = torch.arange(7)[:, None] - torch.arange(7)
    scores = q @ k.mT / 2 - alibi_slopes(3)[:, None, None] * distance
    expected = scores.masked_fill(distance < 0, -math.inf).softmax(-1) @ v
    torch.testing.assert_close(got, expected)
    cotangent = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), cotangent), torch.autograd.grad(expected, (q, k, v), cotangent), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n_heads", [8, 12])
def test_in_bfloat16_distances_keep_the_weights_right_where_key_places_lose_them(n_heads):
    # The weights of the last query of a long text with equal scores are exp(-slope distance) over their sum.
    # Rounding the bias to bfloat16 errs by 2**-9 of it: with distances by at most max(b exp(-b)) 2**-9 = 0.07 % of the
    # weight of the key itself; with key places, by 4 or more in the exponent wherever slope * place is above 1024.
    length = 4096
    exact = alibi_bias(n_heads, 1, length, dtype=torch.float64)[:, 0].softmax(-1)
    relative = alibi_bias(n_heads, 1, length, dtype=torch.bfloat16)[:, 0].double().softmax(-1)
    places = build_alibi_tensor(torch.ones(1, length, dtype=torch.int64), n_heads, torch.bfloat16)[:, 0]
    errors = [(weights - exact).abs().sum(-1) / 2 for weights in (relative, places.double().softmax(-1))]
    assert errors[0].max() < 0.01  # total variation: less than 1 % of the weight is at the wrong key
    assert errors[1][0] > 0.3  # the steepest head cannot tell the last sixteen keys apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_product_is_rounded_once(dtype):
    exact = -alibi_slopes(12).double()[:, None] * torch.arange(2999, -1, -1)
    got = alibi_bias(12, 1, 3000, dtype=dtype)
    assert got.dtype is dtype
    torch.testing.assert_close(got[:, 0], exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    assert got.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_makes_no_other_tensor_of_the_size_of_the_bias(dtype):
    class Sizes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.made = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            storage = out.untyped_storage()
            self.made[storage._cdata] = storage.nbytes()  # a view adds nothing
            return out

    with Sizes() as sizes:
        bias = alibi_bias(8, 256, 512, dtype=dtype)
    largest, *others = sorted(sizes.made.values(), reverse=True)
    assert largest == bias.nbytes
    assert sum(others) < 0.05 * bias.nbytes


def test_there_is_nothing_to_learn_or_to_save_and_slopes_stay_exact():
    alibi = AlibiBias(12).to(torch.bfloat16)
    assert not alibi.state_dict()
    assert not list(alibi.parameters())
    torch.testing.assert_close(alibi(3, 5), alibi_bias(12, 3, 5), rtol=0, atol=0)
    with torch.device("meta"):
        alibi = AlibiBias(12, symmetric=True)
    torch.testing.assert_close(alibi.to_empty(device="cpu")(3, 5), alibi_bias(12, 3, 5, symmetric=True))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: alibi_slopes(0), ValueError, "n_heads must be at least 1, got 0"),
        (lambda: AlibiBias(-2), ValueError, "n_heads must be at least 1, got -2"),
        (lambda: alibi_bias(2, -1, 4), ValueError, "query_length and key_length must be at least 0, got -1 and 4"),
        (lambda: AlibiBias(2)(3, -4), ValueError, "query_length and key_length must be at least 0, got 3 and -4"),
        (lambda: AlibiBias(2)(3.0, 4), TypeError, "query_length must be a whole number, got 3.0"),
        (lambda: AlibiBias(2)(3, 4, offset=True), TypeError, "offset must be a whole number, got True"),
    ],
)
def test_bad_input_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_the_floor_of_the_modules_bias_changes_no_result_and_no_gradient(spread):
    query, key, value = (torch.randn(1, 8, 600, 16) * spread for _ in range(3))
    held = AlibiBias(8)(600, 600)
    assert held.min() == AlibiBias.FLOOR
    assert torch.equal(held, alibi_bias(8, 600, 600).clamp(min=AlibiBias.FLOOR))
    results = []
    for bias in (held, alibi_bias(8, 600, 600)):
        inputs = [t.double().requires_grad_() for t in (query, key, value)]
        out = scaled_dot_product_attention(*inputs, bias=bias.double(), causal=True)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-9, rtol=1e-9)
