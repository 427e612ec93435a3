"""Dispatch by sorting and by one-hot matrices, against loops over single assignments."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minillm.layers import Experts
from minillm.layers.dispatch import (
    einsum_dispatch,
    expert_capacity,
    kept_assignments,
    permute,
    plan_dispatch,
    sorted_dispatch,
    unpermute,
)
from minillm.layers.routers import Routing

DISPATCHES = [sorted_dispatch, einsum_dispatch]


def _chosen(n_tokens: int, n_experts: int, k: int, dtype: torch.dtype = torch.float64) -> Routing:
    """Each token k different experts, drawn at random."""
    experts = torch.rand(n_tokens, n_experts).argsort(1)[:, :k]
    weights = torch.randn(n_tokens, k, dtype=dtype, requires_grad=True)
    return Routing.from_choices(experts, weights, torch.rand(n_tokens, n_experts, dtype=dtype), {})


def _listed(n_tokens: int, n_experts: int, n: int, dtype: torch.dtype = torch.float64) -> Routing:
    """n different pairs in any order: tokens with many experts and tokens with none."""
    pairs = torch.randperm(n_tokens * n_experts)[:n]
    weights = torch.randn(len(pairs), dtype=dtype, requires_grad=True)
    probabilities = torch.rand(n_tokens, n_experts, dtype=dtype)
    return Routing(pairs // n_experts, pairs % n_experts, weights, probabilities, {})


def _routings(n_tokens: int = 9, n_experts: int = 4, dtype: torch.dtype = torch.float64) -> list[Routing]:
    return [
        _chosen(n_tokens, n_experts, 2, dtype),
        _chosen(n_tokens, n_experts, n_experts, dtype),
        _listed(n_tokens, n_experts, 13, dtype),
    ]


def _experts(n_experts: int = 4, d_model: int = 5) -> Experts:
    experts = Experts(d_model, 3, n_experts, bias=True).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


def _one_by_one(x: Tensor, routing: Routing, kept: Tensor, experts: Experts) -> Tensor:
    out = [torch.zeros_like(row) for row in x]
    for number in range(len(kept)):
        if kept[number]:
            token, expert = int(routing.tokens[number]), int(routing.experts[number])
            out[token] = out[token] + routing.weights[number] * experts.one(x[token], expert)
    return torch.stack(out)


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("capacity", [None, 1, 3])
def test_equals_a_loop_over_assignments(dispatch, number, capacity):
    routing, experts = _routings()[number], _experts()
    x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    kept = kept_assignments(routing, capacity)
    out, expected = dispatch(x, routing, kept, experts), _one_by_one(x, routing, kept, experts)
    torch.testing.assert_close(out, expected)
    inputs, gradient = (x, routing.weights, *experts.parameters()), torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(y, inputs, gradient, retain_graph=True) for y in (out, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert not ours[1][~kept].any()


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("number", [0, 2])
def test_first_and_second_derivatives(dispatch, number):
    routing, experts = _routings(4, 3)[number], _experts(3, 2)
    kept = kept_assignments(routing, 2)

    def run(x: Tensor, weights: Tensor, up: Tensor) -> Tensor:
        return dispatch(x, Routing(**{**vars(routing), "weights": weights}), kept, experts)

    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    weights = routing.weights.detach().requires_grad_()
    assert torch.autograd.gradcheck(run, (x, weights, experts.up))
    assert torch.autograd.gradgradcheck(run, (x, weights, experts.up))


@settings(max_examples=40, deadline=None)
@given(
    n_tokens=st.integers(0, 12),
    n_experts=st.integers(1, 6),
    n=st.integers(0, 30),
    capacity=st.none() | st.integers(1, 5),
    listed=st.booleans(),
)
def test_places_plan_and_the_two_dispatches(n_tokens, n_experts, n, capacity, listed):
    routing = _listed(n_tokens, n_experts, n) if listed else _chosen(n_tokens, n_experts, 1 + n % n_experts)
    kept = kept_assignments(routing, capacity)
    taken = [0] * n_experts
    for number, expert in enumerate(routing.experts.tolist()):
        assert bool(kept[number]) == (capacity is None or taken[expert] < capacity)
        taken[expert] += 1
    plan = plan_dispatch(routing, kept)
    assert plan.counts.tolist() == torch.bincount(routing.experts[kept], minlength=n_experts).tolist()
    n_kept = int(kept.sum())
    by_expert = sorted(kept.nonzero().flatten().tolist(), key=lambda number: int(routing.experts[number]))
    assert plan.order[:n_kept].tolist() == by_expert
    assert sorted(plan.order.tolist()) == list(range(len(kept)))
    assert torch.equal(plan.tokens, routing.tokens[plan.order])
    x, experts = torch.randn(n_tokens, 5, dtype=torch.float64), _experts(n_experts)
    one, other = (dispatch(x, routing, kept, experts) for dispatch in DISPATCHES)
    torch.testing.assert_close(one, other)


def test_permute_and_unpermute_bring_back_what_they_took():
    for routing in _routings():
        plan = plan_dispatch(routing, kept_assignments(routing, None))
        x = torch.randn(9, 5, dtype=torch.float64)
        rows = permute(x, plan)
        assert torch.equal(rows, x[routing.tokens[plan.order]])
        n = torch.bincount(routing.tokens, minlength=9).unsqueeze(1)
        torch.testing.assert_close(unpermute(rows, torch.ones_like(routing.weights), plan, 9), x * n)


def test_what_half_precision_rows_are_summed_in():
    for routing in _routings(dtype=torch.float32):
        plan = plan_dispatch(routing, kept_assignments(routing, None))
        rows = torch.randn(len(plan.order), 5).bfloat16().requires_grad_()
        out = unpermute(rows, routing.weights, plan, 9)
        exact = unpermute(rows.detach().double(), routing.weights.detach().double(), plan, 9)
        assert out.dtype is torch.float32
        torch.testing.assert_close(out.double(), exact, atol=1e-6, rtol=1e-5)
        out.sum().backward()
        assert rows.grad.dtype is torch.bfloat16


def test_gradients_of_half_precision_tokens_are_summed_exactly():
    """256 + 1 is 256 in bfloat16: three choices of 256, 1 and 1 make 258 only if they are summed in float32."""
    weights = torch.ones(1, 3)
    routing = Routing.from_choices(torch.tensor([[0, 1, 2]]), weights, torch.ones(1, 3), {})
    x = torch.zeros(1, 2, dtype=torch.bfloat16, requires_grad=True)
    plan = plan_dispatch(routing, kept_assignments(routing, None))
    permute(x, plan).backward(torch.tensor([[256.0] * 2, [1.0] * 2, [1.0] * 2]).bfloat16())
    assert x.grad.tolist() == [[258.0, 258.0]]


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_the_result_has_the_type_of_the_tokens(dispatch):
    routing = _chosen(6, 3, 2, torch.float32)
    experts = Experts(8, 4, 3)
    kept = kept_assignments(routing, None)
    x = torch.randn(6, 8)
    expected = dispatch(x, routing, kept, experts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dispatch(x, routing, kept, experts)
    assert out.dtype is torch.float32
    torch.testing.assert_close(out, expected, atol=1e-2, rtol=3e-2)
    out = dispatch(x.bfloat16(), routing, kept, experts.bfloat16())
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=1e-2, rtol=3e-2)


def test_a_frozen_token_or_weight_costs_no_gradient():
    routing, experts = _chosen(5, 3, 2), _experts(3)
    kept = kept_assignments(routing, None)
    x = torch.randn(5, 5, dtype=torch.float64)
    sorted_dispatch(x, routing, kept, experts.requires_grad_(False)).sum().backward()
    frozen = Routing(**{**vars(routing), "weights": routing.weights.detach()})
    assert not sorted_dispatch(x, frozen, kept, experts).requires_grad
    leaf = x.requires_grad_()
    sorted_dispatch(leaf, frozen, kept, experts).sum().backward()
    assert leaf.grad.any()


def test_all_tokens_to_one_expert_and_all_dropped():
    experts, weights = _experts(3), torch.ones(7, 1, dtype=torch.float64)
    x, probabilities = torch.randn(7, 5, dtype=torch.float64), torch.ones(7, 3, dtype=torch.float64)
    routing = Routing.from_choices(torch.full((7, 1), 2), weights, probabilities, {})
    for dispatch in DISPATCHES:
        torch.testing.assert_close(dispatch(x, routing, kept_assignments(routing, None), experts), experts.one(x, 2))
        out = dispatch(x, routing, kept_assignments(routing, 3), experts)
        torch.testing.assert_close(out[:3], experts.one(x[:3], 2))
        assert not out[3:].any()
        assert not dispatch(x, routing, torch.zeros(7, dtype=torch.bool), experts).any()


def test_capacity():
    assert expert_capacity(4096, 64, 2, 1.0) == 128
    assert expert_capacity(4096, 64, 2, 1.25) == 160
    assert expert_capacity(10, 4, 1, 1.0) == 3
    assert expert_capacity(100, 11, 1, 1.1) == 10  # 1.1 * 100 / 11 is 10.000000000000002 in float64
    assert expert_capacity(1, 2048, 1, 1e-12) == 1
    assert expert_capacity(0, 8, 2, 1.0) == 0
    assert expert_capacity(5_853_160, 8, 3, 2.6) == 5_706_831
    assert expert_capacity(100, 8, 2, 1e308) == 100


def test_assignments_to_experts_that_there_are_not_are_refused():
    """Sorted to the end they would be lost, and counted as kept."""
    tokens, weights, probabilities = torch.arange(3), torch.ones(3), torch.ones(3, 4)
    for experts in ([0, 1, 4], [0, -1, 2]):
        with pytest.raises(ValueError, match=r"experts must be in \[0, 4\), got values from"):
            Routing(tokens, torch.tensor(experts), weights, probabilities, {})
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 3\), got values from 0 to 3"):
        Routing(torch.tensor([0, 3, 1]), torch.tensor([0, 1, 2]), weights, probabilities, {})


@given(
    n_tokens=st.integers(1, 10_000),
    n_experts=st.integers(1, 256),
    k=st.integers(1, 8),
    hundredths=st.integers(1, 400),
)
def test_capacity_is_exact_for_decimal_factors(n_tokens, n_experts, k, hundredths):
    exact = math.ceil(Fraction(hundredths, 100) * k * n_tokens / n_experts)
    assert expert_capacity(n_tokens, n_experts, k, hundredths / 100) == min(exact, n_tokens)


@pytest.mark.gpu
def test_on_a_gpu_the_same_and_the_same_again():
    routing = _chosen(64, 8, 2, torch.float32)
    experts = Experts(32, 16, 8)
    x = torch.randn(64, 32, requires_grad=True)
    kept = kept_assignments(routing, 20)
    sorted_dispatch(x, routing, kept, experts).square().sum().backward()
    there = Routing(
        *(getattr(routing, name).detach().cuda() for name in ("tokens", "experts", "weights", "probabilities")),
        {},
        choices=2,
    )
    experts.cuda()
    gradients = []
    for _ in range(2):
        leaf = x.detach().cuda().requires_grad_()
        sorted_dispatch(leaf, there, kept_assignments(there, 20), experts).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    torch.testing.assert_close(gradients[0].cpu(), x.grad, atol=1e-5, rtol=1e-3)
