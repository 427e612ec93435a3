"""Softmax statistics in one pass are those of two and torch's; merged partial attention is the whole attention."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from minillm.layers.online_softmax import (
    SoftmaxState,
    merge_partial_attention,
    online_softmax,
    softmax_statistics,
    softmax_statistics_two_pass,
)

examples = settings(max_examples=30, deadline=None)


def _scores(rows: int, n: int, hidden: float, spread: float, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    scores = spread * torch.randn(rows, n, dtype=torch.float64)
    return scores.masked_fill(torch.rand(rows, n) < hidden, -math.inf)


@examples
@given(
    st.integers(1, 4),
    st.integers(0, 30),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.4, 0.9, 1.0]),
    st.sampled_from([1.0, 300.0]),  # beyond what exp holds in float64 without the maximum
    st.integers(0, 2**20),
)
def test_one_pass_is_two_passes_is_torch(rows, n, block_size, hidden, spread, seed):
    scores = _scores(rows, n, hidden, spread, seed)
    expected = torch.logsumexp(scores, -1)
    highest, total = softmax_statistics(scores, block_size=block_size)
    for one, other in zip((highest, total), softmax_statistics_two_pass(scores, block_size=block_size), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0)
    torch.testing.assert_close(highest + total.log(), expected, rtol=1e-13, atol=1e-13)
    if n:
        assert torch.equal(highest, scores.amax(-1))
    softmax = torch.softmax(scores, -1).nan_to_num(0.0)  # torch's rows of -inf are NaN
    torch.testing.assert_close(online_softmax(scores, block_size=block_size), softmax, rtol=1e-12, atol=0)


def test_the_running_sum_is_corrected_when_the_maximum_rises():
    scores = torch.tensor([[0.0, 1.0, 2.0, 800.0]])  # each is the highest so far
    highest, total = softmax_statistics(scores, block_size=1)
    assert highest.item() == 800
    assert total.item() == 1
    highest, total = softmax_statistics(scores[:, :3], block_size=1)
    assert total.item() == pytest.approx(1 + math.exp(-1) + math.exp(-2))


@examples
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([torch.float64, torch.float32]),
    st.integers(0, 2**20),
)
def test_attention_over_blocks_is_attention(widths, hidden, dtype, seed):
    scores = _scores(3, sum(widths), hidden, 4.0, seed).to(dtype)
    values = torch.randn(sum(widths), 5, dtype=dtype)
    state = SoftmaxState.empty(scores.new_empty(3, 7), 5)
    for block, part in zip(scores.split(widths, -1), values.split(widths), strict=True):
        state.update(block.clone(), part)
    output, log_sums = state.result()
    expected = torch.softmax(scores, -1).nan_to_num(0.0) @ values
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(log_sums, torch.logsumexp(scores, -1), rtol=tolerance, atol=tolerance)


def test_dropped_weights_stay_in_the_sum():
    scores, values = torch.randn(2, 6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    kept = torch.tensor([0.0, 2.0, 0.0, 2.0, 2.0, 2.0], dtype=torch.float64).expand(2, 6)
    state = SoftmaxState.empty(scores, 6)
    state.update(scores[:, :2].clone(), values[:2], kept[:, :2])
    state.update(scores[:, 2:].clone(), values[2:], kept[:, 2:])
    torch.testing.assert_close(state.result()[0], scores.softmax(-1) * kept)


def _parts(queries: int, widths: list[int], hidden: float, seed: int) -> tuple[list[torch.Tensor], ...]:
    """Attention with one score per pair over each part of the keys: its outputs and log-sum-exps, and the inputs."""
    scores = _scores(queries, sum(widths), hidden, 3.0, seed).requires_grad_()
    values = torch.randn(sum(widths), 4, dtype=torch.float64, requires_grad=True)
    outputs, log_sums = [], []
    for block, part in zip(scores.split(widths, -1), values.split(widths), strict=True):
        empty = (block == -math.inf).all(-1, keepdim=True)
        outputs.append((block.masked_fill(empty, 0.0).softmax(-1) @ part).masked_fill(empty, 0.0))
        log_sums.append(block.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty[:, 0], -math.inf))
    return outputs, log_sums, [scores, values]


@examples
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.6, 0.95, 1.0]),
    st.integers(0, 2**20),
)
def test_merged_parts_are_the_whole_with_its_gradients(widths, hidden, seed):
    outputs, log_sums, inputs = _parts(3, widths, hidden, seed)
    scores, values = inputs
    merged, log_sum = merge_partial_attention(torch.stack(outputs), torch.stack(log_sums))
    empty = (scores == -math.inf).all(-1, keepdim=True)
    expected = (scores.masked_fill(empty, 0.0).softmax(-1) @ values).masked_fill(empty, 0.0)
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_sum, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(merged)
    total = scores.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty[:, 0], 0.0)
    ours = torch.autograd.grad((merged * gradient).sum() + log_sum.masked_fill(empty[:, 0], 0.0).sum(), inputs)
    for one, other in zip(ours, torch.autograd.grad((expected * gradient).sum() + total.sum(), inputs), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("base", [0.0, 1e4, -1e4])
def test_parts_far_apart_merge_without_overflow(base):
    outputs = torch.tensor([[[1.0]], [[2.0]], [[4.0]]])
    log_sums = (base + torch.tensor([[-900.0], [700.0], [700.0]])).requires_grad_()
    merged, log_sum = merge_partial_attention(outputs, log_sums)
    assert merged.item() == 3.0
    assert log_sum.item() == pytest.approx(base + 700 + math.log(2))
    (gradient,) = torch.autograd.grad(merged.sum() + log_sum.sum(), log_sums)
    torch.testing.assert_close(gradient, torch.tensor([[0.0], [0.5 * (1 + 2 - 3)], [0.5 * (1 + 4 - 3)]]))


def test_any_order_and_any_grouping_merge_to_the_same():
    outputs, log_sums, _ = _parts(4, [3, 2, 5, 1], 0.5, 7)
    whole = merge_partial_attention(torch.stack(outputs), torch.stack(log_sums))
    order = [2, 0, 3, 1]
    one_by_one = outputs[order[0]], log_sums[order[0]]
    for part in order[1:]:  # as ring attention merges: what is there, and what comes round
        one_by_one = merge_partial_attention(
            torch.stack([one_by_one[0], outputs[part]]), torch.stack([one_by_one[1], log_sums[part]])
        )
    for one, other in zip(whole, one_by_one, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_two_halves_of_the_keys_in_half_precision():
    query, key, value = (torch.randn(2, 3, 8, 16) for _ in range(3))
    outputs, log_sums = [], []
    for part in (slice(0, 5), slice(5, 8)):
        scores = query @ key[:, :, part].mT / 4
        outputs.append((scores.softmax(-1) @ value[:, :, part]).bfloat16())
        log_sums.append(scores.logsumexp(-1))
    merged, log_sum = merge_partial_attention(torch.stack(outputs), torch.stack(log_sums))
    assert merged.dtype == torch.bfloat16
    assert log_sum.dtype == torch.float32
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(merged.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: softmax_statistics(torch.zeros(2, 3), block_size=0), "block_size must be at least 1"),
        (lambda: softmax_statistics_two_pass(torch.zeros(2, 3), block_size=0), "block_size must be at least 1"),
        (lambda: merge_partial_attention(torch.zeros(2, 3, 4), torch.zeros(2, 4)), "got shapes"),
        (lambda: merge_partial_attention(torch.zeros(0, 3, 4), torch.zeros(0, 3)), "at least one part"),
    ],
)
def test_refuses_what_does_not_fit(run, words):
    with pytest.raises(ValueError, match=words):
        run()


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (lambda: online_softmax(torch.zeros(2, 3).long(), block_size=1), "scores"),
        (lambda: softmax_statistics_two_pass(torch.zeros(2, 3).long(), block_size=1), "scores"),
        (lambda: merge_partial_attention(torch.zeros(2, 3, 4).long(), torch.zeros(2, 3)), "outputs"),
        (lambda: merge_partial_attention(torch.zeros(2, 3, 4), torch.zeros(2, 3).long()), "log_sums"),
    ],
)
def test_integers_are_refused_and_not_cut_off(run, name):
    with pytest.raises(TypeError, match=f"{name} must be floating point, got torch.int64"):
        run()
