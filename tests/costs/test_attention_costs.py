"""What attention costs: torch's FLOP counter, the tensors autograd really keeps, real caches, and printed figures."""

import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minillm.costs import (
    PUBLISHED_MODELS,
    attention_activation_bytes,
    attention_activation_bytes_by_part,
    attention_flops,
    attention_flops_by_part,
    forward_flops,
    kv_cache_bytes,
    kv_cache_bytes_per_token,
    live_fraction,
    live_pairs,
)
from minillm.layers import (
    CrossAttention,
    KVCache,
    MultiHeadAttention,
    block_sparse_attention,
    causal_mask,
    plain_scaled_dot_product_attention,
    scaled_dot_product_attention,
)
from minillm.layers.sparse_patterns import block_local, causal, global_tokens, sliding_window
from minillm.models import TransformerConfig, presets

configs = st.builds(
    lambda kv_heads, d_model, head_dim: TransformerConfig(
        vocab_size=5, d_model=d_model, n_heads=4, n_kv_heads=kv_heads, head_dim=head_dim
    ),
    kv_heads=st.sampled_from([4, 2, 1]),
    d_model=st.sampled_from([8, 16]),
    head_dim=st.sampled_from([None, 6]),
)
examples = settings(max_examples=15, deadline=None)


def _self_attention(config, **options):
    return MultiHeadAttention(
        config.d_model, config.n_heads, n_kv_heads=config.n_kv_heads, head_dim=config.head_dim, **options
    )


def _cross_attention(config, memory_size):
    return CrossAttention(
        config.d_model,
        config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        memory_size=memory_size,
    )


