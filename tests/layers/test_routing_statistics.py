"""Routing statistics agree with a count token by token, add up exactly over batches, and are defined for none."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from minillm.layers import MixtureOfExperts, MoERecord, RoutingStatistics, routing_statistics
from minillm.layers.routers import Routing

ROUTERS = ["softmax", "switch", "noisy_top_k", "expert_choice", "sigmoid"]


def record_of(router: str, n_tokens: int, n_experts: int, factor: float | None, seed: int = 0) -> MoERecord:
    """What a small mixture with strong preferences does with random tokens."""
    torch.manual_seed(seed)
    k = 1 if router == "switch" else min(2, n_experts)
    moe = MixtureOfExperts(8, 4, n_experts, k, router=router, capacity_factor=factor)
    torch.nn.init.normal_(moe.router.weight)
    _, record = moe(torch.randn(n_tokens, 8))
    return record


def by_hand(record: MoERecord) -> RoutingStatistics:
    """The same numbers from a Python loop over assignments and numpy in float64."""
    routing = record.routing
    assigned, load = [0] * routing.n_experts, [0] * routing.n_experts
    workers: list[set[int]] = [set() for _ in range(routing.n_tokens)]
    for token, expert, kept in zip(
        routing.tokens.tolist(), routing.experts.tolist(), record.kept.tolist(), strict=True
    ):
        assigned[expert] += 1
        if kept:
            load[expert] += 1
            workers[token].add(expert)
    entropy = 0.0
    for scores in routing.probabilities.detach().double().numpy():
        p = scores / scores.sum()
        entropy -= sum(x * math.log(x) for x in p if x > 0)
    return RoutingStatistics(
        routing.n_tokens, tuple(assigned), tuple(load), sum(not one for one in workers), float(entropy)
    )


def routed_to(experts: list[int], n_experts: int, kept: list[bool] | None = None) -> MoERecord:
    """A record in which token t went to experts[t], its router undecided."""
    n_tokens = len(experts)
    probabilities = torch.full((n_tokens, n_experts), 1.0 / n_experts)
    chosen = torch.tensor(experts, dtype=torch.int64)
    routing = Routing(torch.arange(n_tokens), chosen, torch.ones(n_tokens), probabilities, {}, choices=1)
    return MoERecord(routing, torch.ones(n_tokens, dtype=torch.bool) if kept is None else torch.tensor(kept))


@settings(max_examples=40, deadline=None)
@given(
    router=st.sampled_from(ROUTERS),
    n_tokens=st.integers(0, 30),
    n_experts=st.integers(2, 6),
    factor=st.sampled_from([None, 0.3, 1.0, 2.0]),
    seed=st.integers(0, 99),
)
def test_agrees_with_counting_by_hand(router, n_tokens, n_experts, factor, seed):
    record = record_of(router, n_tokens, n_experts, factor, seed)
    got, expected = routing_statistics(record), by_hand(record)
    assert (got.assigned, got.load, got.n_tokens) == (expected.assigned, expected.load, n_tokens)
    assert got.n_tokens_without_expert == expected.n_tokens_without_expert
    assert_allclose(got.entropy_sum, expected.entropy_sum, rtol=1e-6, atol=1e-7)

    assert got.n_assignments == len(record.kept) == sum(got.load) + sum(got.dropped)
    assert got.load == tuple(record.load.tolist())
    assert all(number >= 0 for number in got.dropped)
    assert 0.0 <= got.drop_rate <= 1.0
    assert 0.0 <= got.tokens_without_expert <= 1.0
    assert 0.0 <= got.entropy <= math.log(n_experts) + 1e-9
    if got.n_assignments:
        assert_allclose(sum(got.share), 1.0)
        assert_allclose(got.drop_rate, 1.0 - record.kept.double().mean().item())
        counts = np.array(got.assigned)
        assert_allclose(got.max_over_mean, counts.max() / counts.mean())
        assert_allclose(got.coefficient_of_variation, counts.std() / counts.mean(), atol=1e-12)
        share = torch.tensor(got.share, dtype=torch.float64)
        assert_allclose(got.load_entropy, torch.distributions.Categorical(share).entropy().item(), atol=1e-6)
        assert got.idle_experts == n_experts - np.count_nonzero(counts)


def test_a_balanced_layer_and_a_collapsed_one_reach_the_ends_of_the_scales():
    balanced = routing_statistics(routed_to([0, 1, 2, 3] * 5, 4))
    assert balanced.share == (0.25,) * 4
    assert (balanced.max_over_mean, balanced.coefficient_of_variation, balanced.idle_experts) == (1.0, 0.0, 0)
    assert_allclose([balanced.load_entropy, balanced.entropy], math.log(4))
    collapsed = routing_statistics(routed_to([2] * 20, 4))
    assert collapsed.share == (0.0, 0.0, 1.0, 0.0)
    assert (collapsed.max_over_mean, collapsed.load_entropy, collapsed.idle_experts) == (4.0, 0.0, 3)
    assert_allclose(collapsed.coefficient_of_variation, math.sqrt(3))


def test_drops_are_counted_as_assignments_and_as_tokens():
    # Two choices each: token 0 loses one of them, token 1 both.
    experts, weights = torch.tensor([[0, 1], [0, 1], [0, 1]]), torch.full((3, 2), 0.5)
    routing = Routing.from_choices(experts, weights, torch.full((3, 3), 1 / 3), {})
    kept = torch.tensor([False, False, True, True, False, True])  # first choices of all tokens, then second ones
    statistics = routing_statistics(MoERecord(routing, kept))
    assert (statistics.assigned, statistics.load, statistics.dropped) == ((3, 3, 0), (1, 2, 0), (2, 1, 0))
    assert statistics.drop_rate == 0.5
    assert statistics.tokens_without_expert == 1 / 3


def test_a_token_that_no_expert_chose_is_counted():
    routing = Routing(
        torch.tensor([0, 2]), torch.tensor([0, 1]), torch.ones(2), torch.full((4, 2), 0.5), {}, choices=None
    )
    statistics = routing_statistics(MoERecord(routing, torch.ones(2, dtype=torch.bool)))
    assert (statistics.drop_rate, statistics.tokens_without_expert) == (0.0, 0.5)


@pytest.mark.parametrize("n_experts", [1, 3])
def test_an_empty_batch_is_all_zeros(n_experts):
    statistics = routing_statistics(routed_to([], n_experts))
    assert statistics == RoutingStatistics(0, (0,) * n_experts, (0,) * n_experts, 0, 0.0)
    numbers = statistics.to_dict()
    assert numbers.pop("share") == numbers.pop("assigned") == numbers.pop("load") == [0] * n_experts
    assert set(numbers.values()) == {0}


def test_one_expert_is_balanced():
    statistics = routing_statistics(record_of("softmax", 5, 1, None))
    assert (statistics.share, statistics.max_over_mean, statistics.load_entropy) == ((1.0,), 1.0, 0.0)
    assert statistics.entropy == 0.0


def test_sigmoid_scores_are_normalised_and_zeros_prefer_nobody():
    scores = torch.tensor([[0.2, 0.2, 0.2], [0.9, 0.0, 0.0], [0.0, 0.0, 0.0], [0.5, 0.25, 0.25]])
    routing = Routing(torch.arange(4), torch.zeros(4, dtype=torch.int64), torch.ones(4), scores, {}, choices=1)
    statistics = routing_statistics(MoERecord(routing, torch.ones(4, dtype=torch.bool)))
    assert_allclose(statistics.entropy_sum, math.log(3) + 0.0 + math.log(3) + 1.5 * math.log(2), rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 24), max_size=4))
def test_merging_batches_is_the_same_as_one_batch(seed, cuts):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(24, 4, generator=generator, dtype=torch.float64)
    kept = torch.rand(24, generator=generator) < 0.7

    def record(first: int, last: int) -> MoERecord:
        probabilities = logits[first:last].softmax(-1)
        weights, experts = probabilities.topk(1)
        return MoERecord(Routing.from_choices(experts, weights, probabilities, {}), kept[first:last])

    whole = routing_statistics(record(0, 24))
    parts = [routing_statistics(record(*ends)) for ends in pairwise([0, *sorted(cuts), 24])]
    merged = RoutingStatistics.merge(parts)
    assert merged == RoutingStatistics.merge(parts[::-1]), "in any order, to the last bit"
    assert (merged.n_tokens, merged.assigned, merged.load) == (24, whole.assigned, whole.load)
    assert merged.share == whole.share
    assert merged.tokens_without_expert == whole.tokens_without_expert
    assert_allclose(merged.entropy, whole.entropy, rtol=1e-12)


def test_merging_weighs_tokens_not_batches():
    long, short = routing_statistics(routed_to([0] * 9, 2)), routing_statistics(routed_to([1], 2, kept=[False]))
    merged = RoutingStatistics.merge(iter([long, short]))
    assert merged.share == (0.9, 0.1)
    assert (merged.drop_rate, merged.tokens_without_expert) == (0.1, 0.1)


def test_merging_nothing_or_other_experts_is_refused():
    with pytest.raises(ValueError, match="got none"):
        RoutingStatistics.merge([])
    with pytest.raises(ValueError, match=r"one number of experts, got \[2, 3\]"):
        RoutingStatistics.merge([routing_statistics(routed_to([0], 2)), routing_statistics(routed_to([0], 3))])


def test_goes_through_json():
    statistics = routing_statistics(record_of("softmax", 20, 4, 0.5))
    numbers = json.loads(json.dumps(statistics.to_dict()))
    assert numbers == statistics.to_dict()
    for name, value in numbers.items():
        expected = getattr(statistics, name)
        assert value == (list(expected) if isinstance(expected, tuple) else expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counts_of_a_half_precision_layer(dtype):
    moe = MixtureOfExperts(8, 4, 4, 2).to(dtype)
    _, record = moe(torch.randn(10, 8, dtype=dtype))
    statistics = routing_statistics(record)
    assert sum(statistics.load) == 20
    assert_allclose(statistics.entropy_sum, by_hand(record).entropy_sum, rtol=1e-6)


def test_leaves_the_gradients_alone():
    moe = MixtureOfExperts(8, 4, 4, 2)
    out, record = moe(torch.randn(10, 8))
    routing_statistics(record)
    out.sum().backward()
    assert moe.router.weight.grad is not None
