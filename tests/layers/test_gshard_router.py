"""GShard's top-2 gating against transformers' NLLB-MoE router and algorithm 1 of the paper, token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import NllbMoeConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

from minillm.layers import MixtureOfExperts
from minillm.layers.dispatch import kept_assignments
from minillm.layers.routers import GShardRouter, Routing, TopKRouter, make_router

D_MODEL, N_EXPERTS, N_TOKENS = 12, 8, 60


def _algorithm_1(
    x: Tensor, weight: Tensor, capacity: int, draws: Tensor | None = None
) -> tuple[Tensor, Tensor, list[int]]:
    """Combine weights (n_tokens, n_experts), the loss times n_experts squared, and the tokens whose second was asked.

    Lepikhin et al. 2021, algorithm 1, in Python numbers and one token after the other; draws: its uniform numbers, None
    for none. A second expert that is not asked leaves its place in the buffer (section 2.2), as in Lingvo.
    """
    n_tokens, n_experts = x.size(0), weight.size(0)
    gates = (x @ weight.t()).softmax(dim=-1)
    combine = [[torch.zeros((), dtype=x.dtype) for _ in range(n_experts)] for _ in range(n_tokens)]
    count = [0] * n_experts

    def top_2(token: int) -> tuple[int, int, Tensor, Tensor]:
        first, second = sorted(range(n_experts), key=lambda e: -float(gates[token, e].detach()))[:2]
        total = gates[token, first] + gates[token, second]
        return first, second, gates[token, first] / total, gates[token, second] / total

    for token in range(n_tokens):
        first, _, gate, _ = top_2(token)
        if count[first] < capacity:
            combine[token][first] = gate
        count[first] += 1
    mean_gates = gates.mean(dim=0)
    loss = sum(count[e] / n_tokens * mean_gates[e] for e in range(n_experts)) / n_experts
    asked = []
    for token in range(n_tokens):
        _, second, _, gate = top_2(token)
        if draws is not None and not 2.0 * gate > draws[token]:
            continue
        asked.append(token)
        if count[second] < capacity:
            combine[token][second] = gate
        count[second] += 1
    return torch.stack([torch.stack(row) for row in combine]), loss * n_experts**2, asked


def _combine(routing: Routing, capacity: int | None) -> Tensor:
    """The routing as a matrix (n_tokens, n_experts) of weights, zero where there was no room."""
    kept = kept_assignments(routing, capacity)
    index = (routing.tokens[kept], routing.experts[kept])
    return torch.zeros_like(routing.probabilities).index_put(index, routing.weights[kept])


def _router(**options: float | bool) -> GShardRouter:
    router = GShardRouter(D_MODEL, N_EXPERTS, **options)
    nn.init.normal_(router.weight, std=0.3)
    return router


@pytest.mark.parametrize("capacity", [1, 5, 15, 2 * N_TOKENS])
def test_equals_transformers_nllb_router_with_capacity_and_gradients(capacity):
    # Their policy "random" is not GShard's: it draws by g2 before normalisation. So this is policy "all".
    twin = NllbMoeTop2Router(
        NllbMoeConfig(
            d_model=D_MODEL,
            num_experts=N_EXPERTS,
            expert_capacity=capacity,
            second_expert_policy="all",
            normalize_router_prob_before_dropping=True,
        )
    )
    router = _router()
    with torch.no_grad():
        twin.classifier.weight.copy_(router.weight)
    x = torch.randn(N_TOKENS, D_MODEL)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    first, expected, logits = twin(other)
    routing = router(mine)
    assert routing.choices == 2
    torch.testing.assert_close(router.logits(x), logits)
    combine = _combine(routing, capacity)
    torch.testing.assert_close(combine, expected)
    assert (int(kept_assignments(routing, capacity).sum()) < 2 * N_TOKENS) == (capacity < 2 * N_TOKENS)
    kept_first = kept_assignments(routing, capacity)[:N_TOKENS]
    assert torch.equal(routing.experts[:N_TOKENS][kept_first], first.argmax(-1)[kept_first])
    mix = torch.randn(N_TOKENS, N_EXPERTS)
    (combine * mix).sum().backward()
    (expected * mix).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad)
    torch.testing.assert_close(router.weight.grad, twin.classifier.weight.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("random_second", [False, True])
@pytest.mark.parametrize("capacity", [1, 6, 2 * N_TOKENS])
def test_equals_algorithm_1_token_by_token_with_gradients(capacity, random_second):
    router = _router(balance_loss=1.0, random_second=random_second).double()
    weight = router.weight.detach().clone().requires_grad_()
    x = torch.randn(N_TOKENS, D_MODEL, dtype=torch.float64)
    torch.manual_seed(7)
    draws = torch.rand(N_TOKENS, dtype=torch.float64)
    expected, loss, asked = _algorithm_1(x, weight, capacity, draws if random_second else None)
    torch.manual_seed(7)
    routing = router(x)
    combine = _combine(routing, capacity)
    torch.testing.assert_close(combine, expected)
    torch.testing.assert_close(routing.losses["balance"], loss)
    assert routing.tokens.tolist() == [*range(N_TOKENS), *asked]
    assert (len(asked) < N_TOKENS) == random_second
    mix = torch.randn(N_TOKENS, N_EXPERTS, dtype=torch.float64)
    ours = torch.autograd.grad((combine * mix).sum() + routing.losses["balance"], router.weight)[0]
    theirs = torch.autograd.grad((expected * mix).sum() + loss, weight)[0]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("share", [0.5, 0.3, 0.05, 0.0])
def test_the_second_expert_is_asked_with_twice_its_normalised_weight(share):
    """Within five standard errors over 20,000 tokens; never if its gate has underflown, always at equal gates."""
    router = GShardRouter(3, 4, random_second=True)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, -300.0], [0.0, 0.0, -300.0]]))
    n_tokens = 20_000
    # The second logit so much below the first that its gate is `share` of both; the others are out of sight.
    difference = float(torch.logit(torch.tensor(share))) if share else -200.0
    x = torch.tensor([0.0, difference, 1.0]).expand(n_tokens, 3)
    routing = router(x)
    n_asked = len(routing.experts) - n_tokens
    if share in (0.0, 0.5):
        assert n_asked == int(2 * share * n_tokens)
    else:
        assert n_asked / n_tokens == pytest.approx(2 * share, abs=5 * (2 * share * (1 - 2 * share) / n_tokens) ** 0.5)
    assert routing.weights[:n_tokens].eq(routing.weights[0]).all()
    assert routing.weights[0].item() == pytest.approx(1 - share, abs=1e-5)  # the first's does not grow


def test_a_second_choice_not_asked_is_neither_an_assignment_nor_a_drop():
    router = _router(random_second=True)
    layer = MixtureOfExperts(D_MODEL, 16, N_EXPERTS, 2, router=router, capacity_factor=float(N_EXPERTS))
    out, record = layer(torch.randn(N_TOKENS, D_MODEL))
    routing = record.routing
    assert routing.choices is None
    not_asked = 2 * N_TOKENS - len(routing.experts)
    assert 0 < not_asked < N_TOKENS
    assert record.kept.all()  # nothing dropped
    assert int(record.load.sum()) == int(routing.assigned.sum()) == 2 * N_TOKENS - not_asked
    assert torch.bincount(routing.tokens, minlength=N_TOKENS).tolist().count(1) == not_asked
    assert (out != 0).any(-1).all()


def test_a_second_choice_not_asked_leaves_its_place_to_another():
    """Expert 1 has one place; the token that stands before has a hopeless second choice there."""
    router = GShardRouter(3, 3, random_second=True)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    x = torch.tensor([[200.0, 50.0, 0.0], [9.0, 9.0 - 1e-5, 0.0]])
    routing = router(x)
    assert routing.tokens.tolist() == [0, 1, 1]
    assert routing.experts.tolist() == [0, 0, 1]
    assert kept_assignments(routing, 2).tolist() == [True, True, True]
    router.eval()
    assert router(x).experts.tolist() == [0, 0, 1, 1]
    assert kept_assignments(router(x), 1).tolist() == [True, False, True, False]


@pytest.mark.parametrize("dispatch", ["sorted", "einsum"])
def test_gradients_flow_through_a_mixture_with_random_second_experts(dispatch):
    router = GShardRouter(4, 4, random_second=True)
    nn.init.normal_(router.weight)
    layer = MixtureOfExperts(4, 5, 4, 2, router=router, dispatch=dispatch).double()
    nn.init.normal_(layer.experts.down)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        torch.manual_seed(3)
        return torch.func.functional_call(layer, {"router.weight": weight}, (x,))[0]

    assert torch.autograd.gradcheck(run, (x, router.weight), atol=1e-7)


def test_off_by_default_and_in_evaluation():
    x = torch.randn(N_TOKENS, D_MODEL)
    assert not make_router("glam", D_MODEL, N_EXPERTS, 2).random_second
    random, plain = _router(random_second=True), _router()
    plain.load_state_dict(random.state_dict())
    assert plain(x).choices == 2
    assert random(x).choices is None
    random.eval()
    ours, expected = random(x), plain(x)
    assert torch.equal(ours.experts, expected.experts)
    assert torch.equal(ours.weights, expected.weights)
    assert random(torch.randn(0, D_MODEL)).choices == 2
    assert random.train()(torch.randn(0, D_MODEL)).assigned.tolist() == [0] * N_EXPERTS


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_it_is_top_2_but_for_the_balance_loss(data):
    n_experts, n_tokens = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 30))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    x = torch.randn(n_tokens, 8)
    ours = GShardRouter(8, n_experts, balance_loss=1.0, z_loss=0.1, random_second=True)
    top_2 = TopKRouter(8, n_experts, 2, balance_loss=1.0, z_loss=0.1)
    ours.weight = top_2.weight
    ours.eval()
    routing, expected = ours(x), top_2(x)
    assert torch.equal(routing.experts, expected.experts)
    assert torch.equal(routing.weights, expected.weights)
    torch.testing.assert_close(routing.weights.view(2, -1).sum(0), torch.ones(n_tokens))
    assert torch.equal(routing.losses["z"], expected.losses["z"])
    first = torch.bincount(routing.experts[:n_tokens], minlength=n_experts) / n_tokens
    by_hand = n_experts * (first * routing.probabilities.mean(0)).sum()
    torch.testing.assert_close(routing.losses["balance"], by_hand)
    ours.train()
    shortened = ours(x)
    assert shortened.experts[:n_tokens].tolist() == routing.experts[:n_tokens].tolist()
    assert torch.equal(shortened.losses["balance"], routing.losses["balance"])
    assert n_tokens <= len(shortened.experts) <= 2 * n_tokens
    assert torch.equal(shortened.tokens[:n_tokens], torch.arange(n_tokens))
    rest = shortened.tokens[n_tokens:]
    assert torch.equal(shortened.experts[n_tokens:], routing.experts[n_tokens:][rest])
    assert torch.equal(shortened.weights[n_tokens:], routing.weights[n_tokens:][rest])


def test_other_numbers_of_choices_are_refused():
    for k in (1, 3):
        with pytest.raises(ValueError, match=f"k must be 2 for GShard's gating, got {k}"):
            GShardRouter(8, 4, k)
    with pytest.raises(ValueError, match="k must be at most n_experts=1, got 2"):
        GShardRouter(8, 1)
