"""Rotary positions against transformers' Llama and GPT-J and complex numbers."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_apply
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_apply

from minillm.layers import LinearScaling, Llama3Scaling, RotaryEmbedding
from minillm.layers.positions import rope_scaling_from_dict

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
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_equals_llamas_in_transformers(scaling, base):
    ours, parameters = SCALINGS[scaling]
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": base, **parameters},
    )
    positions = torch.stack([torch.arange(100), torch.arange(400, 500)])
    query, key = torch.randn(2, 4, 100, 32, requires_grad=True), torch.randn(2, 2, 100, 32, requires_grad=True)
    cos, sin = LlamaRotaryEmbedding(config)(query, positions)
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


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), shift=st.integers(0, 500), interleaved=st.booleans())
def test_products_depend_on_distance_only_and_lengths_stay(seed, shift, interleaved):
    torch.manual_seed(seed)
    query, key = torch.randn(1, 1, 6, 16), torch.randn(1, 1, 6, 16)
    rotary = RotaryEmbedding(16, interleaved=interleaved)
    here, there = torch.arange(6), torch.arange(6) + shift
    scores = rotary(query, here) @ rotary(key, here).transpose(-1, -2)
    shifted = rotary(query, there) @ rotary(key, there).transpose(-1, -2)
    torch.testing.assert_close(scores, shifted, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(rotary(query, there).norm(dim=-1), query.norm(dim=-1))


def test_frequencies_stay_exact_through_casts_copies_and_meta_and_out_of_the_state():
    rotary = RotaryEmbedding(16)
    exact = rotary.inverse_frequency.clone()
    for moved in (rotary.to(torch.bfloat16), copy.deepcopy(rotary).half(), copy.deepcopy(rotary).double()):
        assert torch.equal(moved.inverse_frequency, exact)
    with torch.device("meta"):
        empty = RotaryEmbedding(16)
    assert torch.equal(empty.to_empty(device="cpu").inverse_frequency, exact)
    assert not rotary.state_dict()
    x = torch.randn(1, 1, 4, 16, dtype=torch.bfloat16)
    assert rotary(x, torch.arange(4)).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RotaryEmbedding(7), ValueError, "head_dim must be an even number"),
        (lambda: RotaryEmbedding(8, base=0), ValueError, "base must be positive, got 0"),
        (lambda: RotaryEmbedding(8, scaling={"type": "yarn"}), TypeError, "LinearScaling or Llama3Scaling, got"),
        (lambda: LinearScaling(0.5), ValueError, "factor must be at least 1, got 0.5"),
        (lambda: Llama3Scaling(8.0, 4.0, 1.0), ValueError, "low_freq_factor must be positive and below"),
        (lambda: Llama3Scaling(original_context_length=0), ValueError, "original_context_length"),
        (lambda: rope_scaling_from_dict({"kind": "yarn"}), ValueError, r"\['linear', 'llama3'\], got 'yarn'"),
        (lambda: LinearScaling(2.0, kind="llama3"), ValueError, "kind of a LinearScaling"),
        (lambda: RotaryEmbedding(8)(torch.zeros(2, 3, 4, 6), torch.arange(4)), ValueError, "head_dim=8"),
        (lambda: RotaryEmbedding(8)(torch.zeros(2, 3, 4, 8), torch.arange(3)), ValueError, r"positions must be \(seq,"),
    ],
)
def test_bad_input_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()
