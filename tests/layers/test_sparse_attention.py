"""Block-sparse attention is torch's attention under the pattern's mask, and does the work of the live tiles only."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from minillm.layers import MultiHeadAttention, Pattern, block_sparse_attention
from minillm.layers.sparse_compounds import (
    big_bird,
    longformer,
    sparse_transformer_fixed,
    sparse_transformer_strided,
    star,
)
from minillm.layers.sparse_patterns import (
    band,
    block_local,
    causal,
    dilated,
    global_tokens,
    random_blocks,
    sliding_window,
)

PATTERNS: dict[str, Pattern] = {
    "causal": causal(),
    "everything": band(1000),
    "nothing": ~band(1000),
    "half of the rows": global_tokens([0], every=2) & ~global_tokens([0], every=2, symmetric=False),
    "window": sliding_window(7),
    "dilated": dilated(4, 4, 3),
    "block-local": block_local(6),
    "random": random_blocks(2, block_size=4, seed=3),
    "strided": sparse_transformer_strided(5),
    "fixed": sparse_transformer_fixed(6, 2),
    "Longformer": longformer(6, global_places=[0, 9]),
    "BigBird": big_bird(4),
    "causal BigBird": big_bird(4) & causal(),
    "Star": star(),
}


def _inputs(
    query_length: int,
    key_length: int,
    *,
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (8, 6),
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    shapes = [
        (batch, heads[0], query_length, dims[0]),
        (batch, heads[1], key_length, dims[0]),
        (batch, heads[1], key_length, dims[1]),
    ]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def _torchs(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Torch's attention in float64; a row that sees nothing is zeros there too."""
    bias = torch.zeros((), dtype=torch.float64) if bias is None else bias.double()
    scores = torch.where(allowed, bias, -torch.inf).expand(query.size(0), query.size(1), *allowed.shape[-2:])
    return F.scaled_dot_product_attention(query.double(), key.double(), value.double(), scores, enable_gqa=True)


