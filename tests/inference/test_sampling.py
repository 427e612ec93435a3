"""The filtered distributions against transformers' warpers, and the draws against the distribution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from minillm.inference import candidates, sample

# Upper 1e-6 quantiles of chi-square: a fair sampler fails one seed in a million, and the seeds are fixed.
CHI_SQUARE = {4: 33.4, 9: 45.1}


def _distribution(logits, **settings_):
    probabilities, ids = candidates(logits, **settings_)
    return torch.zeros_like(logits).scatter_(-1, ids, probabilities)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocab=st.integers(1, 60),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([None, 1, 2, 10, 100]),
    top_p=st.sampled_from([None, 1e-6, 0.3, 0.9, 0.999, 1.0]),
)
def test_equals_the_warpers_of_transformers(seed, vocab, temperature, top_k, top_p):
    torch.manual_seed(seed)
    logits = torch.randn(3, vocab) * 3
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None:
        scores = TopPLogitsWarper(top_p)(None, scores)
    ours = _distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(ours, scores.softmax(-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "kept"), [({}, 10), ({"temperature": 0.5}, 10), ({"top_k": 5}, 5), ({"top_k": 8, "top_p": 0.9}, 5)]
)
def test_draws_follow_the_distribution(arguments, kept):
    n = 20000
    probabilities = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.08, 0.06, 0.05, 0.03, 0.02, 0.01])
    if "top_p" in arguments:
        probabilities = torch.tensor([0.4, 0.2, 0.15, 0.1, 0.1, 0.02, 0.01, 0.01, 0.005, 0.005])
    logits = probabilities[torch.randperm(10)].log()
    expected = _distribution(logits[None], **arguments)[0] * n
    assert (expected > 0).sum() == kept
    generator = torch.Generator().manual_seed(1)
    counts = sample(logits.expand(n, 10), generator=generator, **arguments).bincount(minlength=10)
    assert not counts[expected == 0].any()
    statistic = ((counts - expected).square() / expected)[expected > 0].sum().item()
    assert statistic < CHI_SQUARE[kept - 1]


def test_greedy_takes_the_largest_and_draws_nothing():
    logits = torch.tensor([[1.0, 5.0, 5.0], [0.0, -1.0, -2.0]])
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert sample(logits, temperature=0.0, generator=generator).tolist() == [1, 0]
    assert torch.equal(generator.get_state(), state)
    assert sample(logits, top_k=1).tolist()[1] == 0


def test_a_tiny_temperature_is_greedy_and_not_nan():
    logits = torch.tensor([[1e4, -1e4, 1e4 - 1.0]])
    assert _distribution(logits, temperature=1e-30).tolist() == [[1.0, 0.0, 0.0]]


def test_bfloat16_logits_are_summed_in_float32():
    probabilities, _ = candidates(torch.zeros(1, 1000, dtype=torch.bfloat16))
    assert probabilities.dtype is torch.float32
    assert abs(probabilities.sum().item() - 1) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, r"temperature must be 0 \(greedy\) or a positive finite number, got -1.0"),
        ({"temperature": float("nan")}, "got nan"),
        ({"temperature": float("inf")}, "got inf"),
        ({"top_k": 0}, "top_k must be None or an integer of at least 1, got 0"),
        ({"top_k": 2.0}, "got 2.0"),
        ({"top_p": 0.0}, "top_p must be None or a number above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "got 1.5"),
        ({"temperature": 0.0}, "temperature must be above 0 for probabilities"),
    ],
)
def test_bad_settings_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        candidates(torch.zeros(1, 3), **arguments)


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 1e-50, 5e-324])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_a_temperature_near_0_is_greedy(temperature, options):
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0], [0.0, 0.5, 0.5 + 1e-6, 0.25]])
    expected = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    assert torch.equal(_distribution(logits, temperature=temperature, **options), expected)
    assert sample(logits, temperature=temperature, **options).tolist() == [1, 2]