def _counted(run) -> int:
    # The written-out kernel: the counter knows its products; torch's fused CPU kernel it does not see.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _kept_bytes(module, run) -> int:
    """Bytes of the tensors that autograd saves, each once; parameters and boolean masks aside."""
    kept = {}
    parameters = {parameter.data_ptr() for parameter in module.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in parameters and tensor.dtype is not torch.bool:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(kept.values())


@examples
@given(config=configs, batch=st.integers(1, 3), seq=st.integers(1, 9), cached=st.integers(0, 5))
def test_self_attention_equals_the_products_that_ran(config, batch, seq, cached):
    layer = _self_attention(config)
    x = torch.randn(batch, seq, config.d_model)
    assert _counted(lambda: layer(x)) == attention_flops(config, seq, batch_size=batch)
    x.requires_grad_()
    assert _counted(lambda: layer(x).sum().backward()) == 3 * attention_flops(config, seq, batch_size=batch)
    cache = KVCache(1, batch, config.n_kv_heads, config.head_dim, capacity=16).layers[0]
    with torch.no_grad():
        if cached:
            layer(torch.randn(batch, cached, config.d_model), cache=cache)
        assert _counted(lambda: layer(x, cache=cache)) == attention_flops(config, seq, batch_size=batch, cached=cached)


@examples
@given(config=configs, seq=st.integers(1, 6), memory_length=st.integers(1, 9), memory_size=st.sampled_from([None, 7]))
def test_cross_attention_equals_the_products_that_ran(config, seq, memory_length, memory_size):
    layer = _cross_attention(config, memory_size)
    x, memory = torch.randn(2, seq, config.d_model), torch.randn(2, memory_length, layer.memory_size)
    arguments = {"batch_size": 2, "memory_length": memory_length, "memory_size": memory_size}
    assert _counted(lambda: layer(x, memory)) == attention_flops(config, seq, **arguments)
    remembered = layer.remember(memory)
    counted = _counted(lambda: layer(x, remembered))
    assert counted == attention_flops(config, seq, **arguments, remembered=True)


@given(query_length=st.integers(1, 20), earlier=st.integers(0, 12), window=st.none() | st.integers(1, 25))
def test_live_pairs_are_those_of_the_mask(query_length, earlier, window):
    key_length = query_length + earlier
    mask = causal_mask(query_length, key_length, window=window)
    assert live_pairs(query_length, key_length, window=window) == mask.sum().item()
    assert live_fraction(query_length, key_length, window=window) == pytest.approx(mask.float().mean().item())
    if not earlier:
        assert live_pairs(query_length, window=window) == mask.sum().item()


def test_a_models_attention_is_its_layers_and_a_live_share_scales_the_scores_alone():
    config = presets.get("llama-3-8b").replace(window=512)
    seq = 2048
    whole = forward_flops(config, 1, seq, causal=True)
    rest = forward_flops(config.replace(n_heads=1, n_kv_heads=1, head_dim=2), 1, seq, causal=True)
    tiny = config.replace(n_heads=1, n_kv_heads=1, head_dim=2)
    live = live_fraction(seq, window=512)
    difference = attention_flops(config, seq, live=live) - attention_flops(tiny, seq, live=live)
    assert whole - rest == config.n_layers * difference

    dense, sparse = attention_flops_by_part(config, seq), attention_flops_by_part(config, seq, live=0.125)
    for part, flops in dense.items():
        assert sparse[part] == (flops / 8 if part in ("scores", "weighted_sum") else flops)


@pytest.mark.parametrize("pattern", [sliding_window(20), block_local(32), sliding_window(16) | global_tokens(3)])
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_a_sparse_layers_products_are_the_live_share_of_the_dense_ones(pattern, n_kv_heads):
    config = TransformerConfig(vocab_size=5, d_model=32, n_heads=4, n_kv_heads=n_kv_heads)
    layer, x = _self_attention(config), torch.randn(2, 128, 32)
    attend = partial(block_sparse_attention, pattern=pattern & causal(), block_size=16)
    live = (pattern & causal()).blocks(128, 128, 16).computed_pairs / 128**2
    assert live < 0.5
    assert _counted(lambda: layer(x, attend=attend)) == attention_flops(config, 128, batch_size=2, live=live)


@examples
@given(config=configs, batch=st.integers(1, 3), seq=st.integers(2, 9), causal=st.booleans())
def test_self_attention_keeps_what_the_formula_says(config, batch, seq, causal):
    layer = _self_attention(config)
    x = torch.randn(batch, seq, config.d_model, requires_grad=True)
    for attend, fused in ((scaled_dot_product_attention, True), (plain_scaled_dot_product_attention, False)):
        kept = _kept_bytes(layer, lambda attend=attend: layer(x, causal=causal, attend=attend))
        wanted = attention_activation_bytes(config, seq, batch_size=batch, fused=fused, bytes_per_value=4)
        assert kept == wanted


@examples
@given(config=configs, seq=st.integers(2, 6), memory_length=st.integers(1, 9), memory_size=st.sampled_from([None, 7]))
def test_cross_attention_keeps_what_the_formula_says(config, seq, memory_length, memory_size):
    layer = _cross_attention(config, memory_size)
    x, memory = torch.randn(2, seq, config.d_model), torch.randn(2, memory_length, layer.memory_size)
    for attend, fused in ((scaled_dot_product_attention, True), (plain_scaled_dot_product_attention, False)):
        kept = _kept_bytes(layer, lambda attend=attend: layer(x, memory, attend=attend))
        arguments = {"memory_length": memory_length, "memory_size": memory_size, "bytes_per_value": 4}
        assert kept == attention_activation_bytes(config, seq, batch_size=2, fused=fused, **arguments)


@given(s=st.integers(1, 4096), b=st.integers(1, 8), a=st.sampled_from([8, 96]), head_dim=st.sampled_from([64, 128]))
def test_written_out_with_dropout_it_is_the_papers_count(s, b, a, head_dim):
    """Korthikanti et al. 2022, section 4.1: 11 s b h + 5 a s^2 b, of which s b h is the dropout after the layer."""
    h = a * head_dim
    config = TransformerConfig(vocab_size=5, d_model=h, n_heads=a)
    parts = attention_activation_bytes_by_part(config, s, batch_size=b, fused=False, dropout=True)
    assert parts["weights"] == 5 * a * s**2 * b
    assert sum(parts.values()) + s * b * h == 11 * s * b * h + 5 * a * s**2 * b


def test_fused_attention_keeps_no_square_and_dropout_no_more():
    config = presets.get("gpt2-small")
    short, long = (attention_activation_bytes(config, seq) for seq in (1024, 2048))
    assert long == 2 * short
    assert attention_activation_bytes(config, 1024, dropout=True) == short
    squares = [attention_activation_bytes_by_part(config, seq, fused=False)["weights"] for seq in (1024, 2048)]
    assert squares[1] == 4 * squares[0]
    assert attention_activation_bytes_by_part(config, 1024, fused=False, live=0.25)["weights"] == squares[0] / 4


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 16, 200])
def test_the_cache_takes_the_bytes_that_it_must_keep_and_an_eighth_at_most_to_roll(n_kv_heads, window):
    config = TransformerConfig(vocab_size=5, d_model=32, n_layers=3, n_heads=4, n_kv_heads=n_kv_heads, window=window)
    cache = KVCache(3, 2, n_kv_heads, 8, capacity=100, window=window)
    least = kv_cache_bytes(config, 100, batch_size=2, bytes_per_value=4)
    assert least <= cache.nbytes <= least * 9 / 8
    if window is None or window > 100:
        assert cache.nbytes == least
    full = config.replace(window=None)
    assert kv_cache_bytes(full, 100, window=window, batch_size=2, bytes_per_value=4) == least
    assert kv_cache_bytes(full, 1) == kv_cache_bytes_per_token(config)


