"""Cross-attention against torch's nn.MultiheadAttention and the cross-attention of transformers' BART and T5."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BartConfig, T5Config
from transformers.models.bart.modeling_bart import BartAttention
from transformers.models.t5.modeling_t5 import T5Attention

from minillm.layers import CrossAttention, CrossMemory, RotaryEmbedding, scaled_dot_product_attention
from minillm.layers.positions import rotate


def _torch_twin(layer: CrossAttention) -> nn.MultiheadAttention:
    biased = layer.query.bias is not None
    twin = nn.MultiheadAttention(
        layer.d_model, layer.n_heads, bias=biased, kdim=layer.memory_size, vdim=layer.memory_size, batch_first=True
    )
    key, value = layer.key_value.weight.chunk(2)
    pairs = [(twin.out_proj.weight, layer.output.weight)]
    if twin.in_proj_weight is None:  # torch keeps one matrix where all widths are equal
        pairs += [(twin.q_proj_weight, layer.query.weight), (twin.k_proj_weight, key), (twin.v_proj_weight, value)]
    else:
        pairs += [(twin.in_proj_weight, torch.cat([layer.query.weight, key, value]))]
    if biased:
        pairs += [
            (twin.in_proj_bias, torch.cat([layer.query.bias, layer.key_value.bias])),
            (twin.out_proj.bias, layer.output.bias),
        ]
    with torch.no_grad():
        for theirs, ours in pairs:
            theirs.copy_(ours)
    return twin.double()


def _with_random_biases(layer):
    """Biases may start as zeros, which would hide a missing one."""
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 1:
                parameter.normal_()
    return layer.double()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    memory_size=st.sampled_from([None, 7, 30]),
    queries=st.integers(1, 6),
    keys=st.integers(1, 8),
    bias=st.booleans(),
    padded=st.booleans(),
    added=st.booleans(),
)
def test_equals_torchs_multihead_attention(seed, memory_size, queries, keys, bias, padded, added):
    torch.manual_seed(seed)
    layer = _with_random_biases(CrossAttention(12, 3, memory_size=memory_size, bias=bias))
    twin = _torch_twin(layer)
    x = torch.randn(2, queries, 12, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(2, keys, layer.memory_size, dtype=torch.float64, requires_grad=True)
    present = torch.rand(2, keys) > 0.4
    present[:, 0] = True  # torch gives NaN to a query that sees nothing
    scores = torch.randn(3, queries, keys, dtype=torch.float64) if added else None
    padding = torch.zeros(2, keys, dtype=torch.float64).masked_fill(~present, -torch.inf) if padded else None
    by_row = scores.repeat(2, 1, 1) if added else None  # torch wants a bias for each text and head
    expected, expected_weights = twin(
        x, memory, memory, key_padding_mask=padding, attn_mask=by_row, average_attn_weights=False
    )
    mask = present[:, None, None] if padded else None
    out, weights = layer(x, memory, mask=mask, bias=scores, return_weights=True)
    torch.testing.assert_close(weights, expected_weights)
    torch.testing.assert_close(out, expected)
    out = layer(x, memory, mask=mask, bias=scores)
    torch.testing.assert_close(out, expected)

    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, [x, memory, layer.query.weight, layer.key_value.weight], upstream)
    whole = twin.in_proj_weight is not None
    weights_there = [twin.in_proj_weight] if whole else [twin.q_proj_weight, twin.k_proj_weight, twin.v_proj_weight]
    theirs = torch.autograd.grad(expected, [x, memory, *weights_there], upstream)
    torch.testing.assert_close(ours[:2], theirs[:2])
    if whole:
        torch.testing.assert_close(torch.cat(ours[2:]), theirs[2])
    else:
        torch.testing.assert_close(ours[2], theirs[2])
        torch.testing.assert_close(ours[3], torch.cat(theirs[3:]))


def test_equals_barts_cross_attention():
    bart = BartAttention(16, 4, is_decoder=True, config=BartConfig(attn_implementation="eager")).eval()
    layer = _with_random_biases(CrossAttention(16, 4))
    with torch.no_grad():
        for ours, theirs in ((layer.query, bart.q_proj), (layer.output, bart.out_proj)):
            theirs.load_state_dict(ours.state_dict())
        for name in ("weight", "bias"):
            for part, theirs in zip(getattr(layer.key_value, name).chunk(2), (bart.k_proj, bart.v_proj), strict=True):
                getattr(theirs, name).copy_(part)
    bart.double()
    x, memory = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 9, 16, dtype=torch.float64)
    present = torch.arange(9) < torch.tensor([[9], [4]])
    additive = torch.zeros(2, 1, 5, 9, dtype=torch.float64).masked_fill(~present[:, None, None], -torch.inf)
    expected = bart(x, key_value_states=memory, attention_mask=additive)[0]
    torch.testing.assert_close(layer(x, memory, mask=present[:, None, None]), expected)


def test_equals_t5s_cross_attention():
    """T5 has no biases, heads of any width, and leaves the scores unscaled."""
    config = T5Config(d_model=20, num_heads=4, d_kv=6, is_decoder=True, dropout_rate=0.0)
    t5 = T5Attention(config, has_relative_attention_bias=False, layer_idx=0).eval().double()
    layer = CrossAttention(20, 4, head_dim=6, bias=False).double()
    with torch.no_grad():
        layer.query.weight.copy_(t5.q.weight)
        layer.key_value.weight.copy_(torch.cat([t5.k.weight, t5.v.weight]))
        layer.output.weight.copy_(t5.o.weight)
    x, memory = torch.randn(2, 5, 20, dtype=torch.float64), torch.randn(2, 9, 20, dtype=torch.float64)
    expected = t5(x, key_value_states=memory)[0]
    out = layer(x, memory, attend=partial(scaled_dot_product_attention, scale=1.0))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("n_kv_heads", [3, 2, 1])
def test_grouped_heads_equal_full_heads_with_their_keys_repeated(n_kv_heads):
    grouped = _with_random_biases(CrossAttention(24, 6, n_kv_heads=n_kv_heads, head_dim=5, memory_size=10))
    full = CrossAttention(24, 6, head_dim=5, memory_size=10).double()
    full.query, full.output = grouped.query, grouped.output
    with torch.no_grad():
        for name in ("weight", "bias"):
            parts = getattr(grouped.key_value, name).unflatten(0, (2, n_kv_heads, 5))
            getattr(full.key_value, name).copy_(parts.repeat_interleave(6 // n_kv_heads, 1).flatten(0, 2))
    x, memory = torch.randn(2, 4, 24, dtype=torch.float64), torch.randn(2, 7, 10, dtype=torch.float64)
    torch.testing.assert_close(grouped(x, memory), full(x, memory))
    assert grouped.remember(memory).nbytes * 6 == full.remember(memory).nbytes * n_kv_heads


class _Counted(nn.Module):
    """Counts the calls of the map it wraps."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped, self.calls = wrapped, 0

    def forward(self, x):
        self.calls += 1
        return self.wrapped(x)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_a_remembered_memory_is_projected_once_for_any_number_of_decoding_steps(n_kv_heads):
    layer = CrossAttention(16, 4, n_kv_heads=n_kv_heads, memory_size=10)
    rotary = RotaryEmbedding(4)
    x, memory = torch.randn(2, 6, 16), torch.randn(2, 9, 10)
    here, there = rotary.cos_sin(torch.arange(6)), rotary.cos_sin(torch.arange(9))
    whole = layer(x, memory, rotation=here, memory_rotation=there)
    counted = layer.key_value = _Counted(layer.key_value)
    remembered = layer.remember(memory, rotation=there)
    steps = [layer(x[:, [i]], remembered, rotation=rotary.cos_sin(torch.tensor([i]))) for i in range(6)]
    assert counted.calls == 1
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    assert isinstance(remembered, CrossMemory)
    assert remembered.key.shape == remembered.value.shape == (2, n_kv_heads, 9, 4)
    assert remembered.nbytes == 2 * 2 * n_kv_heads * 9 * 4 * 4
    # The memory may be read in training too: all the steps' gradients meet in the one projection.
    (through_steps,) = torch.autograd.grad(torch.cat(steps, 1).square().sum(), counted.wrapped.weight)
    (at_once,) = torch.autograd.grad(whole.square().sum(), counted.wrapped.weight)
    torch.testing.assert_close(through_steps, at_once)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), shift=st.integers(-500, 500))
