"""RMSNorm against torch's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.layers import RMSNorm


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    d_model=st.integers(1, 40),
    magnitude=st.sampled_from([0.0, 1e-4, 1.0, 1e4]),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
)
def test_equals_torchs_in_value_and_gradient(seed, d_model, magnitude, eps):
    torch.manual_seed(seed)
    ours, theirs = RMSNorm(d_model, eps=eps), torch.nn.RMSNorm(d_model, eps=eps)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight.normal_())
    x = (torch.randn(3, 5, d_model) * magnitude).requires_grad_()
    out, expected = ours(x), theirs(x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, (x, ours.weight), upstream)
    want = torch.autograd.grad(expected, (x, theirs.weight), upstream)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * max(1.0, b.abs().max().item()), rtol=1e-4)


def test_bfloat16_keeps_its_dtype_and_float32_statistics():
    x = torch.randn(4, 64, dtype=torch.bfloat16) * 100
    out = RMSNorm(64).to(torch.bfloat16)(x)
    assert out.dtype is torch.bfloat16
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(out.double(), exact, atol=0, rtol=2**-8)


def test_bad_sizes_are_refused_by_name():
    with pytest.raises(ValueError, match="d_model must be at least 1, got 0"):
        RMSNorm(0)
    with pytest.raises(ValueError, match="x must end in d_model=8, got shape"):
        RMSNorm(8)(torch.zeros(2, 1))
