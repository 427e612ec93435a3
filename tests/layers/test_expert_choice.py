"""Expert choice against a loop over experts in numpy, and the price of it: the choice looks at later tokens."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from minillm.layers.dispatch import kept_assignments
from minillm.layers.moe import MixtureOfExperts
from minillm.layers.routers import ExpertChoiceRouter, Routing, make_router


def router_with_signal(d_model: int = 6, n_experts: int = 4, k: int = 2, **options: float) -> ExpertChoiceRouter:
    router = ExpertChoiceRouter(d_model, n_experts, k, **options)
    nn.init.normal_(router.weight)
    return router


def brute_force(router: ExpertChoiceRouter, x: Tensor) -> tuple[list[tuple[int, int, float]], list[list[float]]]:
    """(token, expert, weight) triples, an expert at a time, each expert's best token first."""
    logits = x.detach().double().numpy() @ router.weight.detach().double().numpy().T
    exponentials = np.exp(logits)
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    capacity = math.ceil(router.k * len(logits) / router.n_experts)
    triples = []
    for expert in range(router.n_experts):
        for token in np.argsort(-probabilities[:, expert], kind="stable")[:capacity]:
            triples.append((int(token), expert, float(probabilities[token, expert])))
    return triples, probabilities.tolist()


def triples_of(routing: Routing) -> list[tuple[int, int, float]]:
    """Expert by expert, in the order of the list."""
    order = routing.experts.argsort(stable=True)
    columns = (routing.tokens[order].tolist(), routing.experts[order].tolist(), routing.weights[order].tolist())
    return list(zip(*columns, strict=True))


@pytest.mark.parametrize(
    ("n_tokens", "n_experts", "k"), [(12, 4, 2), (13, 4, 2), (7, 5, 1), (1, 4, 1), (3, 8, 2), (6, 3, 3)]
)
def test_equals_a_loop_over_the_experts(n_tokens: int, n_experts: int, k: int) -> None:
    router = router_with_signal(6, n_experts, k).double()
    x = torch.randn(n_tokens, 6, dtype=torch.float64)
    routing = router(x)
    triples, probabilities = brute_force(router, x)
    found = triples_of(routing)
    assert [pair[:2] for pair in found] == [pair[:2] for pair in triples]
    assert [pair[2] for pair in found] == pytest.approx([pair[2] for pair in triples], rel=1e-12)
    torch.testing.assert_close(routing.probabilities, torch.tensor(probabilities, dtype=torch.float64))
    assert routing.choices is None
    assert routing.losses == {}


@pytest.mark.parametrize(("n_tokens", "capacity"), [(0, 0), (1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (4096, 2048)])
def test_capacity_is_rounded_up(n_tokens: int, capacity: int) -> None:
    assert ExpertChoiceRouter(4, 4, 2).capacity(n_tokens) == capacity


def test_tokens_with_two_experts_and_with_none_are_counted() -> None:
    """The softmax is over experts: the large logits of token 0 are a third each, so the surer tokens win."""
    router = ExpertChoiceRouter(3, 3, 1)
    logits = torch.tensor([[9.0, 9.0, 9.0], [5.0, 0.0, 5.0], [0.0, 5.0, 0.0]])
    routing = router.route(logits, torch.zeros(3, 3))
    assert routing.tokens.bincount(minlength=3).tolist() == [0, 2, 1]
    assert routing.assigned.tolist() == [1, 1, 1]


def test_a_token_nobody_wants_leaves_the_mixture_as_zero() -> None:
    mixture = MixtureOfExperts(6, 8, 4, 1, router="expert_choice")
    nn.init.normal_(mixture.router.weight)
    x = torch.randn(16, 6)
    out, record = mixture(x)
    per_token = record.routing.tokens.bincount(minlength=16)
    assert per_token.sum() == 16
    assert (per_token == 0).any()
    assert not out[per_token == 0].any()
    assert (out[per_token > 0] != 0).any(dim=1).all()
    assert record.load.tolist() == [4, 4, 4, 4]


@pytest.mark.parametrize("dispatch", ["sorted", "einsum"])
def test_mixture_equals_a_sum_over_all_pairs(dispatch: str) -> None:
    mixture = MixtureOfExperts(6, 8, 4, 2, router="expert_choice", dispatch=dispatch).double()
    nn.init.normal_(mixture.router.weight)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    out, _ = mixture(x)
    expected = torch.zeros(15, 6, dtype=torch.float64)
    for token, expert, weight in brute_force(mixture.router, x.reshape(15, 6))[0]:
        expected[token] += weight * mixture.experts.one(x.reshape(15, 6)[token], expert)
    torch.testing.assert_close(out.reshape(15, 6), expected)


@pytest.mark.parametrize("n_tokens", [1, 15, 16])
def test_a_mixture_of_capacity_factor_one_drops_nothing(n_tokens: int) -> None:
    mixture = MixtureOfExperts(6, 8, 4, 2, router="expert_choice", capacity_factor=1.0)
    _, record = mixture(torch.randn(n_tokens, 6))
    assert record.kept.all()


def test_a_smaller_capacity_keeps_the_best_tokens_of_each_expert() -> None:
    routing = router_with_signal()(torch.randn(20, 6))
    kept = kept_assignments(routing, 3)
    for expert in range(4):
        mine = routing.experts == expert
        assert kept[mine].sum() == 3
        assert routing.weights[mine & kept].min() >= routing.weights[mine & ~kept].max()


def test_not_causal_a_later_token_changes_what_earlier_ones_get() -> None:
    """Why it is no router for left-to-right generation; token choice has no such leak."""
    x = torch.randn(10, 6)
    changed = x.clone()
    changed[-1] *= 20.0

    def earlier(routing: Routing) -> set[tuple[int, int]]:
        pairs = zip(routing.tokens.tolist(), routing.experts.tolist(), strict=True)
        return {pair for pair in pairs if pair[0] < 9}

    router = router_with_signal()
    assert earlier(router(x)) != earlier(router(changed))
    causal = make_router("softmax", 6, 4, 2)
    assert earlier(causal(x)) == earlier(causal(changed))


def test_gradients() -> None:
    router = router_with_signal(z_loss=0.1).double()
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)

    def outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        routing = functional_call(router, {"weight": weight}, (x,))
        return routing.weights, routing.probabilities, routing.losses["z"]

    assert torch.autograd.gradcheck(outputs, (x, router.weight))


