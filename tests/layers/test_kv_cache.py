"""The cache keeps what it was given, in order, and refuses what does not fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.layers import KVCache


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
