"""Rotary positions against transformers' Llama and GPT-J, its RoPE scalings, complex numbers and brute force."""

import copy
import itertools
import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPTJConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gptj.modeling_gptj import GPTJAttention
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_apply
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_apply

from minillm.layers import (
    KVCache,
    LinearScaling,
    Llama3Scaling,
    MultiHeadAttention,
    NTKScaling,
    RotaryEmbedding,
    YarnScaling,
)
from minillm.layers.positions import (
    rope_decay,
    rope_frequencies,
    rope_scaling_from_dict,
    to_half_layout,
    to_interleaved_layout,
)

transformers.utils.logging.set_verbosity_error()  # it warns of scalings that fit no published model

SCALINGS = {
    "none": (None, {"rope_type": "default"}),
    "linear": (LinearScaling(4.0), {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        Llama3Scaling(8.0, 1.0, 4.0, 64),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "yarn": (
        YarnScaling(8.0, 64, beta_fast=16.0, beta_slow=0.5),
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "beta_fast": 16.0,
            "beta_slow": 0.5,
            "original_max_position_embeddings": 64,
        },
    ),
}


def _llama(head_dim, base, parameters, max_positions=512) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_theta": base, **parameters},
    )


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_equals_llamas_in_transformers(scaling, base):
    ours, parameters = SCALINGS[scaling]
    positions = torch.stack([torch.arange(100), torch.arange(400, 500)])
    query, key = torch.randn(2, 4, 100, 32, requires_grad=True), torch.randn(2, 2, 100, 32, requires_grad=True)
    cos, sin = LlamaRotaryEmbedding(_llama(32, base, parameters))(query, positions)
    expected = llama_apply(query, key, cos, sin)
    rotary = RotaryEmbedding(32, base=base, scaling=ours)
    for x, want in zip((query, key), expected, strict=True):
        got = rotary(x, positions)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)  # angles of hundreds, in float32
        upstream = torch.randn_like(want)
        torch.testing.assert_close(
            torch.autograd.grad(got, x, upstream)[0],
            torch.autograd.grad(want, x, upstream, retain_graph=True)[0],
            atol=1e-4,
            rtol=1e-4,
        )


sizes = {
    "head_dim": st.sampled_from([4, 8, 64, 128]),
    "base": st.sampled_from([500.0, 10000.0, 1e6]),
    "factor": st.floats(1.0, 64.0),
    "original": st.sampled_from([64, 2048, 8192, 131072]),
}


def _same(ours, theirs, head_dim, base):
    frequencies, attention_factor = theirs
    torch.testing.assert_close(rope_frequencies(head_dim, base=base, scaling=ours), frequencies, rtol=1e-5, atol=0)
    assert ours.attention_scale == pytest.approx(attention_factor, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    **sizes,
    betas=st.sampled_from([(32.0, 1.0), (16.0, 0.5), (4.0, 3.9), (1000.0, 1.0)]),
    attention_factor=st.sampled_from([None, 0.7]),
    truncate=st.booleans(),
)
def test_yarns_frequencies_and_scale_equal_transformers(
    head_dim, base, factor, original, betas, attention_factor, truncate
):
    parameters = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    parameters |= {"beta_fast": betas[0], "beta_slow": betas[1], "truncate": truncate}
    parameters |= {} if attention_factor is None else {"attention_factor": attention_factor}
    ours = YarnScaling(factor, original, *betas, attention_factor=attention_factor, truncate=truncate)
    _same(ours, ROPE_INIT_FUNCTIONS["yarn"](_llama(head_dim, base, parameters)), head_dim, base)


@settings(max_examples=30, deadline=None)
@given(**sizes)
def test_linear_and_llama3_frequencies_equal_transformers(head_dim, base, factor, original):
    linear = {"rope_type": "linear", "factor": factor}
    _same(LinearScaling(factor), ROPE_INIT_FUNCTIONS["linear"](_llama(head_dim, base, linear)), head_dim, base)
    llama3 = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.5, "high_freq_factor": 6.0}
    theirs = ROPE_INIT_FUNCTIONS["llama3"](
        _llama(head_dim, base, llama3 | {"original_max_position_embeddings": original})
    )
    _same(Llama3Scaling(factor, 1.5, 6.0, original), theirs, head_dim, base)