def test_empty_batch() -> None:
    routing = router_with_signal(z_loss=0.1)(torch.zeros(0, 6))
    assert routing.tokens.shape == routing.experts.shape == routing.weights.shape == (0,)
    assert routing.tokens.dtype == routing.experts.dtype == torch.int64
    assert routing.assigned.tolist() == [0, 0, 0, 0]
    routing.weights.sum().backward()


def test_all_experts_for_all_tokens_and_one_expert() -> None:
    everything = router_with_signal(6, 4, 4)(torch.randn(5, 6))
    assert everything.tokens.bincount().tolist() == [4] * 5
    alone = router_with_signal(6, 1, 1)(torch.randn(5, 6))
    assert sorted(alone.tokens.tolist()) == [0, 1, 2, 3, 4]
    assert alone.weights.tolist() == [1.0] * 5


def test_refusals() -> None:
    with pytest.raises(ValueError, match="k must be at most n_experts=4, got 5"):
        ExpertChoiceRouter(6, 4, 5)
    with pytest.raises(ValueError, match="router logits must be finite numbers, got NaN for token 1"):
        router_with_signal()(torch.tensor([[0.0] * 6, [math.nan] * 6]))
    with pytest.raises(ValueError, match="balance_loss"):
        make_router("expert_choice", 6, 4, 2, balance_loss=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_models_route_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    router, x = router_with_signal(), torch.randn(10, 6)
    if not autocast:
        router, x = router.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        routing = router(x)
    expected = router.float()(x.float())
    assert routing.weights.dtype == routing.probabilities.dtype == torch.float32
    assert torch.equal(routing.tokens, expected.tokens)
    assert torch.equal(routing.weights, expected.weights)


def test_float64_stays() -> None:
    routing = router_with_signal(z_loss=0.1).double()(torch.randn(4, 6, dtype=torch.float64))
    assert {t.dtype for t in (routing.weights, routing.probabilities, routing.losses["z"])} == {torch.float64}


def test_frozen_router_still_passes_gradients_to_the_tokens() -> None:
    x = torch.randn(8, 6, requires_grad=True)
    router_with_signal().requires_grad_(False)(x).weights.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


def test_compiled_equals_eager() -> None:
    router = router_with_signal()
    compiled = torch.compile(router, fullgraph=True, backend="eager", dynamic=True)
    for n_tokens in (9, 14):  # another number of tokens is another capacity
        x = torch.randn(n_tokens, 6)
        routing, expected = compiled(x), router(x)
        assert torch.equal(routing.tokens, expected.tokens)
        assert torch.equal(routing.weights, expected.weights)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), n_tokens=st.integers(1, 20), n_experts=st.integers(1, 7), seed=st.integers(0, 10_000))
def test_invariants(data: st.DataObject, n_tokens: int, n_experts: int, seed: int) -> None:
    k = data.draw(st.integers(1, n_experts))
    router = ExpertChoiceRouter(3, n_experts, k)
    torch.manual_seed(seed)
    logits, x = torch.randn(n_tokens, n_experts, dtype=torch.float64), torch.empty(n_tokens, 3)
    routing = router.route(logits, x)
    # Every expert has exactly its capacity, of different tokens; k experts a token on average, rounded up.
    capacity = router.capacity(n_tokens)
    assert routing.assigned.tolist() == [capacity] * n_experts
    assert k * n_tokens <= capacity * n_experts < k * n_tokens + n_experts
    assert 1 <= capacity <= n_tokens
    found = triples_of(routing)
    assert len({pair[:2] for pair in found}) == capacity * n_experts
    assert torch.equal(routing.weights, routing.probabilities[routing.tokens, routing.experts])
    # The order of the tokens does not matter.
    order = torch.randperm(n_tokens)
    shuffled = router.route(logits[order], x)
    back = [(int(order[token]), expert, weight) for token, expert, weight in triples_of(shuffled)]
    assert sorted(back) == sorted(found)
