"""The attention layer against torch's own: outputs, weights and gradients; grouped heads and the cache."""

import copy

import pytest
import torch
from torch import nn

from minillm.layers import KVCache, MultiHeadAttention, RotaryEmbedding, scaled_dot_product_attention


def _torch_twin(layer: MultiHeadAttention, d_model: int) -> nn.MultiheadAttention:
    twin = nn.MultiheadAttention(d_model, layer.n_heads, bias=layer.qkv.bias is not None, batch_first=True)
    pairs = [(twin.in_proj_weight, layer.qkv.weight), (twin.out_proj.weight, layer.output.weight)]
    if layer.qkv.bias is not None:
        pairs += [(twin.in_proj_bias, layer.qkv.bias), (twin.out_proj.bias, layer.output.bias)]
    with torch.no_grad():
        for theirs, ours in pairs:
            theirs.copy_(ours)
    return twin


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_layer_equals_torchs_multihead_attention(bias, causal):
    layer = MultiHeadAttention(24, 3, bias=bias)
    twin = _torch_twin(layer, 24)
    x = torch.randn(2, 9, 24, requires_grad=True)
    mask = nn.Transformer.generate_square_subsequent_mask(9) if causal else None
    expected, expected_weights = twin(x, x, x, attn_mask=mask, average_attn_weights=False)
    out, weights = layer(x, causal=causal, return_weights=True)
    torch.testing.assert_close(weights, expected_weights)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer(x, causal=causal), expected, atol=1e-6, rtol=1e-5)
    layer(x, causal=causal).square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(layer.qkv.weight.grad, twin.in_proj_weight.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.output.weight.grad, twin.out_proj.weight.grad, atol=1e-5, rtol=1e-4)


def test_grouped_heads_equal_full_heads_with_their_keys_repeated():
    grouped = MultiHeadAttention(24, 6, n_kv_heads=2, head_dim=5)
    full = MultiHeadAttention(24, 6, head_dim=5)
    with torch.no_grad():
        for theirs, ours in ((full.qkv.weight, grouped.qkv.weight), (full.qkv.bias, grouped.qkv.bias)):
            query, key, value = ours.split(grouped.qkv_sizes)
            repeated = [t.unflatten(0, (2, 5)).repeat_interleave(3, 0).flatten(0, 1) for t in (key, value)]
            theirs.copy_(torch.cat([query, *repeated]))
    full.output = copy.deepcopy(grouped.output)
    x = torch.randn(2, 9, 24)
    torch.testing.assert_close(grouped(x, causal=True), full(x, causal=True))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("chunks", [[9], [1] * 9, [4, 1, 3, 1]])
def test_a_cache_filled_in_pieces_gives_what_one_pass_gives(kv_heads, chunks):
    layer = MultiHeadAttention(16, 4, n_kv_heads=kv_heads)
    rotary = RotaryEmbedding(4)
    x = torch.randn(2, 9, 16)
    whole = layer(x, rotation=rotary.cos_sin(torch.arange(9)), causal=True)
    cache = KVCache(1, 2, kv_heads, 4, capacity=9).layers[0]
    pieces, start = [], 0
    with torch.no_grad():
        for size in chunks:
            rotation = rotary.cos_sin(torch.arange(start, start + size))
            pieces.append(layer(x[:, start : start + size], rotation=rotation, causal=True, cache=cache))
            start += size
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_stay_near_torchs_layer_in_float64(dtype):
    exact, x = nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64), torch.randn(2, 11, 32).double()
    layer = MultiHeadAttention(32, 4)
    with torch.no_grad():
        for theirs, ours in (
            (exact.in_proj_weight, layer.qkv.weight),
            (exact.in_proj_bias, layer.qkv.bias),
            (exact.out_proj.weight, layer.output.weight),
            (exact.out_proj.bias, layer.output.bias),
        ):
            theirs.copy_(ours)
    layer = layer.to(dtype)
    inputs = [x.to(kind, copy=True).requires_grad_() for kind in (torch.float64, dtype)]
    mask = nn.Transformer.generate_square_subsequent_mask(11, dtype=torch.float64)
    expected, out = exact(inputs[0], inputs[0], inputs[0], attn_mask=mask)[0], layer(inputs[1], causal=True)
    assert out.dtype is dtype
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    out.backward(upstream.to(dtype))
    torch.testing.assert_close(inputs[1].grad.double(), inputs[0].grad, atol=2 * tolerance, rtol=tolerance)


def test_whatever_is_called_like_attention_can_attend():
    layer = MultiHeadAttention(16, 4, n_kv_heads=2, dropout=0.3)
    x, bias = torch.randn(2, 5, 16), torch.randn(4, 5, 5)
    given = []

    def attend(query, key, value, **how):
        given.append(((query.shape, key.shape, value.shape), how))
        return scaled_dot_product_attention(query, key, value, **how)

    layer.eval()
    assert torch.equal(layer(x, bias=bias, causal=True, attend=attend), layer(x, bias=bias, causal=True))
    shapes, how = given[0]
    assert shapes == ((2, 4, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4))
    assert how == {"mask": None, "bias": bias, "causal": True, "dropout": 0.0, "return_weights": False}
    layer.train()
    layer(x, attend=attend)
    assert given[1][1]["dropout"] == 0.3


def test_layer_drops_attention_weights_in_training_only():
    layer = MultiHeadAttention(16, 4, dropout=0.5)
    x = torch.randn(2, 9, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_heads": 3}, "n_heads must divide d_model"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads must divide n_heads, got n_heads=4, n_kv_heads=3"),
        ({"n_heads": 4, "dropout": -0.1}, "dropout must be in"),
        ({"n_heads": 4, "head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"n_heads": 0}, "d_model and n_heads must be at least 1, got 16 and 0"),
    ],
)
def test_layer_refuses_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(16, **arguments)


@pytest.mark.parametrize(
    ("x", "angles", "message"),
    [
        ((5, 16), (5, 4), r"x must be \(batch, seq, d_model=16\), got shape \(5, 16\)"),
        ((2, 5, 8), (5, 4), "x must be"),
        ((2, 5, 16), (5, 1), r"rotation must be .* shape \(5, 4\) or \(2, 5, 4\), got \(5, 1\)"),
        ((2, 5, 16), (1, 4), "rotation must be"),
        ((2, 5, 16), (3, 5, 4), "rotation must be"),
    ],
)
def test_layer_refuses_inputs_and_angles_that_would_be_broadcast(x, angles, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(16, 2)(torch.zeros(x), rotation=(torch.ones(angles), torch.zeros(angles)))