def _check_equal(ours: Tensor, theirs: Tensor, inputs: list[Tensor], **tolerance: float) -> None:
    torch.testing.assert_close(ours.double(), theirs, **tolerance)
    gradient = torch.randn_like(ours)
    pairs = zip(
        torch.autograd.grad(ours, inputs, gradient),
        torch.autograd.grad(theirs, inputs, gradient.double()),
        strict=True,
    )
    for one, other in pairs:
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    ("query_length", "key_length", "block_size"), [(32, 32, 8), (29, 29, 8), (1, 21, 4), (10, 27, 5), (27, 10, 16)]
)
def test_values_and_gradients_are_torchs(name: str, query_length: int, key_length: int, block_size: int) -> None:
    inputs, pattern = _inputs(query_length, key_length), PATTERNS[name]
    ours = block_sparse_attention(*inputs, pattern, block_size=block_size)
    _check_equal(ours, _torchs(*inputs, pattern.dense(query_length, key_length)), inputs)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(PATTERNS)),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 50),
    st.sampled_from([(1, 1), (3, 3), (4, 2), (4, 1)]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_any_length_grouping_mask_and_bias(
    name: str,
    query_length: int,
    key_length: int,
    block_size: int,
    heads: tuple[int, int],
    is_causal: bool,
    with_bias: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    inputs, pattern = _inputs(query_length, key_length, heads=heads), PATTERNS[name]
    full = (2, heads[0], query_length, key_length)
    sizes = [[size if torch.rand(()) < 0.5 else 1 for size in full][int(torch.randint(4, ())) :] for _ in range(2)]
    mask = torch.rand(sizes[0]) < 0.7
    bias = torch.randn(sizes[1], dtype=torch.float64, requires_grad=True) if with_bias else None
    allowed = pattern.dense(query_length, key_length) & mask
    if is_causal:
        allowed = allowed & torch.ones(query_length, key_length).tril(key_length - query_length).bool()
    ours = block_sparse_attention(*inputs, pattern, mask=mask, bias=bias, causal=is_causal, block_size=block_size)
    _check_equal(ours, _torchs(*inputs, allowed, bias), inputs if bias is None else [*inputs, bias])


@pytest.mark.parametrize("pattern", [longformer(4), big_bird(2, n_random_blocks=1), sparse_transformer_strided(3)])
def test_gradcheck(pattern: Pattern) -> None:
    inputs = _inputs(5, 7, batch=1, heads=(2, 1), dims=(2, 1))
    bias = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(1, 1, 1, 7) < 0.8

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float) -> Tensor:
        torch.manual_seed(1)  # the same weights are dropped each time
        arguments = {"mask": mask, "bias": bias, "scale": 0.7, "dropout": dropout, "block_size": 2}
        return block_sparse_attention(query, key, value, pattern, **arguments)

    for dropout in (0.0, 0.4):
        assert torch.autograd.gradcheck(partial(attend, dropout=dropout), (*inputs, bias))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("name", ["Longformer", "causal BigBird", "strided", "nothing"])
def test_narrow_dtypes(name: str, dtype: torch.dtype, tolerance: float) -> None:
    inputs = _inputs(50, 50, dims=(32, 32), dtype=dtype)
    bias = torch.randn(4, 50, 50, requires_grad=True)  # float32 whatever the rest is, as a learned one under autocast
    ours = block_sparse_attention(*inputs, PATTERNS[name], bias=bias, block_size=16)
    assert ours.dtype == dtype
    theirs = _torchs(*inputs, PATTERNS[name].dense(50, 50), bias)
    _check_equal(ours, theirs, [*inputs, bias], atol=tolerance, rtol=tolerance)


def test_values_out_of_reach_stay_finite() -> None:
    # Scores far apart: exp underflows, and in float16 an unscaled product would overflow.
    query, key, value = (t.detach() for t in _inputs(20, 20, heads=(1, 1), dims=(64, 8), dtype=torch.float16))
    output = block_sparse_attention(query * 60, key * 20, value, sliding_window(5), block_size=8)
    expected = _torchs(query * 60, key * 20, value, sliding_window(5).dense(20, 20))
    torch.testing.assert_close(output.double(), expected, atol=5e-3, rtol=5e-3)
    bias = torch.full((20, 20), -torch.inf)
    assert block_sparse_attention(query, key, value, causal(), bias=bias, block_size=8).eq(0).all()


@pytest.mark.parametrize("block_size", [8, 4])  # with 4 a row's live keys are several ranges
@pytest.mark.parametrize("batch", [1, 2])
def test_a_strided_view_is_read_and_its_gradient_fits(batch: int, block_size: int) -> None:
    base = torch.randn(batch, 24, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    query, key, value = base.permute(2, 0, 3, 1, 4)
    _check_equal(
        block_sparse_attention(query, key, value, star(), block_size=block_size),
        _torchs(query, key, value, star().dense(24, 24)),
        [base],
    )


def test_an_expanded_key_and_a_cache_that_is_not_full() -> None:
    query, key, value = _inputs(12, 12)
    key, value = key[:1, :1].expand(2, 2, 12, 8), torch.randn(2, 2, 40, 6, dtype=torch.float64)[:, :, :12]
    ours = block_sparse_attention(query, key, value, star(), block_size=4)
    torch.testing.assert_close(ours, _torchs(query, key, value, star().dense(12, 12)))


def test_nothing_to_attend_from_or_to() -> None:
    some, none = torch.randn(1, 2, 5, 4, requires_grad=True), torch.zeros(1, 2, 0, 4)
    output = block_sparse_attention(some, none, none, star())
    assert torch.equal(output, torch.zeros(1, 2, 5, 4))
    assert torch.autograd.grad(output.sum(), some)[0].eq(0).all()
    assert block_sparse_attention(none, some, some, star()).shape == (1, 2, 0, 4)
    assert block_sparse_attention(some[:0], some[:0], some[:0], star()).shape == (0, 2, 5, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_near_to_float64_as_torchs_fused_kernel(dtype):
    inputs = [3 * tensor.detach() for tensor in _inputs(130, 130, dims=(64, 64), dtype=dtype)]
    mask = sliding_window(40).dense(130, 130)
    outputs = []
    for attend in (
        lambda *tensors: block_sparse_attention(*tensors, sliding_window(40), block_size=32),
        lambda *tensors: F.scaled_dot_product_attention(*tensors, mask, enable_gqa=True),
        lambda *tensors: F.scaled_dot_product_attention(*(t.double() for t in tensors), mask, enable_gqa=True),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = attend(*leaves)
        gradients = torch.autograd.grad(output.double().square().sum(), leaves)
        outputs.append([output.double(), *(gradient.double() for gradient in gradients)])
    for ours, fused, exact in zip(*outputs, strict=True):
        assert (ours - exact).norm() < 1.2 * (fused - exact).norm() + 1e-9


def test_scores_beyond_float16_are_no_trouble():
    query = torch.full((1, 1, 70, 64), 128.0, dtype=torch.float16)  # scores of 131,072
    torch.testing.assert_close(block_sparse_attention(query, query, query, causal(), block_size=32), query)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Longformer", "causal BigBird", "strided"])
def test_on_a_gpu_too(name: str, dtype: torch.dtype) -> None:
    inputs = [tensor.detach().cuda().requires_grad_() for tensor in _inputs(150, 150, dims=(32, 32), dtype=dtype)]
    bias, mask = torch.randn(4, 1, 150, device="cuda"), torch.rand(2, 1, 1, 150, device="cuda") < 0.8
    ours = block_sparse_attention(*inputs, PATTERNS[name], bias=bias, mask=mask)
    theirs = _torchs(*inputs, PATTERNS[name].dense(150, 150, device="cuda") & mask, bias)
    tolerance = 4e-2 if dtype is torch.bfloat16 else 1e-4
    _check_equal(ours, theirs, inputs, atol=tolerance, rtol=tolerance)
    block_sparse_attention(*inputs, PATTERNS[name], dropout=0.5).sum().backward()


def test_dropout_drops_weights_evenly_and_keeps_their_sum_on_average() -> None:
    length, p = 64, 0.3
    query, key = (torch.randn(8, 2, length, 4) for _ in range(2))
    value = torch.eye(length).expand(8, 2, length, length)  # the output is then the matrix of weights
    pattern = sliding_window(20)
    weights = block_sparse_attention(query, key, value, pattern)
    torch.manual_seed(5)
    dropped = block_sparse_attention(query, key, value, pattern, dropout=p)
    torch.manual_seed(5)
    assert torch.equal(dropped, block_sparse_attention(query, key, value, pattern, dropout=p))
    assert not torch.equal(dropped, block_sparse_attention(query, key, value, pattern, dropout=p))
    live = weights > 0
    zeroed = (dropped == 0)[live].double()
    assert abs(zeroed.mean() - p) < 4 * (p * (1 - p) / len(zeroed)) ** 0.5
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / (1 - p))


def test_each_row_of_tiles_drops_weights_of_its_own() -> None:
    query = torch.zeros(1, 1, 64, 4)
    value = torch.eye(64)[None, None]
    dropped = block_sparse_attention(query, query, value, band(64), dropout=0.5, block_size=16)[0, 0] == 0
    blocks = dropped.view(4, 16, 64)
    for i in range(4):
        for j in range(i):
            assert not torch.equal(blocks[i], blocks[j])


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    query = torch.randn(1, 1, 9, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(block_sparse_attention(query, query, query, causal()).sum(), query, create_graph=True)


@pytest.mark.parametrize(("batch", "value_dim"), [(0, 4), (1, 0)])
def test_nothing_in_many_ranges_is_nothing(batch: int, value_dim: int) -> None:
    query, value = torch.randn(batch, 2, 9, 4, requires_grad=True), torch.randn(batch, 2, 9, value_dim)
    output = block_sparse_attention(query, query, value, star(), block_size=2)
    assert output.shape == (batch, 2, 9, value_dim)
    output.sum().backward()
    assert query.grad is not None
    assert query.grad.eq(0).all()


def test_a_pattern_of_many_different_tiles_is_computed_as_any() -> None:
    pattern = random_blocks(5, block_size=1)
    assert len(pattern.blocks(200, 200, 16).masks) > 64
    inputs = _inputs(200, 200)
    _check_equal(
        block_sparse_attention(*inputs, pattern, block_size=16), _torchs(*inputs, pattern.dense(200, 200)), inputs
    )


def test_weights_on_request_are_the_dense_ones() -> None:
    query, key, value = _inputs(9, 12)
    mask = torch.rand(2, 1, 1, 12) < 0.7
    output, weights = block_sparse_attention(query, key, value, star(), mask=mask, causal=True, return_weights=True)
    torch.testing.assert_close(output, block_sparse_attention(query, key, value, star(), mask=mask, causal=True))
    allowed = star().dense(9, 12) & mask & torch.ones(9, 12).tril(3).bool()
    assert weights.masked_fill(allowed, 0).eq(0).all()
    torch.testing.assert_close(weights @ value.repeat_interleave(2, dim=1), output)


def test_attends_inside_multi_head_attention() -> None:
    layer = MultiHeadAttention(16, 4, n_kv_heads=2).double()
    x = torch.randn(2, 33, 16, dtype=torch.float64)
    pattern = longformer(8) & causal()
    sparse = layer(x, attend=partial(block_sparse_attention, pattern=pattern, block_size=8))
    dense = layer(x, mask=pattern.dense(33, 33))
    torch.testing.assert_close(sparse, dense)
    parameters = list(layer.parameters())
    gradient = torch.randn_like(x)
    for one, other in zip(
        torch.autograd.grad(sparse, parameters, gradient),
        torch.autograd.grad(dense, parameters, gradient),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_autocast_changes_nothing_inside() -> None:
    query, key, value = _inputs(30, 30, dtype=torch.float32)
    plain = block_sparse_attention(query, key, value, star(), block_size=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = block_sparse_attention(query, key, value, star(), block_size=8)
        assert torch.equal(under, plain)
        gradients = torch.autograd.grad(under.sum(), (query, key, value))
    for one, other in zip(gradients, torch.autograd.grad(plain.sum(), (query, key, value)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["window", "strided", "Longformer", "BigBird", "causal", "half of the rows"])
@pytest.mark.parametrize("length", [64, 75])
def test_the_work_done_is_that_of_the_live_tiles(name: str, length: int) -> None:
    query, key, value = _inputs(length, length, batch=1, heads=(4, 2), dims=(8, 8))
    cost = PATTERNS[name].blocks(length, length, 16).cost(8, n_heads=4, n_kv_heads=2)
    with FlopCounterMode(display=False) as forward:
        output = block_sparse_attention(query, key, value, PATTERNS[name], block_size=16)
    assert forward.get_total_flops() == cost.flops
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert backward.get_total_flops() == 5 * cost.flops / 2  # five products where forward has two
    dense = PATTERNS[name].blocks(length, length, 16).dense_cost(8, n_heads=4, n_kv_heads=2)
    with FlopCounterMode(display=False) as everything:
        scores = query @ key.repeat_interleave(2, 1).mT
        _ = scores @ value.repeat_interleave(2, 1)
    assert everything.get_total_flops() == dense.flops
    assert dense.score_bytes == 4 * scores.numel()


def test_one_row_of_scores_exists_at_a_time_and_two_in_the_backward_pass(
    peak_bytes: Callable[[Callable[[], object]], int],
) -> None:
    inputs = [torch.randn(1, 4, 4096, 4, requires_grad=True) for _ in range(3)]  # small beside a row of scores
    scores = causal().blocks(4096, 4096, 64).cost(4, n_heads=4).score_bytes
    with torch.no_grad():
        assert peak_bytes(lambda: block_sparse_attention(*inputs, causal())) < 1.5 * scores
    assert peak_bytes(lambda: block_sparse_attention(*inputs, causal()).sum().backward()) < 2.7 * scores


def test_memory_grows_with_the_length_and_not_its_square(
    peak_bytes: Callable[[Callable[[], object]], int],
) -> None:
    def step(length: int) -> int:
        inputs = [torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3)]
        pattern = longformer(64)
        assert pattern.blocks(length, length, 32).rows  # made once for all layers and steps

        def run() -> None:
            block_sparse_attention(*inputs, pattern, block_size=32).sum().backward()

        return peak_bytes(run)

    short, long = step(1024), step(4096)
    assert long < 4.2 * short
    assert long < 4096 * 4096 / 3  # a third of what the boolean matrix alone would take


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"pattern": torch.ones(4, 4).bool()}, TypeError, "pattern must be a Pattern"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1"),
        ({"mask": torch.ones(4, 4)}, ValueError, "mask must be boolean"),
        ({"mask": torch.ones(5, 4).bool()}, ValueError, "mask must broadcast"),
        ({"bias": torch.ones(4, 4).bool()}, ValueError, "bias must be floating"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"query": torch.randn(1, 3, 4, 2)}, ValueError, "multiple of the heads"),
        ({"value": torch.randn(1, 2, 4, 2).half()}, TypeError, "one floating-point dtype"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, object], error: type[Exception], words: str) -> None:
    arguments = {name: torch.randn(1, 2, 4, 2) for name in ("query", "key", "value")} | {"pattern": causal()}
    with pytest.raises(error, match=words):
        block_sparse_attention(**(arguments | change))
