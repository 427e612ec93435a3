"""Scaled dot-product attention against torch's own: outputs and gradients, and what its own does not promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillm.layers import (
    causal_mask,
    plain_scaled_dot_product_attention,
    scaled_dot_product_attention,
)

VERSIONS = [plain_scaled_dot_product_attention, scaled_dot_product_attention]


def _inputs(batch=2, heads=4, kv_heads=4, queries=5, keys=7, dim=8, dtype=torch.float64):
    return [
        torch.randn(batch, h, n, dim, dtype=dtype, requires_grad=True)
        for h, n in ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    ]


def _oracle(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, bias: Tensor | float, scale: float) -> Tensor:
    """A direct float64 computation with the keys repeated, one query row at a time."""
    groups = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale + bias
    exponentials = scores.exp() * allowed
    total = exponentials.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bhkd->bhqd", exponentials / torch.where(total == 0, 1.0, total), value)


@pytest.mark.parametrize("attention", VERSIONS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kv_heads=st.sampled_from([1, 2, 4]),
    queries=st.integers(1, 5),
    keys=st.integers(1, 6),
    masked=st.sampled_from(["none", "keys", "full", "heads"]),
    biased=st.booleans(),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.7]),
)
def test_agrees_with_the_definition_in_float64(attention, seed, kv_heads, queries, keys, masked, biased, causal, scale):
    torch.manual_seed(seed)
    query, key, value = _inputs(2, 4, kv_heads, queries, keys, 6)
    shape = {"none": None, "keys": (2, 1, 1, keys), "full": (queries, keys), "heads": (2, 4, queries, keys)}[masked]
    mask = None if shape is None else torch.rand(shape) > 0.4
    bias = torch.randn(4, queries, keys, dtype=torch.float64, requires_grad=True) if biased else None
    allowed = torch.ones(2, 4, queries, keys, dtype=torch.bool) if mask is None else mask.expand(2, 4, queries, keys)
    if causal:
        rows, columns = torch.arange(queries)[:, None], torch.arange(keys)
        allowed = allowed & (columns - (keys - queries) <= rows)

    out = attention(query, key, value, mask=mask, bias=bias, causal=causal, scale=scale)
    expected = _oracle(query, key, value, allowed, 0.0 if bias is None else bias, 6**-0.5 if scale is None else scale)
    torch.testing.assert_close(out, expected)
    assert not out[~allowed.any(-1)].any()  # rows that may see nothing

    upstream = torch.randn_like(out)
    leaves = [query, key, value, *([] if bias is None else [bias])]
    for got, want in zip(
        torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(got, want)


TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_both_versions_agree_with_torchs_in_value_and_gradient(dtype, kv_heads):
    inputs = _inputs(kv_heads=kv_heads, queries=33, keys=33, dim=16, dtype=dtype)
    repeated = [inputs[0], *(t.repeat_interleave(4 // kv_heads, 1) for t in inputs[1:])]
    expected = F.scaled_dot_product_attention(*(t.double() for t in repeated), is_causal=True)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    tolerance = TOLERANCES[dtype]
    for attention in VERSIONS:
        out = attention(*inputs, causal=True)
        assert out.dtype is dtype
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
        for got, want in zip(torch.autograd.grad(out, inputs, upstream.to(dtype)), wanted, strict=True):
            torch.testing.assert_close(got, want, atol=4 * tolerance, rtol=4 * tolerance)


@pytest.mark.parametrize("attention", VERSIONS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("queries", [5, 1])
@pytest.mark.parametrize("blocked", ["mask", "bias", "learned bias", "mask and bias"])
def test_rows_that_may_see_nothing_give_zeros_and_no_gradient(attention, dtype, kv_heads, queries, blocked):
    inputs = _inputs(kv_heads=kv_heads, queries=queries, dtype=dtype)
    row = min(2, queries - 1)
    mask = torch.ones(queries, 7, dtype=torch.bool)
    mask[row] = False
    bias = torch.zeros(4, queries, 7)
    if blocked == "mask and bias":  # each leaves some keys, both together none
        mask[row, :3] = True
        bias[:, row, :3] = -torch.inf
    elif blocked != "mask":
        bias.masked_fill_(~mask, -torch.inf)
    if blocked == "learned bias":
        inputs.append(bias.requires_grad_())
    options = {name: tensor for name, tensor in (("mask", mask), ("bias", bias)) if name in blocked}
    out = attention(*inputs[:3], **options)
    assert torch.equal(out[:, :, row], torch.zeros(2, 4, 8, dtype=dtype))
    assert out.isfinite().all()
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][:, :, row].any()
    if blocked == "learned bias":
        assert not gradients[3][:, row].any()
    if queries == 1:
        assert not any(gradient.any() for gradient in gradients)


def test_weights_of_rows_that_may_see_nothing_are_zeros_too():
    inputs = _inputs(dtype=torch.float32)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    _, weights = scaled_dot_product_attention(*inputs, mask=mask, return_weights=True)
    assert not weights[:, :, 2].any()
    torch.testing.assert_close(weights.sum(-1)[:, :, [0, 1, 3, 4]], torch.ones(2, 4, 4))
    gradients = torch.autograd.grad(weights.square().sum(), inputs[:2])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][:, :, 2].any()


@pytest.mark.parametrize("attention", VERSIONS)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 7), (2, 5, 0), (2, 1, 0), (2, 0, 7), (2, 0, 0)])
def test_nothing_to_attend_from_or_to(attention, kv_heads, causal, batch, queries, keys):
    inputs = _inputs(batch, 4, kv_heads, queries, keys, dtype=torch.float32)
    mask = torch.ones(queries, keys, dtype=torch.bool)
    for options in ({}, {"mask": mask}, {"bias": torch.zeros(4, queries, keys)}):
        out = attention(*inputs, causal=causal, **options)
        assert out.shape == (batch, 4, queries, 8)
        (gradient,) = torch.autograd.grad(out.sum(), inputs[:1])
        assert gradient.isfinite().all()
        if not keys:
            assert not out.any()
            assert not gradient.any()
    _, weights = scaled_dot_product_attention(*inputs, causal=causal, return_weights=True)
    assert weights.shape == (batch, 4, queries, keys)


def test_more_causal_queries_than_keys_leave_the_first_without_a_key():
    query, key, value = _inputs(queries=5, keys=3, dtype=torch.float32)
    for attention in VERSIONS:
        assert not attention(query, key, value, causal=True)[:, :, :2].any()


def test_causal_mask_puts_the_last_query_at_the_last_key():
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]


def test_weights_are_those_that_made_the_output_and_ungrouped():
    query, key, value = _inputs(kv_heads=2, queries=7, keys=7)
    out, weights = scaled_dot_product_attention(query, key, value, causal=True, return_weights=True)
    assert weights.shape == (2, 4, 7, 7)
    assert not weights.triu(1).any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(out, weights @ value.repeat_interleave(2, 1))


@pytest.mark.parametrize("attention", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kv_heads", "queries"), [(4, 9), (2, 9), (2, 1)])
@pytest.mark.parametrize("learned", [False, True])
def test_a_bias_is_not_rounded_to_half_precision(attention, dtype, kv_heads, queries, learned):
    """Around 1000 bfloat16 counts in steps of 4: differences of the bias between neighbours would be lost."""
    inputs = _inputs(kv_heads=kv_heads, queries=queries, keys=9, dtype=dtype)
    bias = (1000 + torch.randn(4, queries, 9)).requires_grad_(learned)
    expected = attention(*(t.double() for t in inputs), bias=bias.double())
    out = attention(*inputs, bias=bias)
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    if learned:
        (got,) = torch.autograd.grad(out.double().sum(), bias)
        (want,) = torch.autograd.grad(expected.sum(), bias)
        torch.testing.assert_close(got, want, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("attention", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_extreme_scores_do_not_overflow(attention, dtype, kv_heads):
    """64 products of 128 by 128 are far above float16's largest number, 65504."""
    query, key, value = _inputs(kv_heads=kv_heads, dim=64, dtype=dtype)
    size = 2.0**7 if dtype is torch.float16 else 2.0**33
    query, key = query.sign() * size, key.sign() * size
    out = attention(query, key, value)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (query, key, value)))
    expected = attention(query.double(), key.double(), value.double())
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=2e-3)


