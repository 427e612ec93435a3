"""The cache keeps what it was given, in order, and refuses what does not fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.layers import KVCache, LayerKVCache
from minillm.layers.kv_cache import rolling_capacity


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_holds_the_concatenation_of_what_was_appended(sizes):
    cache = KVCache(2, 3, 2, 4, capacity=sum(sizes))
    keys, values = [], []
    for size in sizes:
        keys.append(torch.randn(3, 2, size, 4))
        values.append(torch.randn(3, 2, size, 4))
        for layer in cache.layers:
            stored_keys, stored_values = layer.append(keys[-1], values[-1])
            assert torch.equal(stored_keys, torch.cat(keys, 2))
            assert torch.equal(stored_values, torch.cat(values, 2))
    assert cache.length == sum(sizes)


def test_counts_its_bytes_and_casts():
    cache = KVCache(2, 3, 2, 4, capacity=5, dtype=torch.bfloat16)
    assert cache.nbytes == 2 * 2 * 3 * 2 * 5 * 4 * 2
    keys, _ = cache.layers[0].append(torch.ones(3, 2, 1, 4), torch.ones(3, 2, 1, 4))
    assert keys.dtype is torch.bfloat16


def test_what_does_not_fit_is_refused_and_leaves_it_as_it_was():
    cache = KVCache(1, 3, 2, 4, capacity=2)
    layer = cache.layers[0]
    layer.append(torch.ones(3, 2, 1, 4), torch.ones(3, 2, 1, 4))
    with pytest.raises(ValueError, match="holds 2 tokens: 1 are stored, 2 more do not fit"):
        layer.append(torch.ones(3, 2, 2, 4), torch.ones(3, 2, 2, 4))
    with pytest.raises(ValueError, match=r"batch=3, n_kv_heads=2, seq, head_dim=4.*\(1, 2, 1, 4\)"):
        layer.append(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    with pytest.raises(ValueError, match="key and value must have shape"):
        layer.append(torch.ones(3, 2, 1, 4), torch.ones(3, 2, 2, 4))
    assert cache.length == 1
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        KVCache(1, 1, 1, 1, capacity=0)


@settings(max_examples=60, deadline=None)
@given(
    window=st.integers(1, 20),
    sizes=st.lists(st.one_of(st.just(1), st.integers(0, 30)), min_size=1, max_size=40),
)
def test_a_rolling_cache_gives_the_last_window_of_keys_in_order_of_time(window, sizes):
    cache = KVCache(1, 2, 1, 3, capacity=10_000, window=window)
    size_at_first, everything = cache.nbytes, torch.empty(2, 1, 0, 3)
    for size in sizes:
        new = torch.randn(2, 1, size, 3)
        seen = min(everything.size(2), window - 1)
        everything = torch.cat([everything, new], 2)
        assert cache.n_keys(size) == seen + size
        keys, values = cache.layers[0].append(new, -new)
        assert torch.equal(keys, everything[:, :, everything.size(2) - seen - size :])
        assert torch.equal(values, -keys)
        assert cache.length == everything.size(2)
    assert cache.nbytes == size_at_first == 2 * 2 * rolling_capacity(window) * 3 * 4


def test_a_rolling_cache_gives_views_but_for_a_prompt_longer_than_itself():
    cache = KVCache(1, 1, 1, 2, capacity=100, window=8)
    layer = cache.layers[0]
    for size in (1, 3, 1, 4, 1, 1, 1, 1):
        keys, _ = layer.append(torch.randn(1, 1, size, 2), torch.randn(1, 1, size, 2))
        assert keys.untyped_storage().data_ptr() == layer.keys.untyped_storage().data_ptr()
    keys, _ = layer.append(torch.randn(1, 1, 50, 2), torch.randn(1, 1, 50, 2))
    assert keys.size(2) == 57


def test_a_rolling_cache_gives_its_own_dtype_whatever_the_length():
    layer = KVCache(1, 1, 1, 2, capacity=100, window=4, dtype=torch.bfloat16).layers[0]
    for size in (30, 1, 2):
        keys, values = layer.append(torch.randn(1, 1, size, 2), torch.randn(1, 1, size, 2))
        assert keys.dtype is values.dtype is torch.bfloat16


def test_a_window_that_the_capacity_never_reaches_needs_no_rolling():
    cache = KVCache(1, 1, 1, 2, capacity=9, window=8)
    assert type(cache.layers[0]) is LayerKVCache
    assert cache.layers[0].keys.size(2) == 9
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        KVCache(1, 1, 1, 2, capacity=9, window=0)


def test_what_does_not_fit_a_rolling_cache_is_refused_and_leaves_it_as_it_was():
    layer = KVCache(1, 1, 2, 4, capacity=100, window=8).layers[0]
    with pytest.raises(ValueError, match="key and value must have shape"):
        layer.append(torch.ones(1, 2, 1, 5), torch.ones(1, 2, 1, 5))
    assert layer.length == 0
