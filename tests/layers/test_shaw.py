"""Shaw et al.'s relative positions against brute force with a vector for each pair, VITS and Wav2Vec2-BERT."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import VitsConfig, Wav2Vec2BertConfig
from transformers.models.vits.modeling_vits import VitsAttention
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertSelfAttention

from minillm.layers import KVCache, MultiHeadAttention, ShawPositions, causal_mask, scaled_dot_product_attention


def shaw(head_dim, max_distance, *, bidirectional=True, dtype=torch.float64):
    layer = ShawPositions(head_dim, max_distance, bidirectional=bidirectional)
    for table in layer.parameters():  # far from 0, so that a wrong row shows
        torch.nn.init.normal_(table)
    return layer.to(dtype)


def heads(batch, n_heads, n_kv_heads, query_length, key_length, head_dim, dtype=torch.float64):
    shapes = [(n_heads, query_length), (n_kv_heads, key_length), (n_kv_heads, key_length)]
    return [torch.randn(batch, *shape, head_dim, dtype=dtype, requires_grad=True) for shape in shapes]


def brute_force(layer, query, key, value, *, mask=None, bias=None, causal=False, scale=None, dropout=0.0, offset=None):
    """Equations 3 and 4 as they stand, with a vector for each pair: (query, key, head_dim)."""
    n_heads, query_length, head_dim = query.shape[1:]
    key, value = (x.repeat_interleave(n_heads // x.size(1), dim=1) for x in (key, value))
    offset = key.size(2) - query_length if offset is None else offset
    distance = torch.arange(key.size(2)) - (torch.arange(query_length)[:, None] + offset)
    k = layer.max_distance
    rows = distance.clamp(-k, k if layer.bidirectional else 0) + k
    scores = torch.einsum("bhid,bhijd->bhij", query, key[:, :, None] + layer.keys[rows])
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    scores = scores.masked_fill(distance > 0, -math.inf) if causal else scores
    blind = (scores == -math.inf).all(-1, keepdim=True)  # sees nothing
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    dropped = F.dropout(weights, dropout) if dropout else weights
    return torch.einsum("bhij,bhijd->bhid", dropped, value[:, :, None] + layer.values[rows]), weights


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 15),
    st.none() | st.integers(-15, 15),
    st.tuples(*[st.booleans()] * 5),
    st.none() | st.floats(0.1, 2.0),
)
def test_equals_brute_force_forward_and_backward(counts, query_length, key_length, k, offset, flags, scale):
    bidirectional, causal, masked, biased, weights_too = flags
    layer = shaw(6, k, bidirectional=bidirectional)
    inputs = heads(2, *counts, query_length, key_length, 6)
    options = {"causal": causal, "offset": offset, "scale": scale}
    if masked:  # each text its own padding
        options["mask"] = torch.rand(2, 1, query_length, key_length) < 0.7
    if biased:
        options["bias"] = torch.randn(counts[0], query_length, key_length, dtype=torch.float64)
    got = layer(*inputs, **options, return_weights=weights_too)
    expected, weights = brute_force(layer, *inputs, **options)
    if weights_too:
        got, got_weights = got
        torch.testing.assert_close(got_weights, weights)
    torch.testing.assert_close(got, expected)
    cotangent = torch.randn_like(got)
    leaves = [*inputs, layer.keys, layer.values]
    ours = torch.autograd.grad(got, leaves, cotangent)
    for a, b in zip(ours, torch.autograd.grad(expected, leaves, cotangent), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_pass_gradcheck():
    inputs, layer = heads(1, 4, 2, 5, 7, 3), shaw(3, 3)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False  # a query that sees nothing

    def attend(query, key, value, keys, values):
        tables = {"keys": keys, "values": values}
        return torch.func.functional_call(layer, tables, (query, key, value), {"mask": mask, "causal": True})

    assert torch.autograd.gradcheck(attend, (*inputs, layer.keys, layer.values))


def test_queries_that_see_nothing_get_zeros_and_no_gradient():
    inputs, layer = heads(2, 4, 2, 5, 6, 8, torch.float32), shaw(8, 3, dtype=torch.float32)
    mask = torch.ones(2, 1, 5, 6, dtype=torch.bool)
    mask[1, :, 3] = False
    bias = torch.zeros(4, 5, 6)
    bias[2, 1] = -math.inf
    out, weights = layer(*inputs, mask=mask, bias=bias, return_weights=True)
    for blind in (out[1, :, 3], weights[1, :, 3], out[:, 2, 1], weights[:, 2, 1]):
        assert not blind.any()
    leaves = [*inputs, *layer.parameters()]
    for gradient in torch.autograd.grad(out.square().sum(), leaves):
        assert gradient.isfinite().all()
    assert not torch.autograd.grad(layer(*inputs, mask=mask).sum(), inputs[0])[0][1, :, 3].any()
    # Without them the gradients of the tables are the same: a blind row takes no part.
    kept = [0, 1, 2, 4]
    some = torch.autograd.grad(layer(*inputs, mask=mask)[1].square().sum(), [*layer.parameters()])
    query = inputs[0][1:, :, kept]
    outs = [layer(query[:, :, n : n + 1], inputs[1][1:], inputs[2][1:], offset=i + 1) for n, i in enumerate(kept)]
    others = torch.autograd.grad(torch.cat(outs, dim=2).square().sum(), [*layer.parameters()])
    for a, b in zip(some, others, strict=True):
        torch.testing.assert_close(a, b)


def test_with_tables_of_zeros_it_is_scaled_dot_product_attention():
    layer = ShawPositions(8, 4)
    with torch.no_grad():
        layer.keys.zero_()
        layer.values.zero_()
    inputs = heads(2, 4, 2, 6, 9, 8, torch.float32)
    mask = torch.rand(2, 1, 6, 9) < 0.6
    for options in ({}, {"causal": True}, {"mask": mask}, {"mask": mask, "causal": True, "scale": 0.3}):
        torch.testing.assert_close(layer(*inputs, **options), scaled_dot_product_attention(*inputs, **options))


@pytest.mark.parametrize("length", [5, 9])
def test_equals_the_attention_of_vits_with_keys_and_values(length):
    # VITS has vectors of 0 beyond its window, Shaw et al. those of the last distance: equal while the window suffices.
    theirs = VitsAttention(VitsConfig(hidden_size=24, num_attention_heads=3, window_size=8)).eval()
    ours, layer = MultiHeadAttention(24, 3), ShawPositions(8, 8)
    with torch.no_grad():
        for name in ("weight", "bias"):
            parts = [getattr(part, name) for part in (theirs.q_proj, theirs.k_proj, theirs.v_proj)]
            getattr(ours.qkv, name).copy_(torch.cat(parts))
            getattr(ours.output, name).copy_(getattr(theirs.out_proj, name))
        layer.keys.copy_(theirs.emb_rel_k[0])
        layer.values.copy_(theirs.emb_rel_v[0])
    x = torch.randn(2, length, 24)
    mask = torch.ones(2, 1, 1, length, dtype=torch.bool)
    mask[1, ..., 3:] = False
    shut = torch.zeros(2, 1, length, length).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected, probabilities = theirs(x, attention_mask=shut, output_attentions=True)
    got, weights = ours(x, mask=mask, attend=layer, return_weights=True)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(weights, probabilities)
    cotangent = torch.randn_like(got)
    got.backward(cotangent)
    expected.backward(cotangent)
    torch.testing.assert_close(layer.keys.grad, theirs.emb_rel_k.grad[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.values.grad, theirs.emb_rel_v.grad[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        ours.qkv.weight.grad,
        torch.cat([part.weight.grad for part in (theirs.q_proj, theirs.k_proj, theirs.v_proj)]),
        rtol=1e-4,
        atol=1e-5,
    )


def test_equals_the_attention_of_wav2vec2_bert_with_keys_beyond_the_clipping_distance():
    config = Wav2Vec2BertConfig(
        hidden_size=24,
        num_attention_heads=3,
        position_embeddings_type="relative_key",
        left_max_position_embeddings=4,
        right_max_position_embeddings=4,
        attn_implementation="eager",
    )
    theirs = Wav2Vec2BertSelfAttention(config).eval()
    ours, layer = MultiHeadAttention(24, 3), ShawPositions(8, 4)
    with torch.no_grad():
        for name in ("weight", "bias"):
            parts = [getattr(part, name) for part in (theirs.linear_q, theirs.linear_k, theirs.linear_v)]
            getattr(ours.qkv, name).copy_(torch.cat(parts))
            getattr(ours.output, name).copy_(getattr(theirs.linear_out, name))
        layer.keys.copy_(theirs.distance_embedding.weight)
        layer.values.zero_()
    x = torch.randn(2, 21, 24)
    mask = torch.ones(2, 1, 1, 21, dtype=torch.bool)
    mask[1, ..., 15:] = False
    shut = torch.zeros(2, 1, 21, 21).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected, probabilities = theirs(x, attention_mask=shut)
    got, weights = ours(x, mask=mask, attend=layer, return_weights=True)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(weights, probabilities)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("k", [3, 40])
def test_steps_from_a_cache_equal_the_whole_text_under_grouped_heads(k, bidirectional):
    attention = MultiHeadAttention(24, 6, n_kv_heads=2)
    layer = shaw(4, k, bidirectional=bidirectional, dtype=torch.float32)
    x = torch.randn(2, 13, 24)
    whole = attention(x, causal=True, attend=layer)
    cache = KVCache(1, 2, 2, 4, 13).layers[0]
    parts, seen = [], 0
    for new in (5, 1, 1, 4, 1, 1):
        seen += new
        parts.append(attention(x[:, seen - new : seen], causal=True, cache=cache, attend=layer))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.data())
def test_a_row_alone_at_its_offset_equals_its_row_in_the_whole(length, k, data):
    row = data.draw(st.integers(0, length - 1))
    layer, (query, key, value) = shaw(4, k), heads(1, 2, 2, length, length, 4)
    for causal in (False, True):
        whole = layer(query, key, value, causal=causal)
        alone = layer(query[:, :, row : row + 1], key, value, causal=causal, offset=row)
        torch.testing.assert_close(alone, whole[:, :, row : row + 1])


def test_depends_on_distances_only_and_not_beyond_the_clipping_distance():
    layer, (query, key, value) = shaw(4, 3), heads(1, 2, 2, 5, 20, 4)
    torch.testing.assert_close(
        layer(query, key[:, :, 2:18], value[:, :, 2:18], offset=4),
        brute_force(layer, query, key, value, offset=6, mask=(torch.arange(20) >= 2) & (torch.arange(20) < 18))[0],
    )  # the text moved by two places
    far = torch.randperm(12)  # keys further away than 3 may be put into any order
    shuffled = torch.cat([far, torch.arange(12, 20)])
    torch.testing.assert_close(layer(query, key, value), layer(query, key[:, :, shuffled], value[:, :, shuffled]))
    near = torch.tensor([*range(14), 15, 14, *range(16, 20)])
    assert not torch.allclose(layer(query, key, value), layer(query, key[:, :, near], value[:, :, near]))


def test_past_only_tables_are_the_past_half_of_bidirectional_ones_under_a_causal_mask():
    both, past = shaw(4, 5), shaw(4, 5, bidirectional=False)
    assert both.keys.shape == both.values.shape == (11, 4)
    assert past.keys.shape == past.values.shape == (6, 4)
    with torch.no_grad():
        past.keys.copy_(both.keys[:6])
        past.values.copy_(both.values[:6])
    inputs = heads(2, 2, 1, 9, 9, 4)
    torch.testing.assert_close(past(*inputs, causal=True), both(*inputs, causal=True))


def test_the_same_weights_are_dropped_for_values_and_for_their_positions():
    layer, inputs = shaw(4, 3), heads(2, 4, 2, 6, 8, 4)
    torch.manual_seed(3)
    got, weights = layer(*inputs, causal=True, dropout=0.4, return_weights=True)
    torch.manual_seed(3)
    expected, undropped = brute_force(layer, *inputs, causal=True, dropout=0.4)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(weights, undropped)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)])
def test_narrow_dtypes_stay_close_to_float64(dtype, tolerance):
    layer, inputs = shaw(8, 5), heads(2, 4, 2, 9, 12, 8)
    narrow_layer, narrow = shaw(8, 5).to(dtype), [x.detach().to(dtype).requires_grad_() for x in inputs]
    with torch.no_grad():
        for table, other in zip(narrow_layer.parameters(), layer.parameters(), strict=True):
            table.copy_(other)
    got, weights = narrow_layer(*narrow, causal=True, return_weights=True)
    expected, expected_weights = layer(*inputs, causal=True, return_weights=True)
    assert got.dtype is weights.dtype is dtype
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(weights.double(), expected_weights, rtol=0, atol=tolerance)
    got.sum().backward()
    expected.sum().backward()
    pairs = [*zip(narrow, inputs, strict=True), *zip(narrow_layer.parameters(), layer.parameters(), strict=True)]
    for mine, exact in pairs:
        assert mine.grad.dtype is dtype
        error = (mine.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert error < 2 * tolerance


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_sums_of_thousands_of_small_weights_do_not_get_stuck_in_bfloat16(device):
    # 4,000 weights of 1/4000 added one by one in bfloat16, as a GPU would, stop growing at 1/8 or so.
    layer = ShawPositions(4, 2).to(device, torch.bfloat16)
    torch.nn.init.ones_(layer.values)
    zeros = torch.zeros(1, 1, 4000, 4, dtype=torch.bfloat16, device=device)
    torch.testing.assert_close(layer(zeros[:, :, :1], zeros, zeros), torch.ones_like(zeros[:, :, :1]))


def test_runs_under_autocast():
    layer, inputs = shaw(8, 4, dtype=torch.float32), heads(2, 4, 2, 7, 7, 8, torch.float32)
    expected = layer(*inputs, causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(*inputs, causal=True)
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.1)
    got.sum().backward()
    assert layer.keys.grad.isfinite().all()


@pytest.mark.parametrize("backward", [False, True])
def test_never_makes_a_vector_for_each_pair(backward):
    batch, n_heads, length, head_dim, k = 2, 4, 96, 64, 16

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    def largest(attend):
        inputs = heads(batch, n_heads, n_heads, length, length, head_dim, torch.float32)
        with Largest() as mode:
            out = attend(*inputs)
            if backward:
                out.sum().backward()
        return mode.elements

    layer = shaw(head_dim, k, dtype=torch.float32)
    scores, vectors = batch * n_heads * length**2, batch * n_heads * length * head_dim
    assert largest(lambda *inputs: layer(*inputs, causal=True)) == max(scores, vectors)
    assert largest(lambda *inputs: brute_force(layer, *inputs, causal=True)[0]) >= scores * head_dim


def test_a_large_table_costs_no_more_than_its_rows_in_reach():
    near, far = shaw(4, 6), shaw(4, 1000)
    with torch.no_grad():
        far.keys[994:1007] = near.keys
        far.values[994:1007] = near.values
    inputs = heads(1, 2, 2, 7, 7, 4)
    torch.testing.assert_close(far(*inputs), near(*inputs))
    far(*inputs).sum().backward()
    assert not far.values.grad[:994].any()
    assert not far.values.grad[1007:].any()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ShawPositions(0, 4), ValueError, "head_dim and max_distance must be at least 1, got 0 and 4"),
        (lambda: ShawPositions(8, 0), ValueError, "head_dim and max_distance must be at least 1, got 8 and 0"),
        (lambda: attend(head_dim=6), ValueError, "must have head_dim=8, got 6 in query and key, 6 in value"),
        (lambda: attend(value_dim=5), ValueError, "must have head_dim=8, got 8 in query and key, 5 in value"),
        (lambda: attend(n_kv_heads=3), ValueError, r"heads of query \(4\) must be a multiple .* \(3\)"),
        (lambda: attend(mask=torch.ones(5, 5)), ValueError, "mask must be boolean"),
        (lambda: attend(mask=torch.ones(3, 5, dtype=torch.bool)), ValueError, "mask must broadcast"),
        (lambda: attend(bias=torch.ones(5, 5, dtype=torch.bool)), ValueError, "bias must be floating point"),
        (lambda: attend(dropout=1.0), ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: attend(offset=1.5), TypeError, "offset must be a whole number, got 1.5"),
    ],
)
def test_bad_input_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


def attend(head_dim=8, value_dim=None, n_kv_heads=2, **options):
    query, key = torch.zeros(1, 4, 5, head_dim), torch.zeros(1, n_kv_heads, 5, head_dim)
    value = torch.zeros(1, n_kv_heads, 5, head_dim if value_dim is None else value_dim)
    return ShawPositions(8, 3)(query, key, value, **options)


def test_causal_mask_and_flag_agree():
    layer, inputs = shaw(4, 3), heads(1, 2, 2, 4, 9, 4)
    torch.testing.assert_close(layer(*inputs, causal=True), layer(*inputs, mask=causal_mask(4, 9)))