class _Allocations(TorchDispatchMode):
    """The sizes, in bytes, of all memory that operations take for their results."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        taken = {a.untyped_storage().data_ptr() for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in taken:
                self.sizes.append(result.untyped_storage().nbytes())
        return results


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("case", ["generating", "generating with a bias", "chunk", "masked", "bias", "causal"])
def test_shared_keys_are_not_repeated_in_memory_nor_are_scores_kept(kv_heads, case):
    keys, queries = 256, {"generating": 1, "generating with a bias": 1, "causal": 256}.get(case, 4)
    query, key, value = _inputs(2, 16, kv_heads, queries, keys, 32, dtype=torch.float32)
    options = {"causal": case in ("chunk", "causal")}
    if case == "masked":
        options["mask"] = torch.rand(2, 1, 1, keys) > 0.5
    if "bias" in case:
        options["bias"] = torch.randn(16, queries, keys)  # ALiBi's shape
    with _Allocations() as forward:
        out = scaled_dot_product_attention(query, key, value, **options)
    repeated = key.nbytes * 16 // kv_heads
    if case == "causal":  # the output is as large as repeated keys, and the only thing to be
        assert sorted(forward.sizes)[-2] < repeated
    else:
        assert sum(forward.sizes) < min(repeated, 2 * 16 * queries * keys * 4 + key.nbytes)
    with _Allocations() as backward:
        torch.autograd.grad(out, (key, value), torch.ones_like(out))
    assert max(backward.sizes) <= max(key.nbytes, query.nbytes)


@pytest.mark.parametrize("attention", VERSIONS)
def test_dropout_zeroes_that_share_and_keeps_the_mean(attention):
    query, key = torch.zeros(1, 1, 64, 4), torch.zeros(1, 1, 500, 4)
    value = torch.eye(500)[None, None]  # so that the output is the weights
    weights = attention(query, key, value, dropout=0.25) * 500
    dropped = (weights == 0).float().mean().item()
    assert abs(dropped - 0.25) < 5 * (0.25 * 0.75 / weights.numel()) ** 0.5
    torch.testing.assert_close(weights[weights != 0], torch.full_like(weights[weights != 0], 1 / 0.75))


@pytest.mark.parametrize("attention", VERSIONS)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(4, 5, 8)}, ValueError, r"must each be \(batch, heads, seq, head_dim\)"),
        ({"query": torch.zeros(3, 4, 5, 8)}, ValueError, "agree in batch"),
        ({"key": torch.zeros(2, 4, 6, 8)}, ValueError, "agree in batch"),
        ({"query": torch.zeros(2, 6, 5, 8)}, ValueError, r"\(6\) must be a multiple .* \(4\)"),
        ({"value": torch.zeros(2, 4, 7, 8, dtype=torch.float64)}, TypeError, "one floating-point dtype"),
        ({"mask": torch.zeros(5, 7)}, ValueError, "mask must be boolean"),
        ({"bias": torch.ones(5, 7, dtype=torch.bool)}, ValueError, "bias must be floating point"),
        ({"mask": torch.ones(7, 5, dtype=torch.bool)}, ValueError, r"mask must broadcast to .*\(2, 4, 5, 7\)"),
        ({"bias": torch.zeros(1, 2, 4, 5, 7)}, ValueError, "bias must broadcast"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_input_is_refused_by_name(attention, changes, error, message):
    arguments = {"query": torch.zeros(2, 4, 5, 8), "key": torch.zeros(2, 4, 7, 8), "value": torch.zeros(2, 4, 7, 8)}
    arguments |= changes
    with pytest.raises(error, match=message):
        attention(arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_may_see_nothing_give_zeros_on_a_gpu(dtype):
    query, key, value = (t.detach().to("cuda", dtype).requires_grad_() for t in _inputs(dim=64, dtype=torch.float32))
    mask = torch.rand(2, 1, 5, 7, device="cuda") > 0.3
    mask[:, :, 2] = False
    expected = plain_scaled_dot_product_attention(query, key, value, mask=mask)
    out = scaled_dot_product_attention(query, key, value, mask=mask)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    assert not out[:, :, 2].any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.float().square().sum(), (query, key, value)))


@pytest.mark.parametrize("window", [1, 3, 50])
@pytest.mark.parametrize(("query_length", "key_length"), [(7, 7), (1, 7), (3, 9)])
def test_a_window_lets_a_query_see_its_last_keys_only(query_length, key_length, window):
    mask = causal_mask(query_length, key_length, window=window)
    for i in range(query_length):
        place = i + key_length - query_length
        assert mask[i].tolist() == [place - window < j <= place for j in range(key_length)]


def test_a_window_of_no_token_is_refused():
    with pytest.raises(ValueError, match="window must be at least 1"):
        causal_mask(3, 3, window=0)
