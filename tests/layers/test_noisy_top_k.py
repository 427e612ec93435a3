"""Noisy top-k gating against the paper's formulas pair by pair, and its load estimate against redrawn noise."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from minillm.layers.moe import MixtureOfExperts
from minillm.layers.routers import NoisyTopKRouter, Routing
from minillm.layers.routers.noisy_top_k import selection_probabilities, squared_variation


def make_router(d_model: int = 6, n_experts: int = 5, k: int = 2, **options: float) -> NoisyTopKRouter:
    """One with signal: both matrices start as zeros."""
    router = NoisyTopKRouter(d_model, n_experts, k, **options)
    nn.init.normal_(router.weight)
    nn.init.normal_(router.noise_weight)
    return router


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def normal_cdf(value: float) -> float:
    return 0.5 * math.erfc(-value / math.sqrt(2.0))


def squared_cv(values: list[float]) -> float:
    return statistics.pvariance(values) / statistics.mean(values) ** 2


def paper(router: NoisyTopKRouter, x: Tensor, noise: Tensor) -> tuple[list[list[float]], list[float], list[float]]:
    """Gates, importance and load of Shazeer et al. 2017, equations 3-5 and 8-10 and section 4, a pair at a time."""
    n_experts, k = router.n_experts, router.k
    gates, importance, load = [], [0.0] * n_experts, [0.0] * n_experts
    for t, row in enumerate(x.tolist()):
        clean = [sum(a * b for a, b in zip(row, w, strict=True)) for w in router.weight.tolist()]
        spread = [softplus(sum(a * b for a, b in zip(row, w, strict=True))) for w in router.noise_weight.tolist()]
        h = [c + float(noise[t, i]) * s for i, (c, s) in enumerate(zip(clean, spread, strict=True))]
        edge = sorted(h, reverse=True)[k - 1]
        total = sum(math.exp(v) for v in h if v >= edge)
        gates.append([math.exp(v) / total if v >= edge else 0.0 for v in h])
        for i in range(n_experts):
            importance[i] += gates[-1][i]
            others = sorted((h[j] for j in range(n_experts) if j != i), reverse=True)
            load[i] += 1.0 if k == n_experts else normal_cdf((clean[i] - others[k - 1]) / spread[i])
    return gates, importance, load


def dense(routing: Routing) -> Tensor:
    """(n_tokens, n_experts): the weight of each pair, 0 where there is no assignment."""
    gates = routing.weights.new_zeros(routing.n_tokens, routing.n_experts)
    return gates.index_put((routing.tokens, routing.experts), routing.weights, accumulate=True)


@pytest.mark.parametrize(("n_experts", "k"), [(5, 2), (4, 1), (3, 3), (1, 1), (8, 7)])
def test_equals_the_papers_formulas_pair_by_pair(n_experts: int, k: int) -> None:
    router = make_router(6, n_experts, k, importance_loss=0.3, load_loss=0.7).double()
    x = torch.randn(11, 6, dtype=torch.float64)
    torch.manual_seed(7)
    routing = router(x)
    torch.manual_seed(7)
    gates, importance, load = paper(router, x, torch.randn(11, n_experts, dtype=torch.float64))
    torch.testing.assert_close(dense(routing), torch.tensor(gates, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert routing.losses["importance"].item() == pytest.approx(0.3 * squared_cv(importance), rel=1e-10, abs=1e-12)
    assert routing.losses["load"].item() == pytest.approx(0.7 * squared_cv(load), rel=1e-10, abs=1e-12)
    torch.testing.assert_close(routing.probabilities, (x @ router.weight.t()).softmax(dim=1))


def test_selection_probability_is_the_frequency_under_redrawn_noise() -> None:
    """One expert's noise is drawn 40,000 times, the others' stays: how often is it among the k?"""
    logits, deviation = torch.randn(3, 5, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64) + 0.3
    scores = logits + torch.randn_like(logits) * deviation
    k, draws = 2, 40_000
    estimate = selection_probabilities(logits, scores, deviation, scores.topk(k).indices)
    assert (estimate > 0.02).any()
    assert (estimate < 0.98).any()
    for t in range(3):
        for i in range(5):
            redrawn = scores[t].expand(draws, 5).clone()
            redrawn[:, i] = logits[t, i] + torch.randn(draws, dtype=torch.float64) * deviation[t, i]
            frequency = (redrawn.topk(k).indices == i).any(dim=1).double().mean().item()
            assert estimate[t, i].item() == pytest.approx(frequency, abs=5 * 0.5 / math.sqrt(draws))


def test_mean_estimated_load_is_the_mean_load() -> None:
    """Over all noise the estimate's mean is the chance to be chosen: 30,000 copies of one token are as many draws."""
    router = make_router()
    x = torch.randn(1, 6).expand(30_000, 6)
    logits = router.logits(x)
    deviation = router.noise_deviation(x)
    scores = logits + torch.randn_like(logits) * deviation
    experts = scores.topk(2).indices
    estimated = selection_probabilities(logits, scores, deviation, experts).mean(dim=0)
    counted = torch.bincount(experts.flatten(), minlength=5) / 30_000
    torch.testing.assert_close(estimated, counted, rtol=0, atol=0.015)