def test_with_rope_on_both_sides_only_the_distance_of_positions_counts(seed, shift):
    torch.manual_seed(seed)
    layer = CrossAttention(16, 2, n_kv_heads=1).double()
    rotary = RotaryEmbedding(8)

    def turn(positions):  # in float64, to be exact for far positions
        angles = positions.double().unsqueeze(-1) * rotary.inverse_frequency.double()
        return angles.cos(), angles.sin()

    x, memory = torch.randn(2, 3, 16, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    here, there = torch.randint(0, 1000, (2, 3)), torch.randint(0, 1000, (5,))
    out = layer(x, memory, rotation=turn(here), memory_rotation=turn(there))
    moved = layer(x, memory, rotation=turn(here + shift), memory_rotation=turn(there + shift))
    torch.testing.assert_close(out, moved)

    query = layer.query(x).view(2, 3, 2, 8).transpose(1, 2)
    cos, sin = turn(here[:, None])
    key = layer.remember(memory, rotation=turn(there)).key
    scores = rotate(query, cos, sin) @ key.expand(2, 1, 5, 8).mT / 8**0.5
    _, weights = layer(x, memory, rotation=turn(here), memory_rotation=turn(there), return_weights=True)
    torch.testing.assert_close(weights, scores.softmax(-1))


def test_padding_of_the_memory_changes_nothing_and_a_memory_of_padding_gives_the_outputs_bias():
    layer = CrossAttention(16, 4)
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
    lengths = [4, 0]
    present = torch.arange(9) < torch.tensor(lengths)[:, None]
    out = layer(x, memory, mask=present[:, None, None])
    torch.testing.assert_close(out[:1], layer(x[:1], memory[:1, :4]))
    torch.testing.assert_close(out[1], layer.output.bias.expand(5, 16))
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_another_way_to_attend_may_be_given():
    layer = CrossAttention(16, 4, dropout=0.25)
    seen = {}

    def attend(query, key, value, **options):
        seen.update(options, shapes=(query.shape, key.shape, value.shape))
        return torch.zeros(query.shape)

    mask, bias = torch.ones(9, dtype=torch.bool), torch.zeros(4, 1, 9)
    out = layer(torch.randn(2, 5, 16), torch.randn(2, 9, 16), mask=mask, bias=bias, attend=attend)
    torch.testing.assert_close(out, layer.output.bias.expand(2, 5, 16))
    assert seen["shapes"] == ((2, 4, 5, 4), (2, 4, 9, 4), (2, 4, 9, 4))
    assert seen["mask"] is mask
    assert seen["bias"] is bias
    assert seen["dropout"] == 0.25


def test_drops_attention_weights_in_training_only():
    layer = CrossAttention(16, 4, dropout=0.5)
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
    assert not torch.equal(layer(x, memory), layer(x, memory))
    layer.eval()
    assert torch.equal(layer(x, memory), layer(x, memory))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_values_and_gradients_of_full_precision_nearly(dtype):
    layer = CrossAttention(16, 4, n_kv_heads=2, memory_size=10)
    half = CrossAttention(16, 4, n_kv_heads=2, memory_size=10)
    half.load_state_dict(layer.state_dict())
    half.to(dtype)
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 9, 10)
    expected = layer(x, memory)
    out = half(x.to(dtype), memory.to(dtype))
    assert out.dtype is dtype
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    expected.square().sum().backward()
    out.square().sum().backward()
    for ours, full in zip(half.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.float(), full.grad, atol=0.03 * full.grad.abs().max().item(), rtol=0)


