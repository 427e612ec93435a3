"""What routers share, top-k routing and its losses: against transformers' Mixtral and OLMoE, and float64 by hand."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import MixtralConfig, OlmoeConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    MixtralTopKRouter,
    load_balancing_loss_func,
)
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock, OlmoeTopKRouter
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from minillm.layers import MixtureOfExperts
from minillm.layers.dispatch import expert_capacity, kept_assignments
from minillm.layers.routers import (
    ROUTERS,
    GShardRouter,
    Router,
    Routing,
    SwitchRouter,
    TopKRouter,
    load_balancing_loss,
    make_router,
    router_z_loss,
)

D_MODEL, D_FF, N_EXPERTS = 12, 20, 6
OWN = {"softmax": 2, "switch": 1, "glam": 2}  # name -> k of the routers that are tested here and beside this file


def _twin(k: int, renormalise: bool) -> nn.Module:
    if renormalise:
        config = MixtralConfig(
            hidden_size=D_MODEL, intermediate_size=D_FF, num_local_experts=N_EXPERTS, num_experts_per_tok=k
        )
        block: nn.Module = MixtralSparseMoeBlock(config)
    else:
        config = OlmoeConfig(hidden_size=D_MODEL, intermediate_size=D_FF, num_experts=N_EXPERTS, num_experts_per_tok=k)
        block = OlmoeSparseMoeBlock(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    return block


def _by_choice(routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """experts and weights, (n_tokens, k)."""
    return routing.experts.view(routing.choices, -1).t(), routing.weights.view(routing.choices, -1).t()


# top-k routing


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("k", [1, 2, N_EXPERTS])
def test_top_k_equals_transformers_routers(k, renormalise):
    twin = _twin(k, renormalise).gate
    assert isinstance(twin, MixtralTopKRouter if renormalise else OlmoeTopKRouter)
    router = TopKRouter(D_MODEL, N_EXPERTS, k, renormalise=renormalise)
    router.load_state_dict(twin.state_dict())
    x = torch.randn(50, D_MODEL)
    logits, weights, experts = twin(x)
    routing = router(x)
    ours_experts, ours_weights = _by_choice(routing)
    assert torch.equal(ours_experts, experts)
    torch.testing.assert_close(ours_weights, weights)
    torch.testing.assert_close(routing.probabilities, logits.softmax(-1))
    assert torch.equal(routing.tokens, torch.arange(50).repeat(k))
    assert routing.assigned.tolist() == torch.bincount(experts.flatten(), minlength=N_EXPERTS).tolist()


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("k", [1, 2, N_EXPERTS])
def test_a_mixture_with_it_equals_transformers_block_gradients_included(k, renormalise):
    twin = _twin(k, renormalise)
    router = TopKRouter(D_MODEL, N_EXPERTS, k, renormalise=renormalise)
    mixture = MixtureOfExperts(D_MODEL, D_FF, N_EXPERTS, k, router=router)
    gate, up = twin.experts.gate_up_proj.chunk(2, dim=1)
    with torch.no_grad():
        mixture.router.weight.copy_(twin.gate.weight)
        mixture.experts.gate.copy_(gate)
        mixture.experts.up.copy_(up)
        mixture.experts.down.copy_(twin.experts.down_proj)
    x = torch.randn(3, 7, D_MODEL)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    (out, record), expected = mixture(mine), twin(other)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert record.kept.all()
    out.square().sum().backward()
    expected.square().sum().backward()
    gate_grad, up_grad = twin.experts.gate_up_proj.grad.chunk(2, dim=1)
    for grad, expected_grad in (
        (mine.grad, other.grad),
        (mixture.router.weight.grad, twin.gate.weight.grad),
        (mixture.experts.gate.grad, gate_grad),
        (mixture.experts.up.grad, up_grad),
        (mixture.experts.down.grad, twin.experts.down_proj.grad),
    ):
        torch.testing.assert_close(grad, expected_grad, atol=1e-4, rtol=1e-4)


def test_renormalised_weights_are_the_softmax_over_the_chosen_logits():
    router = TopKRouter(D_MODEL, N_EXPERTS, 3).double()
    x = torch.randn(20, D_MODEL, dtype=torch.float64)
    logits = router.logits(x)
    experts, weights = _by_choice(router(x))
    torch.testing.assert_close(weights, logits.gather(1, experts).softmax(-1))


def test_one_renormalised_expert_teaches_the_router_nothing_and_one_probability_does():
    x = torch.randn(20, D_MODEL)
    for renormalise, learns in ((True, False), (False, True)):
        router = TopKRouter(D_MODEL, N_EXPERTS, 1, renormalise=renormalise)
        (router(x).weights * torch.randn(20)).sum().backward()
        assert (router.weight.grad.abs().max() > 1e-4) == learns


@pytest.mark.parametrize("name", OWN)
def test_gradients_of_weights_and_losses_in_float64(name):
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    router = make_router(name, 5, 4, OWN[name], z_loss=0.1, jitter=0.0).double()
    nn.init.normal_(router.weight)

    def outputs(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        routing = torch.func.functional_call(router, {"weight": weight}, (x,))
        return routing.weights, routing.probabilities, routing.losses["balance"], routing.losses["z"]

    assert torch.autograd.gradcheck(outputs, (x, router.weight))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_weights_are_a_share_and_the_order_of_tokens_does_not_matter(data):
    n_experts = data.draw(st.integers(1, 9))
    k = data.draw(st.integers(1, n_experts))
    n_tokens = data.draw(st.integers(0, 30))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    x = torch.randn(n_tokens, 8) * data.draw(st.sampled_from([0.0, 1.0, 100.0]))
    router = TopKRouter(8, n_experts, k, z_loss=0.1)
    nn.init.normal_(router.weight)
    routing = router(x)
    experts, weights = _by_choice(routing)
    torch.testing.assert_close(weights.sum(1), torch.ones(n_tokens))
    assert (weights >= 0).all()
    assert (weights.diff(dim=1) <= 0).all()  # the first choice weighs most
    assert all(len(set(row)) == k for row in experts.tolist())
    assert routing.assigned.sum() == k * n_tokens
    order = torch.randperm(n_tokens)
    shuffled = router(x[order])
    torch.testing.assert_close(shuffled.probabilities, routing.probabilities[order])
    if x.any():  # all-equal probabilities may be chosen from in any way
        assert torch.equal(_by_choice(shuffled)[0], experts[order])
        for name, loss in routing.losses.items():
            torch.testing.assert_close(shuffled.losses[name], loss, atol=1e-6, rtol=1e-5)


def test_equal_probabilities_give_k_different_experts_and_finite_gradients():
    x = torch.randn(9, 8)
    for name, k in OWN.items():
        router = make_router(name, 8, 5, k, z_loss=0.1)
        nn.init.zeros_(router.weight)
        routing = router(x)
        experts, weights = _by_choice(routing)
        assert all(len(set(row)) == k for row in experts.tolist())
        torch.testing.assert_close(weights, torch.full((9, k), 0.2 if name == "switch" else 1 / k))
        (routing.weights.square().sum() + sum(routing.losses.values())).backward()
        assert router.weight.grad.isfinite().all()
    assert SwitchRouter(8, 5)(torch.zeros(9, 8)).experts.tolist() == [0] * 9  # the first of equals


# the losses


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("n_layers", [1, 3])
def test_balance_loss_is_transformers_over_k_with_gradients(k, n_layers):
    layers = [torch.randn(40, N_EXPERTS, requires_grad=True) for _ in range(n_layers)]
    expected = load_balancing_loss_func(tuple(layers), N_EXPERTS, k)
    expected_grads = torch.autograd.grad(expected, layers)
    probabilities = torch.cat(layers).softmax(-1)  # they take all layers as one
    loss = load_balancing_loss(probabilities, probabilities.topk(k).indices)
    torch.testing.assert_close(k * loss, expected)
    for grad, expected_grad in zip(torch.autograd.grad(k * loss, layers), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_the_routers_loss_is_transformers_with_the_coefficient_and_without_padding():
    twin = _twin(2, True)
    router = TopKRouter(D_MODEL, N_EXPERTS, 2, balance_loss=0.02)
    mixture = MixtureOfExperts(D_MODEL, D_FF, N_EXPERTS, 2, router=router)
    router.load_state_dict(twin.gate.state_dict())
    x = torch.randn(2, 8, D_MODEL)
    mask = torch.arange(8) < torch.tensor([[8], [5]])
    for token_mask in (None, mask):
        _, record = mixture(x, token_mask=token_mask)
        expected = load_balancing_loss_func((twin.gate(x)[0],), N_EXPERTS, 2, attention_mask=token_mask)
        torch.testing.assert_close(record.losses["balance"], 0.02 * expected / 2)


def test_z_loss_equals_transformers_with_gradients():
    logits = torch.randn(30, N_EXPERTS, requires_grad=True)
    loss, expected = router_z_loss(logits), router_z_loss_func(logits.view(3, 10, N_EXPERTS))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))
    x = torch.randn(30, D_MODEL)
    router = TopKRouter(D_MODEL, N_EXPERTS, 2, z_loss=0.001, balance_loss=0.0)
    assert router(x).losses.keys() == {"z"}
    torch.testing.assert_close(router(x).losses["z"], 0.001 * router_z_loss_func(x[None] @ router.weight.t()))


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any))
def test_uniform_shares_are_the_minimum_where_probabilities_follow_the_assignments(counts):
    n_experts = len(counts)
    experts = torch.tensor([expert for expert, count in enumerate(counts) for _ in range(count)])
    sure = nn.functional.one_hot(experts, n_experts).double()
    loss = float(load_balancing_loss(sure, experts))
    assert loss == pytest.approx(n_experts * sum((count / len(experts)) ** 2 for count in counts))
    assert 1 - 1e-12 <= loss <= n_experts + 1e-12
    assert (loss < 1 + 1e-9) == (len(set(counts)) == 1)


def test_the_balance_loss_may_be_less_than_1_where_probabilities_and_assignments_differ():
    """As its docstring says: 60 tokens hardly prefer expert 0, 40 are sure of expert 1."""
    probabilities = torch.tensor([[0.51, 0.49]] * 60 + [[0.0, 1.0]] * 40)
    loss = load_balancing_loss(probabilities, probabilities.argmax(-1))
    assert float(loss) == pytest.approx(2 * (0.6 * 0.306 + 0.4 * 0.694))
    assert loss < 1


def test_the_balance_loss_has_no_slope_at_uniform_load_and_presses_on_the_busy_expert():
    logits = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    uniform = torch.arange(12) % 3
    (slope,) = torch.autograd.grad(load_balancing_loss(logits.softmax(-1), uniform), logits)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-15, rtol=0)
    busy = torch.tensor([0] * 10 + [1, 2])
    (slope,) = torch.autograd.grad(load_balancing_loss(logits.softmax(-1), busy), logits)
    assert (slope[:, 0] > 0).all()  # down the slope expert 0 becomes less likely
    assert (slope[:, 1:] < 0).all()


def test_losses_refuse_other_shapes_and_count_past_float16():
    with pytest.raises(ValueError, match=r"probabilities must be \(n_tokens, n_experts\), got \(2, 3, 4\)"):
        load_balancing_loss(torch.rand(2, 3, 4), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"experts must be int64, got torch\.int32"):
        load_balancing_loss(torch.rand(3, 4), torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"logits must be \(n_tokens, n_experts\), got \(3,\)"):
        router_z_loss(torch.rand(3))
    many = torch.full((70_000, 2), 0.5, dtype=torch.float16)
    assert load_balancing_loss(many, torch.zeros(70_000, dtype=torch.int64)) == 1


# what routers share


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", OWN)
def test_logits_weights_and_losses_are_at_least_float32_in_a_model_of_any_dtype(name, dtype):
    """Held against float64 on the same rounded numbers; the same product in bfloat16 is two thousand times further."""
    router = make_router(name, 64, N_EXPERTS, OWN[name], z_loss=0.1, jitter=0.0).to(dtype)
    with torch.no_grad():
        router.weight.normal_()
    x = torch.randn(40, 64).to(dtype)
    expected = x.double() @ router.weight.detach().double().t()
    exact = torch.float64 if dtype is torch.float64 else torch.float32
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits, routing = router.logits(x), router(x)
        torch.testing.assert_close(logits.double(), expected, atol=2e-5, rtol=0)
        assert logits.dtype is exact
        assert {routing.weights.dtype, routing.probabilities.dtype} == {exact}
        assert {loss.dtype for loss in routing.losses.values()} == {exact}
    if dtype is torch.bfloat16:
        assert (nn.functional.linear(x, router.weight).double() - expected).abs().max() > 0.04


def test_logits_beyond_float16_are_no_matter():
    router = TopKRouter(16, 4, 2).half()
    nn.init.ones_(router.weight)
    x = torch.full((3, 16), 60_000.0, dtype=torch.float16)
    assert router.logits(x).eq(960_000.0).all()
    assert router(x).weights.eq(0.5).all()


@pytest.mark.parametrize("name", OWN)
def test_no_tokens_and_one_expert(name):
    k = OWN[name]
    router = make_router(name, 8, 4, k, z_loss=0.1)
    x = torch.randn(0, 8, requires_grad=True)
    routing = router(x)
    assert (routing.n_tokens, routing.n_experts) == (0, 4)
    assert routing.assigned.tolist() == [0] * 4
    assert routing.experts.dtype is torch.int64
    assert {loss.item() for loss in routing.losses.values()} == {0.0}
    (routing.weights.sum() + sum(routing.losses.values())).backward()
    assert torch.equal(router.weight.grad, torch.zeros(4, 8))
    if k == 1 or name == "softmax":
        single = make_router(name, 8, 1, 1)(torch.randn(5, 8))
        assert single.experts.tolist() == [0] * 5
        assert single.weights.tolist() == [1.0] * 5
        assert single.losses["balance"].item() == pytest.approx(0.01)


@pytest.mark.parametrize("name", OWN)
def test_all_tokens_to_one_expert(name):
    router = make_router(name, 8, 4, OWN[name], balance_loss=1.0, jitter=0.0)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[2] = 40.0
    routing = router(torch.rand(30, 8) + 0.5)
    assert int(routing.assigned[2]) == 30
    experts, weights = _by_choice(routing)
    assert experts[:, 0].tolist() == [2] * 30
    assert weights[:, 0].eq(1.0).all()
    # n_experts where one gets everything; with two choices counted, the other half of the assignments costs nothing
    assert routing.losses["balance"].item() == pytest.approx(2.0 if name == "softmax" else 4.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["input", "weight"])
def test_numbers_that_are_none_are_refused_by_name(value, where):
    router, x = TopKRouter(8, 4, 2), torch.rand(6, 8) + 0.1
    with torch.no_grad():
        if where == "input":
            x[3, 1] = value
        else:
            router.weight[1, 1] = value
    token = 3 if where == "input" else 0
    name = "NaN" if value != value else "infinity"
    with pytest.raises(ValueError, match=f"router logits must be finite numbers, got {name} for token {token}"):
        router(x)


def test_large_logits_whose_sum_is_infinite_are_no_error():
    router = TopKRouter(1, 4, 1)
    nn.init.ones_(router.weight)
    routing = router(torch.full((9, 1), 3e38))
    assert routing.weights.eq(1.0).all()


def test_a_frozen_router_routes_and_passes_gradients_to_its_input():
    for name, k in OWN.items():
        router = make_router(name, 8, 4, k).requires_grad_(False)
        x = torch.randn(5, 8, requires_grad=True)
        routing = router(x)
        (routing.weights.square().sum() + routing.losses["balance"]).backward()
        assert router.weight.grad is None
        assert x.grad.abs().max() > 0


@pytest.mark.parametrize("name", OWN)
def test_compiled_in_one_graph_it_gives_the_same(name):
    router = make_router(name, 8, 4, OWN[name], z_loss=0.1, jitter=0.0)
    compiled = torch.compile(copy.deepcopy(router), backend="aot_eager", fullgraph=True)
    x = torch.randn(10, 8)
    grads = []
    routings = [router(x), compiled(x)]
    for routing, weight in zip(routings, (router.weight, compiled.weight), strict=True):
        loss = (routing.weights * torch.arange(len(routing.weights))).sum() + sum(routing.losses.values())
        grads.append(torch.autograd.grad(loss, weight)[0])
    assert torch.equal(routings[0].experts, routings[1].experts)
    torch.testing.assert_close(routings[0].weights, routings[1].weights)
    assert torch.equal(routings[0].assigned, routings[1].assigned)
    torch.testing.assert_close(*grads)


def test_first_choices_stand_before_second_ones_so_that_capacity_takes_second_ones_first():
    experts = torch.tensor([[0, 1], [1, 0], [0, 1], [0, 1]])
    weights = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    routing = Routing.from_choices(experts, weights, torch.full((4, 2), 0.5), {})
    assert routing.choices == 2
    assert routing.experts.tolist() == [0, 1, 0, 0, 1, 0, 1, 1]
    assert routing.weights.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.3, 0.4])
    assert routing.tokens.tolist() == [0, 1, 2, 3] * 2
    capacity = expert_capacity(4, 2, 2, 0.5)
    assert capacity == 2
    assert kept_assignments(routing, capacity).tolist() == [True, True, True, False, True, False, False, False]


def test_a_routing_whose_parts_do_not_fit_is_refused():
    parts = {
        "tokens": torch.zeros(4, dtype=torch.int64),
        "experts": torch.zeros(4, dtype=torch.int64),
        "weights": torch.ones(4),
        "probabilities": torch.ones(2, 3),
        "losses": {},
        "choices": 2,
    }
    Routing(**parts)
    for change, message in (
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"tokens must be int64 \(4,\), got torch\.int64 \(3,\)"),
        ({"experts": torch.zeros(4)}, r"experts must be int64 \(4,\), got torch\.float32 \(4,\)"),
        ({"weights": torch.ones(4, 1)}, r"weights must be \(4,\), got \(4, 1\)"),
        ({"weights": torch.ones(())}, r"weights must be \(4,\), got \(\)"),
        ({"weights": torch.ones(()), "choices": None}, r"weights must be \(1,\), got \(\)"),
        ({"weights": torch.ones(3), "choices": None}, r"tokens must be int64 \(3,\), got torch\.int64 \(4,\)"),
        ({"choices": 1}, r"weights must be \(2,\), got \(4,\)"),
        ({"probabilities": torch.ones(6)}, r"probabilities must be \(n_tokens, n_experts\), got \(6,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            Routing(**(parts | change))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((8, 4, 5), ValueError, "k must be at most n_experts=4, got 5"),
        ((8, 4, 0), ValueError, "k must be at least 1, got 0"),
        ((8, 0, 1), ValueError, "n_experts must be at least 1, got 0"),
        ((-1, 4, 1), ValueError, "d_model must be at least 1, got -1"),
        ((8, 4.0, 1), TypeError, r"n_experts must be an integer, got 4\.0"),
        ((8, 4, True), TypeError, "k must be an integer, got True"),
    ],
)
@pytest.mark.parametrize("kind", [TopKRouter, SwitchRouter, GShardRouter])
def test_sizes_are_checked(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        kind(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"balance_loss": -0.1}, ValueError, r"balance_loss must be at least 0 and finite, got -0\.1"),
        ({"z_loss": float("nan")}, ValueError, "z_loss must be at least 0 and finite, got nan"),
        ({"z_loss": float("inf")}, ValueError, "z_loss must be at least 0 and finite, got inf"),
        ({"jitter": 1.0}, ValueError, r"jitter must be below 1, got 1\.0"),
        ({"jitter": "0.1"}, TypeError, r"jitter must be a number, got '0\.1'"),
        ({"balance_loss": None}, TypeError, "balance_loss must be a number, got None"),
    ],
)
@pytest.mark.parametrize("name", OWN)
def test_options_are_checked(name, options, error, message):
    with pytest.raises(error, match=message):
        make_router(name, 8, 4, OWN[name], **options)


def test_inputs_are_checked():
    router = TopKRouter(8, 4, 2)
    for shape in ((5, 7), (2, 5, 8), (8,)):
        with pytest.raises(ValueError, match=r"x must be \(n_tokens, d_model=8\), got \("):
            router(torch.randn(shape))
    with pytest.raises(TypeError, match=r"x must be of a floating dtype, got torch\.int64"):
        router(torch.ones(5, 8, dtype=torch.int64))


def test_names_of_routers():
    assert {name: ROUTERS[name] for name in OWN} == {
        "softmax": TopKRouter,
        "switch": SwitchRouter,
        "glam": GShardRouter,
    }
    with pytest.raises(ValueError, match=r"router must be one of softmax, .* or a Router, got 'mixtral'"):
        make_router("mixtral", 8, 4, 2)
    assert not make_router("softmax", 8, 4, 2, renormalise=False).renormalise
    assert "d_model=8, n_experts=4, k=2" in repr(TopKRouter(8, 4, 2))
    with pytest.raises(NotImplementedError):
        Router(8, 4, 2)(torch.randn(3, 8))
