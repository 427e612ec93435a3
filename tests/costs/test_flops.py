"""Closed forms against torch's FLOP counter, which watches the products as they run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minillm.costs import (
    decode_flops_per_token,
    forward_flops,
    forward_flops_per_token,
    kv_cache_bytes_per_token,
    parameters,
    training_flops,
)
from minillm.models import Transformer, TransformerConfig, presets

configs = st.builds(
    lambda kv_heads, **fields: TransformerConfig(
        vocab_size=29, context_length=12, n_heads=4, n_kv_heads=kv_heads, **fields
    ),
    kv_heads=st.sampled_from([4, 2, 1]),
    d_model=st.sampled_from([8, 16]),
    n_layers=st.integers(1, 3),
    head_dim=st.sampled_from([None, 6]),
    positions=st.sampled_from(["learned", "rope", "shaw", "t5", "alibi"]),
    relative_distance=st.just(6),
    relative_buckets=st.just(4),
    window=st.sampled_from([None, 1, 5]),
    activation=st.sampled_from(["gelu", "swiglu"]),
    bias=st.booleans(),
    tied_embeddings=st.booleans(),
)


def _counted(run) -> int:
    # The written-out kernel: the counter knows its products; torch's fused CPU kernel it does not see.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@settings(max_examples=25, deadline=None)
@given(config=configs, batch=st.integers(1, 3), seq=st.integers(1, 12))
def test_forward_and_training_equal_the_products_that_ran(config, batch, seq):
    model = Transformer(config)
    tokens = torch.randint(0, 29, (batch, seq))
    assert _counted(lambda: model(tokens)) == forward_flops(config, batch, seq)
    assert forward_flops_per_token(config, seq) * seq * batch == pytest.approx(forward_flops(config, batch, seq))

    def step() -> None:
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()

    assert _counted(step) == pytest.approx(training_flops(config, batch * seq, seq=seq), rel=1e-12)


@settings(max_examples=10, deadline=None)
@given(config=configs, cached=st.integers(1, 10))
def test_a_decode_step_equals_the_products_that_ran(config, cached):
    model = Transformer(config)
    cache = model.new_cache(2)
    tokens = torch.randint(0, 29, (2, cached + 1))
    with torch.no_grad():
        model(tokens[:, :cached], cache=cache)
        counted = _counted(lambda: model(tokens[:, cached:], cache=cache))
    assert counted == 2 * decode_flops_per_token(config, cached)


@given(seq=st.integers(1, 100), window=st.sampled_from([None, 1, 7, 100]))
def test_causal_counts_what_decoding_token_by_token_costs(seq, window):
    config = presets.get("tiny").replace(window=window)
    assert forward_flops(config, 1, seq, causal=True) == sum(decode_flops_per_token(config, n) for n in range(seq))


def test_training_is_about_six_operations_a_weight_and_token():
    """Kaplan et al. 2020, section 2.1: 6 N D, as long as seq is short against 12 d_model."""
    config = presets.get("gpt2-xl")
    assert training_flops(config, 10**9, seq=64) == pytest.approx(6 * parameters(config) * 10**9, rel=0.01)
    assert training_flops(config, 10**9) == training_flops(config, 10**9, seq=1024)


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (presets.get("llama-2-7b"), 512 * 1024),
        (presets.get("llama-3-8b"), 128 * 1024),
        (presets.get("llama-3-70b"), 320 * 1024),
        # Kwon et al. 2023, section 3: "the KV cache of a single token demands 800 KB" for OPT-13B.
        (TransformerConfig(vocab_size=50272, d_model=5120, n_layers=40, n_heads=40), 800 * 1024),
    ],
)
def test_cache_bytes_equal_the_published(config, published):
    assert kv_cache_bytes_per_token(config) == published
    assert kv_cache_bytes_per_token(config, 1) == published / 2


def test_cache_bytes_equal_the_cache():
    config = TransformerConfig(vocab_size=5, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2)
    assert Transformer(config).new_cache(2, capacity=7).nbytes == 2 * 7 * kv_cache_bytes_per_token(config, 4)


def test_bad_numbers_are_refused_by_name():
    config = presets.get("tiny")
    for call, message in (
        (lambda: forward_flops(config, 0, 4), "batch_size must be at least 1, got 0"),
        (lambda: forward_flops_per_token(config, 0), "seq must be at least 1, got 0"),
        (lambda: training_flops(config, 0), "n_tokens must be at least 1, got 0"),
        (lambda: decode_flops_per_token(config, -1), "n_cached must be at least 0, got -1"),
        (lambda: kv_cache_bytes_per_token(config, 0), "bytes_per_value must be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