def test_gradients() -> None:
    router = make_router(4, 5, 2).double()
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def outputs(x: Tensor, weight: Tensor, noise_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(3)
        routing = functional_call(router, {"weight": weight, "noise_weight": noise_weight}, (x,))
        return routing.weights, routing.losses["importance"], routing.losses["load"]

    assert torch.autograd.gradcheck(outputs, (x, router.weight, router.noise_weight))


def test_load_loss_moves_the_noise_and_not_only_the_logits() -> None:
    router = make_router(importance_loss=0.0)
    routing = router(torch.randn(32, 6))
    assert set(routing.losses) == {"load"}
    routing.losses["load"].backward()
    for parameter in (router.weight, router.noise_weight):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize(("name", "k"), [("importance_loss", 2), ("load_loss", 2), ("load_loss", 1)])
def test_each_loss_alone_evens_a_router_that_sends_everything_to_one_expert(name: str, k: int) -> None:
    router = NoisyTopKRouter(4, 4, k, **{"importance_loss": 0.0, "load_loss": 0.0, name: 1.0})
    x = torch.randn(256, 4)
    x[:, 0] = 1.0
    with torch.no_grad():
        router.weight[0, 0] = 4.0
    figure = (lambda r: dense(r).sum(dim=0)) if name == "importance_loss" else (lambda r: r.assigned)
    before = figure(router(x))
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        sum(router(x).losses.values()).backward()
        optimizer.step()
    after = figure(router(x))
    mean = 256 / 4 if name == "importance_loss" else 256 * k / 4
    assert before.max() > 1.9 * mean
    assert after.max() < 1.4 * mean


def test_importance_cannot_teach_where_every_weight_is_one() -> None:
    router = make_router(k=1, load_loss=0.0)
    router(torch.randn(32, 6)).losses["importance"].backward()
    assert router.weight.grad is not None
    assert router.weight.grad.abs().max() < 1e-6


def test_evaluation_has_no_noise_and_counts_the_load() -> None:
    router = make_router(importance_loss=1.0, load_loss=1.0).eval()
    x = torch.randn(13, 6)
    first, second = router(x), router(x)
    assert torch.equal(first.experts, second.experts)
    assert torch.equal(first.weights, second.weights)
    values, experts = (x @ router.weight.t()).topk(2)
    torch.testing.assert_close(first.weights, values.softmax(dim=1).t().flatten())
    assert torch.equal(first.experts, experts.t().flatten())
    assert first.losses["load"].item() == pytest.approx(squared_cv(first.assigned.tolist()), rel=1e-5)
    assert first.losses["importance"].item() == pytest.approx(squared_cv(dense(first).sum(dim=0).tolist()), rel=1e-5)


def test_starts_with_no_signal_and_some_noise() -> None:
    router = NoisyTopKRouter(8, 4, 2)
    assert not router.weight.any()
    assert not router.noise_weight.any()
    share = router(torch.randn(4000, 8)).assigned / 4000
    torch.testing.assert_close(share, torch.full((4,), 0.5), rtol=0, atol=0.05)


def test_losses_of_coefficient_zero_are_left_out() -> None:
    x = torch.randn(5, 6)
    assert make_router(importance_loss=0.0, load_loss=0.0)(x).losses == {}
    assert set(make_router(z_loss=0.001)(x).losses) == {"importance", "load", "z"}


def test_noise_that_underflows_leaves_gradients_finite() -> None:
    router = NoisyTopKRouter(2, 4, 2)
    nn.init.constant_(router.noise_weight, -1e4)
    nn.init.normal_(router.weight)
    routing = router(torch.ones(3, 2))
    (routing.weights.square().sum() + sum(routing.losses.values())).backward()
    for parameter in router.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("n_tokens", "n_experts", "k"), [(0, 4, 2), (1, 4, 2), (3, 1, 1), (3, 4, 4), (0, 1, 1)])