@settings(max_examples=30, deadline=None)
@given(**sizes, longer=st.floats(1.0, 8.0))
def test_ntk_equals_transformers_dynamic_one_at_the_length_that_has_its_factor(
    head_dim, base, factor, original, longer
):
    length = int(longer * original)
    theirs = ROPE_INIT_FUNCTIONS["dynamic"](
        _llama(head_dim, base, {"rope_type": "dynamic", "factor": factor}, original), seq_len=length
    )
    ours = NTKScaling(factor * length / original - (factor - 1))
    _same(ours, theirs, head_dim, base)
    larger = RotaryEmbedding(head_dim, base=ours.scaled_base(base, head_dim))  # the same function, as it is exported
    torch.testing.assert_close(
        larger.inverse_frequency, rope_frequencies(head_dim, base=base, scaling=ours), rtol=1e-5, atol=0
    )


@settings(max_examples=40, deadline=None)
@given(**sizes, kind=st.sampled_from(["linear", "ntk", "yarn", "llama3"]))
def test_scalings_slow_the_slower_pairs_more_and_none_by_more_than_the_factor(head_dim, base, factor, original, kind):
    scaling = {
        "linear": LinearScaling(factor),
        "ntk": NTKScaling(factor),
        "yarn": YarnScaling(factor, original, truncate=False),
        "llama3": Llama3Scaling(factor, original_context_length=original),
    }[kind]
    plain = rope_frequencies(head_dim, base=base, dtype=torch.float64)
    slower = plain / rope_frequencies(head_dim, base=base, scaling=scaling, dtype=torch.float64)
    assert slower.dtype is torch.float64
    assert 1 - 1e-12 <= slower.min() <= slower.max() <= factor * (1 + 1e-12)
    assert (slower.diff() >= -1e-9).all()
    turns = original * plain / (2 * math.pi)
    at_the_ends = {
        "linear": (torch.zeros_like(turns) > 0, turns > 0),
        "ntk": (turns == turns.max(), turns == turns.min()),
        "yarn": (turns > 32 * 1.01, turns < 1 / 1.01),
        "llama3": (turns > 4, turns < 1),
    }
    kept, slowed = at_the_ends[kind]
    torch.testing.assert_close(slower[kept], torch.ones_like(slower[kept]))
    torch.testing.assert_close(slower[slowed], torch.full_like(slower[slowed], factor))