@pytest.mark.parametrize("n_kv_heads", [4, 1])
def test_a_remembered_memory_takes_what_a_cache_of_its_length_would(n_kv_heads):
    config = TransformerConfig(vocab_size=5, d_model=16, n_layers=1, n_heads=4, n_kv_heads=n_kv_heads)
    remembered = _cross_attention(config, 10).remember(torch.randn(2, 7, 10))
    assert remembered.nbytes == kv_cache_bytes(config, 7, batch_size=2, bytes_per_value=4)


# What papers print


def test_opt_13b_in_the_paged_attention_paper():
    """Kwon et al. 2023, section 3: 800 KB for a token, as much as 1.6 GB for a request of 2048."""
    model = PUBLISHED_MODELS["OPT-13B"]
    assert kv_cache_bytes_per_token(model) == 800 * 1024
    assert kv_cache_bytes(model, model.context_length) / 1e9 == pytest.approx(1.6, abs=0.1)


def test_opt_175b_in_the_flexgen_paper():
    """Sheng et al. 2023, section 3: batch 512, 512 + 32 tokens take 1.2 TB, 3.8 times the weights' 325 GB."""
    n_bytes = kv_cache_bytes(PUBLISHED_MODELS["OPT-175B"], 512 + 32, batch_size=512)
    assert n_bytes / 2**40 == pytest.approx(1.2, abs=0.05)
    assert n_bytes / 2**30 / 325 == pytest.approx(3.8, abs=0.05)
    assert kv_cache_bytes_per_token(PUBLISHED_MODELS["GPT-3 175B"]) == 4.5 * 2**20  # the same shape


def test_palm_540b_with_many_heads_and_with_one():
    """Pope et al. 2022: section 2 (a multi-head model of 500B takes 3 TB) and table 1 (the longest contexts).

    Table 1: 64 chips of 32 GiB, 30 % of them for the cache. The multi-head variant has heads of 128, padded from 48 to
    64 so as to be cut over the chips; the one head of multi-query attention is held by every chip, or, in the paper's
    layout, cut by the batch.
    """
    palm = PUBLISHED_MODELS["PaLM 540B"]
    multi_head = dataclasses.replace(palm, n_kv_heads=48, head_dim=128)
    assert kv_cache_bytes(multi_head, 2048, batch_size=512) / 1e12 == pytest.approx(3, rel=0.02)

    chip = 0.3 * 32 * 2**30
    padded = dataclasses.replace(multi_head, n_heads=64, n_kv_heads=64)
    for batch_size, printed in ((128, (1320, 660, 43000)), (512, (330, 165, 10700))):
        longest = (
            64 * chip / kv_cache_bytes(padded, 1, batch_size=batch_size),
            chip / kv_cache_bytes(palm, 1, batch_size=batch_size),
            64 * chip / kv_cache_bytes(palm, 1, batch_size=batch_size),
        )
        assert longest == pytest.approx(printed, rel=0.015)


def test_mistral_7bs_window():
    """Jiang et al. 2023, section 2: the rolling buffer takes an eighth of the cache of 32k tokens."""
    mistral = PUBLISHED_MODELS["Mistral 7B"]
    without = dataclasses.replace(mistral, window=None)
    assert kv_cache_bytes(mistral, 32768) * 8 == kv_cache_bytes(without, 32768)
    assert kv_cache_bytes(mistral, 4096) == kv_cache_bytes(without, 4096)