def test_edges(training: bool, n_tokens: int, n_experts: int, k: int) -> None:
    router = make_router(6, n_experts, k).train(training)
    routing = router(torch.randn(n_tokens, 6))
    assert routing.choices == k
    assert routing.weights.shape == (n_tokens * k,)
    assert all(math.isfinite(loss.item()) for loss in routing.losses.values())
    if n_tokens == 0 or n_experts == 1:
        assert all(loss.item() == 0 for loss in routing.losses.values())
    if k == n_experts:
        assert routing.losses["load"].item() == 0
    (routing.weights.sum() + sum(routing.losses.values())).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in router.parameters())


def test_refusals() -> None:
    for name in ("importance_loss", "load_loss"):
        for value in (-0.1, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"{name} must be at least 0 and finite"):
                NoisyTopKRouter(4, 4, 2, **{name: value})
    router = make_router()
    with pytest.raises(ValueError, match="router logits must be finite numbers, got NaN for token 1"):
        router(torch.tensor([[0.0] * 6, [math.nan] * 6]))
    with torch.no_grad():
        router.noise_weight[2, 3] = math.nan
    with pytest.raises(ValueError, match="noise deviations must be finite numbers, got another for token 0"):
        router(torch.ones(2, 6))
    router.eval()(torch.ones(2, 6))  # no noise, no refusal


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_models_route_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    router = make_router()
    x = torch.randn(7, 6)
    if not autocast:
        router, x = router.to(dtype), x.to(dtype)
    torch.manual_seed(2)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        routing = router(x)
    torch.manual_seed(2)
    expected = router.float()(x.float())
    assert routing.weights.dtype == routing.probabilities.dtype == torch.float32
    assert torch.equal(routing.experts, expected.experts)
    assert torch.equal(routing.weights, expected.weights)
    for name, loss in routing.losses.items():
        assert loss.dtype == torch.float32
        assert torch.equal(loss, expected.losses[name])


def test_float64_stays() -> None:
    routing = make_router().double()(torch.randn(4, 6, dtype=torch.float64))
    assert {t.dtype for t in (routing.weights, routing.probabilities, *routing.losses.values())} == {torch.float64}


def test_frozen_router_still_passes_gradients_to_the_tokens() -> None:
    router = make_router().requires_grad_(False)
    x = torch.randn(4, 6, requires_grad=True)
    routing = router(x)
    (routing.weights.square().sum() + sum(routing.losses.values())).backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("training", [True, False])
def test_compiled_equals_eager(training: bool) -> None:
    router = make_router().train(training)
    x = torch.randn(9, 6)
    compiled = torch.compile(router, fullgraph=True, backend="eager")
    torch.manual_seed(1)
    expected = router(x)
    torch.manual_seed(1)
    routing = compiled(x)
    assert torch.equal(routing.experts, expected.experts)
    assert torch.equal(routing.weights, expected.weights)
    assert routing.losses == expected.losses


def test_inside_a_mixture() -> None:
    mixture = MixtureOfExperts(6, 8, 4, 2, router="noisy_top_k").eval()
    nn.init.normal_(mixture.router.weight)
    x = torch.randn(2, 5, 6)
    out, record = mixture(x)
    gates = dense(record.routing).reshape(2, 5, 4)
    expected = sum(gates[..., i : i + 1] * mixture.experts.one(x, i) for i in range(4))
    torch.testing.assert_close(out, expected)
    assert record.load.sum() == 20


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n_tokens=st.integers(1, 12), n_experts=st.integers(1, 7), seed=st.integers(0, 10_000))
def test_invariants(data: st.DataObject, n_tokens: int, n_experts: int, seed: int) -> None:
    k = data.draw(st.integers(1, n_experts))
    torch.manual_seed(seed)
    routing = make_router(3, n_experts, k, importance_loss=1.0, load_loss=1.0)(torch.randn(n_tokens, 3))
    gates = dense(routing)
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(n_tokens))
    assert ((gates > 0).sum(dim=1) <= k).all()
    assert routing.assigned.sum() == k * n_tokens
    pairs = set(zip(routing.tokens.tolist(), routing.experts.tolist(), strict=True))
    assert len(pairs) == k * n_tokens  # no expert twice for a token
    for loss in routing.losses.values():
        assert 0.0 <= loss.item() <= n_experts - 1 + 1e-4


@given(st.lists(st.floats(0.0, 100.0, allow_subnormal=False), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_squared_variation(values: list[float]) -> None:
    value = squared_variation(torch.tensor(values, dtype=torch.float64)).item()
    if statistics.mean(values) > 1e-100:
        assert value == pytest.approx(squared_cv(values), rel=1e-9, abs=1e-9)
    assert 0.0 <= value <= len(values) - 1 + 1e-9
