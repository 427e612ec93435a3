"""Which expert gets which label: counts by a loop, lift and mutual information by their definitions in numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.testing import assert_allclose

from minillm.layers import (
    MixtureOfExperts,
    MoERecord,
    Preference,
    expert_information,
    expert_lift,
    expert_preferences,
    expert_token_counts,
    main_experts,
)
from minillm.layers.routers import Routing

TABLES = arrays(np.int64, array_shapes(min_dims=2, max_dims=2, max_side=7), elements=st.integers(0, 30))


def record_of(router: str, shape: tuple[int, ...], factor: float | None = None, k: int = 2) -> MoERecord:
    moe = MixtureOfExperts(8, 4, 4, k, router=router, capacity_factor=factor)
    torch.nn.init.normal_(moe.router.weight)
    _, record = moe(torch.randn(*shape, 8))
    return record


def triples(record: MoERecord) -> list[tuple[int, int, float]]:
    """(token, expert, weight) of what was worked on."""
    routing = record.routing
    rows = zip(routing.tokens.tolist(), routing.experts.tolist(), routing.weights.tolist(), strict=True)
    return [row for row, kept in zip(rows, record.kept.tolist(), strict=True) if kept]


@pytest.mark.parametrize("router", ["softmax", "expert_choice", "sigmoid"])
@pytest.mark.parametrize("factor", [None, 0.5])
def test_counts_are_those_of_a_loop(router, factor):
    record = record_of(router, (3, 7), factor)
    labels = torch.randint(5, (3, 7))
    expected = np.zeros((4, 5), dtype=np.int64)
    for token, expert, _ in triples(record):
        expected[expert, labels.flatten()[token]] += 1
    counts = expert_token_counts(record, labels, 5)
    assert counts.dtype is torch.int64
    np.testing.assert_array_equal(counts, expected)
    assert counts.sum(dim=1).tolist() == record.load.tolist()


def test_counts_of_batches_add_up_and_a_routing_counts_every_assignment():
    records = [record_of("softmax", (6,), factor=0.5) for _ in range(3)]
    labels = [torch.randint(3, (6,), dtype=torch.int32) for _ in records]
    counts = sum(expert_token_counts(record.routing, row, 3) for record, row in zip(records, labels, strict=True))
    expected = 2 * torch.bincount(torch.cat(labels), minlength=3)  # k = 2, before drops
    assert counts.sum(dim=0).tolist() == expected.tolist()
    kept = sum(expert_token_counts(record, row, 3) for record, row in zip(records, labels, strict=True))
    assert (kept <= counts).all()
    assert kept.sum() == sum(int(record.kept.sum()) for record in records) < counts.sum()


def test_padding_is_left_out_with_its_label():
    moe = MixtureOfExperts(8, 4, 4, 1)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    labels = torch.tensor([[0, 1, 9], [1, 9, 9]])
    _, record = moe(torch.randn(2, 3, 8), token_mask=mask)
    assert expert_token_counts(record, labels[mask], 2).sum(dim=0).tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"each of the 3 routed tokens, got \(2, 3\)"):
        expert_token_counts(record, labels, 10)


def test_an_empty_batch_counts_nothing():
    record = record_of("softmax", (0,))
    assert expert_token_counts(record, torch.zeros(0, dtype=torch.int64), 3).tolist() == [[0] * 3] * 4
    assert main_experts(record) == []


@pytest.mark.parametrize(
    ("labels", "n_labels", "error", "words"),
    [
        (torch.zeros(4), 3, TypeError, "integers, got torch.float32"),
        (torch.zeros(4, dtype=torch.bool), 3, TypeError, "integers, got torch.bool"),
        (torch.tensor([0, 1, 2, 3]), 3, ValueError, r"\[0, n_labels=3\), got 0 to 3"),
        (torch.tensor([0, -100, 2, 1]), 3, ValueError, "got -100 to 2"),
        (torch.tensor([0, 1]), 3, ValueError, "each of the 4 routed tokens"),
        (torch.tensor([0, 0, 0, 0]), 0, ValueError, "n_labels must be at least 1, got 0"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, n_labels, error, words):
    with pytest.raises(error, match=words):
        expert_token_counts(record_of("softmax", (4,)), labels, n_labels)


@pytest.mark.parametrize("router", ["softmax", "expert_choice", "sigmoid", "noisy_top_k"])
@pytest.mark.parametrize("factor", [None, 0.4])
def test_the_main_expert_has_the_largest_weight_of_those_that_had_room(router, factor):
    record = record_of(router, (20,), factor)
    weights: dict[int, list[tuple[float, int]]] = {}
    for token, expert, weight in triples(record):
        weights.setdefault(token, []).append((-weight, expert))
    expected = [min(weights[token])[1] if token in weights else None for token in range(20)]
    assert main_experts(record) == expected
    if factor:
        assert None in expected


def test_on_a_tie_the_main_expert_is_the_lowest_number():
    routing = Routing.from_choices(torch.tensor([[2, 1], [3, 0]]), torch.full((2, 2), 0.5), torch.rand(2, 4), {})
    assert main_experts(routing) == [1, 0]


@settings(max_examples=60, deadline=None)
@given(TABLES)
def test_lift_and_information_follow_their_definitions(counts):
    total = counts.sum()
    lift = expert_lift(torch.from_numpy(counts)).numpy()
    found = expert_information(torch.from_numpy(counts))
    if total == 0:
        assert np.isnan(lift).all()
        assert found == (0.0, 0.0, 0.0)
        return
    joint = counts / total
    by_expert, by_label = joint.sum(1), joint.sum(0)
    for expert, label in np.ndindex(counts.shape):
        if by_expert[expert] == 0 or by_label[label] == 0:
            assert np.isnan(lift[expert, label])
        else:
            assert_allclose(lift[expert, label], joint[expert, label] / by_label[label] / by_expert[expert])

    def entropy(p):
        return -sum(x * math.log(x) for x in p.flatten() if x > 0)

    # I(e; l) = H(e) + H(l) - H(e, l), not the formula of the module.
    assert_allclose(found.nats, entropy(by_expert) + entropy(by_label) - entropy(joint), atol=1e-12)
    limit = min(entropy(by_expert), entropy(by_label))
    if limit > 0:
        assert_allclose(found.normalised, found.nats / limit, atol=1e-12)
    assert 0.0 <= found.normalised <= 1.0


@settings(max_examples=40, deadline=None)
@given(TABLES, st.randoms(use_true_random=False))
def test_names_of_experts_and_labels_do_not_matter(counts, random):
    rows, columns = (random.sample(range(n), n) for n in counts.shape)
    shuffled = torch.from_numpy(counts[np.ix_(rows, columns)])
    assert expert_information(shuffled) == expert_information(torch.from_numpy(counts))
    lift = expert_lift(torch.from_numpy(counts)).numpy()
    np.testing.assert_array_equal(expert_lift(shuffled).numpy(), lift[np.ix_(rows, columns)])


def test_information_has_its_ends():
    determined = torch.tensor([[10, 0, 0, 30], [0, 20, 5, 0]])  # four labels, each with its expert
    assert expert_information(determined).normalised == pytest.approx(1.0)
    assert expert_information(determined.t()).normalised == pytest.approx(1.0)
    independent = torch.tensor([[10, 20, 30], [1, 2, 3]])
    assert expert_information(independent).nats == pytest.approx(0.0, abs=1e-15)
    assert expert_information(torch.tensor([[3, 4]])) == (0.0, 0.0, 0.0)  # one expert


def test_chance_is_what_independent_experts_and_labels_show():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        experts, labels = rng.integers(8, size=2000), rng.choice(5, p=[0.4, 0.3, 0.1, 0.1, 0.1], size=2000)
        counts = np.histogram2d(experts, labels, bins=(np.arange(9), np.arange(6)))[0].astype(np.int64)
        found.append(expert_information(torch.from_numpy(counts)))
    assert found[0].chance == 7 * 4 / 4000
    assert_allclose(np.mean([one.nats for one in found]), found[0].chance, rtol=0.1)


def test_preferences_are_the_labels_taken_above_the_share():
    counts = torch.tensor([[40, 2, 50, 8], [10, 0, 50, 40]])  # 100 assignments each
    first, second = expert_preferences(counts, min_count=2)
    assert [(one.label, one.n_tokens) for one in first] == [(1, 2), (0, 40)]
    assert_allclose([one.lift for one in first], [1.0 / 0.5, 0.8 / 0.5])
    assert second == [Preference(3, 40, pytest.approx(40 / 48 / 0.5))]
    assert expert_preferences(counts)[0][0].label == 0, "ten tokens at least, unless told otherwise"
    assert [len(one) for one in expert_preferences(counts, top=1, min_count=0)] == [1, 1]


@settings(max_examples=30, deadline=None)
@given(TABLES)
def test_preferences_are_sorted_above_one_and_complete(counts):
    lift = expert_lift(torch.from_numpy(counts)).numpy()
    for expert, found in enumerate(expert_preferences(torch.from_numpy(counts), top=100, min_count=3)):
        expected = {label for label in range(counts.shape[1]) if lift[expert, label] > 1 and counts[expert, label] >= 3}
        assert {one.label for one in found} == expected
        assert [one.lift for one in found] == sorted((lift[expert, label] for label in expected), reverse=True)
        assert all(one.n_tokens == counts[expert, one.label] for one in found)


def test_an_idle_expert_prefers_nothing():
    assert expert_preferences(torch.tensor([[0, 0], [20, 20]])) == [[], []]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: expert_lift(torch.zeros(3)), r"\(n_experts, n_labels\), neither 0, got \(3,\)"),
        (lambda: expert_information(torch.zeros(0, 3)), r"got \(0, 3\)"),
        (lambda: expert_lift(torch.tensor([[1, -1]])), "none negative"),
        (lambda: expert_information(torch.tensor([[1.0, math.nan]])), "none negative"),
        (lambda: expert_preferences(torch.ones(2, 2), top=0), "top must be at least 1, got 0"),
        (lambda: expert_preferences(torch.ones(2, 2), min_count=-1), "min_count must be at least 0, got -1"),
    ],
)
def test_wrong_counts_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