def test_interleaved_equals_gptjs_in_transformers_and_complex_multiplication():
    x, positions = torch.randn(2, 3, 10, 8), torch.arange(5, 15)
    rotary = RotaryEmbedding(8, interleaved=True)
    cos, sin = rotary.cos_sin(positions)
    expected = gptj_apply(x.transpose(1, 2), sin[None].expand(2, -1, -1), cos[None].expand(2, -1, -1)).transpose(1, 2)
    out = rotary(x, positions)
    torch.testing.assert_close(out, expected)
    angles = torch.outer(positions.double(), 10000.0 ** (-torch.arange(0, 8, 2).double() / 8))
    turned = torch.view_as_complex(x.double().unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(out.double(), torch.view_as_real(turned).flatten(-2), atol=1e-5, rtol=1e-5)


def test_a_gpt_j_layer_runs_here_once_its_rows_are_in_the_half_layout():
    theirs = GPTJAttention(GPTJConfig(n_embd=24, n_head=3, rotary_dim=8, n_positions=32), layer_idx=0).eval()
    ours = MultiHeadAttention(24, 3, bias=False)
    with torch.no_grad():
        query, key, value = ours.qkv.weight.split(ours.qkv_sizes)
        query.copy_(to_half_layout(theirs.q_proj.weight, n_heads=3))
        key.copy_(to_half_layout(theirs.k_proj.weight, n_heads=3))
        value.copy_(theirs.v_proj.weight)
        ours.output.weight.copy_(theirs.out_proj.weight)
    x, positions = torch.randn(2, 7, 24), torch.arange(3, 10)
    triangle = torch.full((7, 7), -torch.inf).triu(1)
    expected, _ = theirs(x, attention_mask=triangle, position_ids=positions.expand(2, -1))
    out = ours(x, rotation=RotaryEmbedding(8).cos_sin(positions), causal=True)
    torch.testing.assert_close(out, expected)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31), heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]), head_dim=st.sampled_from([2, 6, 16])
)
def test_the_other_layout_with_rows_moved_gives_equal_scores(seed, heads, head_dim):
    torch.manual_seed(seed)
    (n_heads, n_kv_heads), size = heads, 10
    query, key = torch.nn.Linear(size, n_heads * head_dim), torch.nn.Linear(size, n_kv_heads * head_dim)
    x, positions = torch.randn(2, 5, size), torch.randint(0, 1000, (2, 5))

    def scores(query, key, interleaved):
        rotary = RotaryEmbedding(head_dim, interleaved=interleaved)
        q = rotary(query(x).unflatten(-1, (n_heads, head_dim)).transpose(1, 2), positions)
        k = rotary(key(x).unflatten(-1, (n_kv_heads, head_dim)).transpose(1, 2), positions)
        return q @ k.repeat_interleave(n_heads // n_kv_heads, dim=1).mT

    expected = scores(query, key, interleaved=True)
    for layer, count in ((query, n_heads), (key, n_kv_heads)):
        for parameter in layer.parameters():
            before = parameter.data
            parameter.data = to_half_layout(before, n_heads=count)
            assert torch.equal(to_interleaved_layout(parameter.data, n_heads=count), before)
    torch.testing.assert_close(scores(query, key, interleaved=False), expected, atol=1e-4, rtol=1e-4)

    heads_of_x = torch.randn(2, n_heads, 5, head_dim)
    neighbours = RotaryEmbedding(head_dim, interleaved=True)(heads_of_x, positions)
    halves = RotaryEmbedding(head_dim)(to_half_layout(heads_of_x), positions)
    assert torch.equal(to_interleaved_layout(halves), neighbours)
    assert torch.equal(to_half_layout(neighbours), halves)


def test_the_way_of_metas_llama_files_to_transformers():
    """transformers' conversion script: view (heads, head_dim / 2, 2, d_model), change the middle two, flatten."""
    heads, head_dim, d_model = 3, 8, 5
    weight = torch.randn(heads * head_dim, d_model)
    moved = torch.empty_like(weight)
    for row in range(heads * head_dim):
        head, place = divmod(row, head_dim)
        moved[head * head_dim + place % 2 * (head_dim // 2) + place // 2] = weight[row]
    assert torch.equal(to_half_layout(weight, n_heads=heads), moved)
    assert torch.equal(
        moved, weight.view(heads, head_dim // 2, 2, d_model).transpose(1, 2).reshape(heads * head_dim, d_model)
    )
    assert to_half_layout(torch.arange(6)).tolist() == [0, 2, 4, 1, 3, 5]
    assert to_interleaved_layout(torch.arange(6)).tolist() == [0, 3, 1, 4, 2, 5]


SCALED = [None, LinearScaling(4.0), NTKScaling(4.0), YarnScaling(4.0, 512), Llama3Scaling(4.0)]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shift=st.integers(-(10**6), 10**6),
    interleaved=st.booleans(),
    scaling=st.sampled_from(SCALED),
)
def test_scores_depend_on_the_difference_of_positions_only_and_lengths_stay(seed, shift, interleaved, scaling):
    torch.manual_seed(seed)
    query, key = torch.randn(2, 3, 6, 16, dtype=torch.float64), torch.randn(2, 3, 9, 16, dtype=torch.float64)
    rotary = RotaryEmbedding(16, interleaved=interleaved, scaling=scaling)
    here, there = torch.randint(0, 1000, (6,)), torch.randint(0, 1000, (9,))  # two texts, as in cross-attention
    scores = rotary(query, here) @ rotary(key, there).mT
    shifted = rotary(query, here + shift) @ rotary(key, there + shift).mT
    torch.testing.assert_close(scores, shifted, atol=1e-8, rtol=1e-8)
    scale = 1.0 if scaling is None else scaling.attention_scale
    torch.testing.assert_close(rotary(query, here).norm(dim=-1), query.norm(dim=-1) * scale)
    # And on the difference it does depend, in the way of the formula.
    angle = (here[:, None] - there).unsqueeze(-1) * rope_frequencies(16, scaling=scaling, dtype=torch.float64)
    q, k = (x if interleaved else to_interleaved_layout(x) for x in (query, key))
    q, k = (torch.view_as_complex(x.unflatten(-1, (8, 2))) for x in (q, k))
    products = q.unsqueeze(-2) * k.conj().unsqueeze(-3) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(scores, products.sum(-1).real * scale**2, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("position", "error"), [(4096, 2.5e-4), (131072, 8e-3)])
def test_float32_angles_are_as_wrong_far_out_as_the_documentation_says(position, error):
    rotary = RotaryEmbedding(128)
    positions = torch.arange(position - 1024, position)
    exact = torch.outer(positions.double(), 10000.0 ** (-torch.arange(0, 128, 2).double() / 128))
    for got, want in zip(rotary.cos_sin(positions), (exact.cos(), exact.sin()), strict=True):
        assert error / 10 < (got.double() - want).abs().max() < error
    for got, want in zip(rotary.cos_sin(positions, dtype=torch.float64), (exact.cos(), exact.sin()), strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), distance=st.integers(-5000, 5000), head_dim=st.sampled_from([2, 8, 128]))
def test_decay_is_the_mean_of_the_partial_sums_and_bounds_every_score(seed, distance, head_dim):
    torch.manual_seed(seed)
    frequencies = [10000.0 ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    sums, partial = [], 0j
    for frequency in frequencies:
        partial += complex(math.cos(distance * frequency), math.sin(distance * frequency))
        sums.append(abs(partial))
    decay = rope_decay(torch.tensor([distance]), head_dim)
    assert decay.item() == pytest.approx(sum(sums) / len(sums), abs=1e-9)

    query, key = torch.randn(2, 1, 1, 1, head_dim, dtype=torch.float64).unbind()
    rotary = RotaryEmbedding(head_dim, interleaved=True)
    score = rotary(query, torch.tensor([distance])) @ rotary(key, torch.tensor([0])).mT
    h = [complex(*query[..., 2 * i : 2 * i + 2].flatten()) * complex(*key[..., 2 * i : 2 * i + 2].flatten()).conjugate()
         for i in range(head_dim // 2)] + [0j]  # fmt: skip
    step = max(abs(after - before) for before, after in itertools.pairwise(h))
    assert abs(score.item()) <= step * decay.item() * (head_dim // 2) + 1e-9


def test_decay_falls_from_its_highest_at_zero_and_later_if_scaled():
    distances = torch.arange(0, 256)
    decay = rope_decay(distances, 128)
    assert decay.dtype is torch.float64
    assert decay.shape == distances.shape
    assert decay[0].item() == 32.5
    assert decay.argmax() == 0
    blocks = decay.view(8, 32).mean(-1)
    assert (blocks.diff() < 0).all()  # 32 at a time it falls, whatever its ripples
    assert (rope_decay(distances, 128, base=1e6)[64:] > decay[64:]).double().mean() > 0.9
    torch.testing.assert_close(rope_decay(4 * distances, 128, scaling=LinearScaling(4.0)), decay)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n_kv_heads=st.sampled_from([1, 2, 4]),
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    start=st.integers(0, 1000),
)
def test_with_grouped_heads_a_cache_at_any_offset_and_padded_rows_give_the_whole_again(seed, n_kv_heads, chunks, start):
    torch.manual_seed(seed)
    layer, rotary = MultiHeadAttention(16, 4, n_kv_heads=n_kv_heads).double(), RotaryEmbedding(4)
    length = sum(chunks)
    x = torch.randn(2, length, 16, dtype=torch.float64)
    whole = layer(x, rotation=rotary.cos_sin(torch.arange(length), dtype=torch.float64), causal=True)

    cache = KVCache(1, 2, n_kv_heads, 4, length, dtype=torch.float64).layers[0]
    pieces, done = [], 0
    with torch.no_grad():
        for chunk in chunks:  # counted from start instead of 0: only differences may count
            positions = torch.arange(start + done, start + done + chunk)
            rotation = rotary.cos_sin(positions, dtype=torch.float64)
            pieces.append(layer(x[:, done : done + chunk], rotation=rotation, causal=True, cache=cache))
            done += chunk
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)

    pads = torch.tensor([2, 0])  # the first row is two tokens shorter, padded on its left
    padded = torch.randn(2, length + 2, 16, dtype=torch.float64)
    padded[0, 2:], padded[1, :length] = x[0], x[1]
    places = torch.arange(length + 2) - pads[:, None]
    rotation = rotary.cos_sin(places, dtype=torch.float64)
    out = layer(padded, rotation=rotation, causal=True, mask=(places >= 0)[:, None, None, :])
    torch.testing.assert_close(out[0, 2:], whole[0])
    torch.testing.assert_close(out[1, :length], whole[1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_half_precision_is_rounded_once_forward_and_backward(dtype, tolerance, interleaved):
    rotary = RotaryEmbedding(8, interleaved=interleaved, scaling=YarnScaling(4.0, 32))
    x = torch.randn(2, 3, 50, 8).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    out, want = rotary(x, torch.arange(50)), rotary(exact, torch.arange(50))
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    want.backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=tolerance, rtol=tolerance)


def test_the_gradient_is_the_turn_back():
    x = torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True)
    rotary, positions = RotaryEmbedding(8), torch.tensor([0, 3, 3, 90, 7])
    upstream = torch.randn_like(x)
    rotary(x, positions).backward(upstream)
    torch.testing.assert_close(x.grad, rotary(upstream, -positions))
    assert torch.autograd.gradcheck(lambda x: rotary(x, positions), x)


def test_frequencies_stay_exact_through_casts_copies_and_meta_and_out_of_the_state():
    rotary = RotaryEmbedding(16, scaling=YarnScaling(2.0, 64))
    exact = rotary.inverse_frequency.clone()
    for moved in (rotary.to(torch.bfloat16), copy.deepcopy(rotary).half(), copy.deepcopy(rotary).double()):
        assert torch.equal(moved.inverse_frequency, exact)
    with torch.device("meta"):
        empty = RotaryEmbedding(16, scaling=YarnScaling(2.0, 64))
    assert torch.equal(empty.to_empty(device="cpu").inverse_frequency, exact)
    assert not rotary.state_dict()
    x = torch.randn(1, 1, 4, 16, dtype=torch.bfloat16)
    assert rotary(x, torch.arange(4)).dtype is torch.bfloat16


@pytest.mark.parametrize("scaling", SCALED[1:])
def test_scalings_go_through_plain_fields(scaling):
    fields = vars(scaling)
    assert fields["kind"] == type(scaling).__name__.removesuffix("Scaling").lower()
    assert rope_scaling_from_dict(dict(fields)) == scaling


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RotaryEmbedding(7), ValueError, "head_dim must be an even number"),
        (lambda: RotaryEmbedding(0), ValueError, "head_dim must be an even number of at least 2"),
        (lambda: RotaryEmbedding(8, base=0), ValueError, "base must be positive, got 0"),
        (lambda: RotaryEmbedding(8, scaling={"type": "yarn"}), TypeError, "YarnScaling or Llama3Scaling, got"),
        (lambda: LinearScaling(0.5), ValueError, "factor must be at least 1 and finite, got 0.5"),
        (lambda: NTKScaling(0.0), ValueError, "factor must be at least 1 and finite, got 0.0"),
        (lambda: YarnScaling(math.inf, 8), ValueError, "factor must be at least 1 and finite, got inf"),
        (lambda: LinearScaling("2"), TypeError, "factor must be a number, got '2'"),
        (lambda: RotaryEmbedding(2, scaling=NTKScaling(2.0)), ValueError, "head_dim must be at least 4 .*, got 2"),
        (lambda: RotaryEmbedding(8, base=1.0, scaling=YarnScaling(2.0, 64)), ValueError, "base must be above 1 for Ya"),
        (lambda: YarnScaling(2.0, 64, 1.0, 1.0), ValueError, "beta_slow must be positive and below beta_fast, got"),
        (lambda: YarnScaling(2.0, 64, 32.0, 0.0), ValueError, "beta_slow must be positive"),
        (lambda: YarnScaling(2.0, 64, attention_factor=0.0), ValueError, "attention_factor must be None or positive"),
        (lambda: YarnScaling(2.0, 64, truncate=1), TypeError, "truncate must be True or False, got 1"),
        (lambda: YarnScaling(2.0, 0), ValueError, "original_context_length must be at least 1, got 0"),
        (lambda: YarnScaling(2.0, 64.0), TypeError, "original_context_length must be an integer, got 64.0"),
        (lambda: Llama3Scaling(8.0, 4.0, 1.0), ValueError, "low_freq_factor must be positive and below"),
        (lambda: Llama3Scaling(original_context_length=0), ValueError, "original_context_length"),
        (
            lambda: rope_scaling_from_dict({"kind": "dynamic"}),
            ValueError,
            r"\['linear', 'llama3', 'ntk', 'yarn'\], got",
        ),
        (
            lambda: rope_scaling_from_dict({"kind": "yarn", "factor": 2.0}),
            ValueError,
            r"missing \['original_context_le",
        ),
        (lambda: rope_scaling_from_dict({"kind": "ntk", "factor": 2, "a": 1}), ValueError, r"unknown \['a'\]"),
        (lambda: LinearScaling(2.0, kind="llama3"), ValueError, "kind of a LinearScaling"),
        (lambda: RotaryEmbedding(8)(torch.zeros(2, 3, 4, 6), torch.arange(4)), ValueError, "head_dim=8"),
        (lambda: RotaryEmbedding(8)(torch.zeros(2, 3, 4, 8), torch.arange(3)), ValueError, r"positions must be \(seq,"),
        (
            lambda: RotaryEmbedding(8).cos_sin(torch.arange(3), dtype=torch.half),
            ValueError,
            "dtype must be torch.float",
        ),
        (lambda: to_half_layout(torch.zeros(2, 5)), ValueError, r"even head_dim, got shape \(2, 5\)"),
        (lambda: to_interleaved_layout(torch.zeros(6), n_heads=2), ValueError, r"got n_heads=2 and shape \(6,\)"),
        (lambda: to_half_layout(torch.zeros(6), n_heads=0), ValueError, "n_heads must be at least 1"),
    ],
)
def test_bad_input_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()