def test_llama_2_70bs_grouped_heads():
    """Touvron et al. 2023, appendix A.2.1: 8 key heads for 64, so an eighth of multi-head attention's cache."""
    llama = PUBLISHED_MODELS["Llama 2 70B"]
    assert llama.variant == "GQA"
    assert kv_cache_bytes_per_token(llama) == 320 * 1024
    assert kv_cache_bytes_per_token(dataclasses.replace(llama, n_kv_heads=64)) == 8 * 320 * 1024


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("GPT-2 XL", "gpt2-xl"),
        ("Llama 2 7B", "llama-2-7b"),
        ("Llama 2 70B", "llama-2-70b"),
        ("Llama 3 8B", "llama-3-8b"),
        ("Llama 3 70B", "llama-3-70b"),
    ],
)
def test_published_shapes_are_those_of_the_presets_whose_parameters_are_proven(name, preset):
    model, config = PUBLISHED_MODELS[name], presets.get(preset)
    for field in ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "context_length", "window"):
        assert getattr(model, field) == getattr(config, field), field


@pytest.mark.parametrize(
    ("name", "kib_per_token", "context_length", "variant"),
    [
        ("GPT-2 XL", 300, 1024, "MHA"),
        ("GPT-3 175B", 4608, 2048, "MHA"),
        ("OPT-13B", 800, 2048, "MHA"),
        ("OPT-175B", 4608, 2048, "MHA"),
        ("BLOOM 176B", 3920, 2048, "MHA"),
        ("PaLM 540B", 118, 2048, "MQA"),
        ("Llama 2 7B", 512, 4096, "MHA"),
        ("Llama 2 70B", 320, 4096, "GQA"),
        ("Falcon-7B", 8, 2048, "MQA"),
        ("Falcon-40B", 120, 2048, "GQA"),
        ("Falcon-180B", 160, 2048, "GQA"),
        ("Mistral 7B", 128, 8192, "GQA"),
        ("Llama 3 8B", 128, 8192, "GQA"),
        ("Llama 3 70B", 320, 8192, "GQA"),
        ("Llama 3.1 405B", 504, 131072, "GQA"),
    ],
)
def test_the_table_of_published_caches(name, kib_per_token, context_length, variant):
    """Worked out by hand from the sources: 2 * layers * key heads * head size * 2 bytes."""
    model = PUBLISHED_MODELS[name]
    assert kv_cache_bytes_per_token(model) == kib_per_token * 1024
    assert (model.context_length, model.variant) == (context_length, variant)


def test_published_shapes_are_consistent():
    assert len(PUBLISHED_MODELS) == 15
    for name, model in PUBLISHED_MODELS.items():
        assert model.name == name
        assert model.n_heads % model.n_kv_heads == 0
        assert model.n_heads * model.head_dim == model.d_model or name == "PaLM 540B"  # 12288 of 18432
        assert model.source
    assert {model.variant for model in PUBLISHED_MODELS.values()} == {"MHA", "GQA", "MQA"}


def test_bad_numbers_are_refused_by_name():
    config = presets.get("tiny")
    for call, message in (
        (lambda: attention_flops(config, 0), "seq must be at least 1, got 0"),
        (lambda: attention_flops(config, 4, batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: attention_flops(config, 4, cached=-1), "cached must be at least 0, got -1"),
        (lambda: attention_flops(config, 4, live=1.5), "live must be a share from 0 to 1, got 1.5"),
        (lambda: attention_flops(config, 4, memory_size=8), "give memory_length too"),
        (lambda: attention_flops(config, 4, remembered=True), "give memory_length too"),
        (lambda: attention_flops(config, 4, memory_length=3, cached=2), "cached must be 0 for cross-attention"),
        (lambda: attention_flops(config, 4, memory_length=0), "memory_length must be at least 1, got 0"),
        (lambda: attention_activation_bytes(config, 4, bytes_per_value=0), "bytes_per_value must be positive"),
        (lambda: live_pairs(4, 3), "key_length must be at least 4, got 3"),
        (lambda: live_fraction(4, window=0), "window must be at least 1, got 0"),
        (lambda: kv_cache_bytes(config, 0), "n_tokens must be at least 1, got 0"),
        (lambda: kv_cache_bytes(config, 4, window=0), "window must be at least 1, got 0"),
        (lambda: kv_cache_bytes(config, 4, batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: kv_cache_bytes(config, 4, bytes_per_value=0), "bytes_per_value must be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