def test_a_memory_remembered_in_full_precision_serves_under_autocast():
    layer = CrossAttention(16, 4)
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
    remembered = layer.remember(memory)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, remembered)
    torch.testing.assert_close(out.float(), layer(x, memory), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_heads": 3}, "n_heads must divide d_model"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads must divide n_heads, got n_heads=4, n_kv_heads=3"),
        ({"n_heads": 4, "dropout": 1.0}, "dropout must be in"),
    ],
)
def test_bad_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CrossAttention(16, **arguments)


def test_bad_input_is_refused_by_name():
    layer = CrossAttention(16, 4, memory_size=10)
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 9, 10)
    angles, far = (RotaryEmbedding(4).cos_sin(torch.arange(length)) for length in (5, 9))
    for call, message in (
        (lambda: layer(memory, memory), r"x must be \(batch, seq, d_model=16\), got shape \(2, 9, 10\)"),
        (lambda: layer(x, x), r"memory must be \(batch, seq, memory_size=10\), got shape \(2, 5, 16\)"),
        (lambda: layer(x[0], memory), "x must be"),
        (lambda: layer(x, memory[:1]), "must agree in batch"),
        (lambda: layer(x, memory, memory_rotation=angles), r"memory's rotation must be .* \(9, 2\).*got \(5, 2\)"),
        (lambda: layer(x[:, :4], memory, rotation=angles, memory_rotation=far), r"rotation must be .* \(4, 2\)"),
        (lambda: layer(x, memory, rotation=angles), "rotation turns the queries only: .* the memory's keys too"),
        (lambda: layer(x, layer.remember(memory, rotation=far)), "rotation turns the memory's keys only"),
        (lambda: layer(x, layer.remember(memory), memory_rotation=angles), "memory_rotation must be None"),
        (lambda: layer(x, memory, mask=torch.ones(2, 1, 5, 8, dtype=torch.bool)), "mask must broadcast"),
        (lambda: CrossAttention(16, 4, memory_size=0), "memory_size must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("remembered_in_half", [True, False])
def test_a_memory_serves_inside_and_outside_of_autocast(remembered_in_half):
    layer, x, memory = CrossAttention(16, 4), torch.randn(2, 5, 16), torch.randn(2, 9, 16)
    with torch.no_grad():
        expected = layer(x, memory)
        with torch.autocast("cpu", torch.bfloat16, enabled=remembered_in_half):
            remembered = layer.remember(memory)
        with torch.autocast("cpu", torch.bfloat16, enabled=not remembered_in_half):
            out = layer(x, remembered)
    torch.testing.assert_close(out.float(), expected, atol=0.03, rtol=0.03)
