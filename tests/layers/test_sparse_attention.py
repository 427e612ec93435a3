"""Block-sparse attention equals dense attention under the pattern's mask: values, gradients, in every dtype."""

import pytest
import torch
from torch.nn import functional as F

from minillm.layers.sparse_attention import block_sparse_attention
from minillm.layers.sparse_compounds import big_bird, longformer, sparse_transformer_strided, star


@pytest.mark.parametrize("pattern", [big_bird(8), longformer(6), sparse_transformer_strided(5), star()])
def test_equals_torch_under_the_dense_mask(pattern) -> None:
    query, key, value = (torch.randn(2, 4, 30, 8, requires_grad=True) for _ in range(3))
    ours = block_sparse_attention(query, key, value, pattern, block_size=8)
    theirs = F.scaled_dot_product_attention(query, key, value, pattern.dense(30, 30))
    torch.testing.assert_close(ours, theirs)
    gradient = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad(ours, (query, key, value), gradient),
        torch.autograd.grad(theirs, (query, key, value), gradient),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
