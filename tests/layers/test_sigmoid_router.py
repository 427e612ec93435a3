"""The sigmoid router against transformers' DeepSeek-V3, and the bias that evens the load without a loss."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE, DeepseekV3TopkRouter

from minillm.layers.moe import MixtureOfExperts
from minillm.layers.routers import Routing, SigmoidRouter, load_balancing_loss


def router_with_signal(n_experts: int = 8, k: int = 2, **options: float) -> SigmoidRouter:
    router = SigmoidRouter(6, n_experts, k, **options)
    nn.init.normal_(router.weight)
    nn.init.normal_(router.bias, std=0.2)
    return router


def deepseek_config(n_experts: int, k: int, n_groups: int, groups_per_token: int, renormalise: bool = True):
    return DeepseekV3Config(
        hidden_size=6,
        moe_intermediate_size=10,
        n_routed_experts=n_experts,
        num_experts_per_tok=k,
        n_shared_experts=2,
        n_group=n_groups,
        topk_group=groups_per_token,
        norm_topk_prob=renormalise,
        routed_scaling_factor=2.5,
    )


def dense(experts: Tensor, weights: Tensor, n_experts: int) -> Tensor:
    """(n_tokens, n_experts) of (n_tokens, k): whatever the order of the choices."""
    return weights.new_zeros(experts.size(0), n_experts).scatter(1, experts, weights)


def by_token(routing: Routing) -> tuple[Tensor, Tensor]:
    """Experts and weights as (n_tokens, k)."""
    k = routing.choices
    assert k is not None
    return routing.experts.reshape(k, -1).t(), routing.weights.reshape(k, -1).t()


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(
    ("n_experts", "k", "n_groups", "groups_per_token"),
    [(8, 2, 1, 1), (8, 2, 4, 2), (16, 6, 4, 3), (12, 4, 2, 1), (8, 8, 1, 1), (8, 4, 4, 2), (8, 8, 4, 4)],
)
def test_equals_transformers_router(
    n_experts: int, k: int, n_groups: int, groups_per_token: int, renormalise: bool
) -> None:
    peer = DeepseekV3TopkRouter(deepseek_config(n_experts, k, n_groups, groups_per_token, renormalise))
    router = SigmoidRouter(
        6, n_experts, k, scaling=2.5, renormalise=renormalise, n_groups=n_groups, groups_per_token=groups_per_token
    )
    nn.init.normal_(peer.weight)
    nn.init.normal_(peer.e_score_correction_bias, std=0.3)
    router.load_state_dict({"weight": peer.weight.data, "bias": peer.e_score_correction_bias})
    x = torch.randn(40, 6, requires_grad=True)
    peer_x = x.detach().clone().requires_grad_()
    routing = router(x)
    experts, weights = by_token(routing)
    _, peer_weights, peer_experts = peer(peer_x)
    assert torch.equal(experts.sort(dim=1).values, peer_experts.sort(dim=1).values)
    mine, theirs = dense(experts, weights, n_experts), dense(peer_experts, peer_weights, n_experts)
    torch.testing.assert_close(mine, theirs)
    probe = torch.randn_like(mine)
    (mine * probe).sum().backward()
    (theirs * probe).sum().backward()
    torch.testing.assert_close(x.grad, peer_x.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(router.weight.grad, peer.weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dispatch", ["sorted", "einsum"])
def test_block_with_shared_experts_equals_transformers(dispatch: str) -> None:
    peer = DeepseekV3MoE(deepseek_config(8, 3, 4, 2))
    for parameter in peer.parameters():
        nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(peer.gate.e_score_correction_bias, std=0.3)
    router = SigmoidRouter(6, 8, 3, scaling=2.5, n_groups=4, groups_per_token=2)
    mixture = MixtureOfExperts(6, 10, 8, 3, router=router, n_shared_experts=2, dispatch=dispatch)
    gate, up = peer.experts.gate_up_proj.data.chunk(2, dim=1)
    mixture.load_state_dict(
        {
            "router.weight": peer.gate.weight.data,
            "router.bias": peer.gate.e_score_correction_bias,
            "experts.gate": gate,
            "experts.up": up,
            "experts.down": peer.experts.down_proj.data,
            "shared.gate.weight": peer.shared_experts.gate_proj.weight.data,
            "shared.up.weight": peer.shared_experts.up_proj.weight.data,
            "shared.down.weight": peer.shared_experts.down_proj.weight.data,
        }
    )
    x = torch.randn(2, 9, 6, requires_grad=True)
    peer_x = x.detach().clone().requires_grad_()
    out, _ = mixture(x)
    theirs = peer(peer_x)
    torch.testing.assert_close(out, theirs, rtol=1e-4, atol=1e-5)
    probe = torch.randn_like(out)
    (out * probe).sum().backward()
    (theirs * probe).sum().backward()
    torch.testing.assert_close(x.grad, peer_x.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(router.weight.grad, peer.gate.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixture.experts.down.grad, peer.experts.down_proj.grad, rtol=1e-4, atol=1e-4)
    gates = torch.cat((mixture.experts.gate.grad, mixture.experts.up.grad), dim=1)
    torch.testing.assert_close(gates, peer.experts.gate_up_proj.grad, rtol=1e-4, atol=1e-4)


def test_bias_chooses_but_is_not_in_the_weights() -> None:
    router = SigmoidRouter(6, 4, 1, renormalise=False)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    with torch.no_grad():
        router.bias[3] = 1.0
    routing = router.route(logits, torch.zeros(1, 6))
    assert routing.experts.tolist() == [3]
    torch.testing.assert_close(routing.weights, torch.sigmoid(torch.tensor([-1.0])))
    torch.testing.assert_close(routing.probabilities, logits.sigmoid())


def test_bias_is_saved_and_no_parameter_and_without_gradient() -> None:
    router = router_with_signal()
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert set(router.state_dict()) == {"weight", "bias"}
    router.bias.requires_grad_()
    router(torch.randn(5, 6)).weights.square().sum().backward()
    assert router.bias.grad is None


def test_updates_even_a_skewed_load() -> None:
    """Wang et al. 2024: a router that would send nearly all to two of eight experts ends within a few per cent of even.

    Logits and weights stay as they were: only the choice moves.
    """
    router = SigmoidRouter(6, 8, 2)
    skew = torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0, -1.0, -2.0, -3.0])
    logits, x = torch.randn(2000, 8) + skew, torch.zeros(2000, 6)
    load = router.route(logits, x).assigned
    assert load.max() / load.float().mean() > 3
    for rate in (0.01, 0.001):
        for _ in range(300):
            load = router.route(logits, x).assigned
            assert load.sum() == 4000  # none lost on the way
            router.update_bias(load, rate)
    load = router.route(logits, x).assigned
    assert load.max() / load.float().mean() < 1.05
    assert load.min() / load.float().mean() > 0.95
    assert router.bias.argmax() == 7
    assert router.bias.argmin() == 0


def test_update_is_the_sign_of_what_is_lacking() -> None:
    router = SigmoidRouter(6, 4, 2)
    router.update_bias(torch.tensor([5, 9, 5, 1]))
    torch.testing.assert_close(router.bias, torch.tensor([0.0, -0.001, 0.0, 0.001]))
    router.update_bias(torch.tensor([0, 0, 0, 0]), rate=0.5)
    router.update_bias(torch.tensor([9, 0, 0, 0]), rate=0.0)
    torch.testing.assert_close(router.bias, torch.tensor([0.0, -0.001, 0.0, 0.001]))


def test_the_rate_is_the_routers_own() -> None:
    router = SigmoidRouter(6, 2, 1, bias_rate=0.25)
    router.update_bias(torch.tensor([3, 1]))
    assert router.bias.tolist() == [-0.25, 0.25]
    with pytest.raises(ValueError, match="bias_rate must be at least 0 and finite, got -1"):
        SigmoidRouter(6, 2, 1, bias_rate=-1)


def test_update_with_large_counts_is_exact() -> None:
    """2^53 + 1 is no float64: the comparison must be of integers."""
    router = SigmoidRouter(6, 2, 1)
    router.update_bias(torch.tensor([2**53 + 1, 2**53]), rate=1.0)
    assert router.bias.tolist() == [-1.0, 1.0]


def test_update_refuses_by_name() -> None:
    router = SigmoidRouter(6, 4, 2)
    for shape in ((3,), (5,), (1, 4), ()):
        with pytest.raises(ValueError, match=r"assigned must be \(n_experts=4,\), got"):
            router.update_bias(torch.ones(shape, dtype=torch.int64))
    for dtype in (torch.float32, torch.bool, torch.int32):
        with pytest.raises(TypeError, match="assigned must be int64, got"):
            router.update_bias(torch.ones(4, dtype=dtype))
    for rate in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="rate must be at least 0 and finite"):
            router.update_bias(torch.ones(4, dtype=torch.int64), rate)
    assert not router.bias.any()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="n_groups must divide n_experts=8, got 3"):
        SigmoidRouter(6, 8, 2, n_groups=3)
    with pytest.raises(ValueError, match="n_groups must divide n_experts=8, got 0"):
        SigmoidRouter(6, 8, 2, n_groups=0)
    with pytest.raises(ValueError, match=r"groups_per_token must be in 1\.\.n_groups=4, got 5"):
        SigmoidRouter(6, 8, 2, n_groups=4, groups_per_token=5)
    with pytest.raises(ValueError, match="k must be at most the 4 experts of groups_per_token=2 groups, got 5"):
        SigmoidRouter(6, 8, 5, n_groups=4, groups_per_token=2)
    with pytest.raises(TypeError, match="n_groups must be an integer"):
        SigmoidRouter(6, 8, 2, n_groups=2.0)
    for scaling in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scaling must be above 0 and finite"):
            SigmoidRouter(6, 8, 2, scaling=scaling)
    with pytest.raises(ValueError, match="router logits must be finite numbers, got NaN for token 1"):
        router_with_signal()(torch.tensor([[0.0] * 6, [math.nan] * 6]))


def test_groups_limit_the_choice() -> None:
    router = router_with_signal(12, 4, n_groups=4, groups_per_token=2)
    experts, _ = by_token(router(torch.randn(50, 6)))
    assert all(len(set(row)) <= 2 for row in (experts // 3).tolist())
    single = router_with_signal(4, 2, n_groups=4, groups_per_token=2)  # groups of one expert: no second largest
    free = copy.deepcopy(single)
    free.n_groups = free.groups_per_token = 1
    x = torch.randn(50, 6)
    assert torch.equal(single(x).experts, free(x).experts)


def test_balance_loss_is_of_what_would_be_chosen_without_the_bias() -> None:
    """DeepSeek-V3's equations 17-20 over all tokens of the call, written out in float64."""
    router = router_with_signal(8, 2, balance_loss=0.5, z_loss=0.25).double()
    x = torch.randn(30, 6, dtype=torch.float64)
    losses = router(x).losses
    s = (x @ router.weight.t()).sigmoid()
    f = torch.zeros(8, dtype=torch.float64)
    for row in s:
        f[row.argsort(descending=True)[:2]] += 8 / (2 * 30)
    p = (s / s.sum(dim=1, keepdim=True)).mean(dim=0)
    torch.testing.assert_close(losses["balance"], 0.5 * (f * p).sum())
    assert set(losses) == {"balance", "z"}
    assert router_with_signal()(torch.randn(3, 6)).losses == {}
    uniform = load_balancing_loss(torch.full((4, 4), 0.25), torch.arange(4))
    assert uniform.item() == pytest.approx(1.0)


def test_gradients() -> None:
    router = router_with_signal(8, 3, scaling=2.5, n_groups=4, groups_per_token=2, balance_loss=0.1).double()
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)

    def outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        routing = functional_call(router, {"weight": weight}, (x,))
        return routing.weights, routing.probabilities, routing.losses["balance"]

    assert torch.autograd.gradcheck(outputs, (x, router.weight))


@pytest.mark.parametrize(("n_tokens", "n_experts", "k"), [(0, 4, 2), (1, 4, 2), (3, 1, 1), (3, 4, 4), (0, 1, 1)])
def test_edges(n_tokens: int, n_experts: int, k: int) -> None:
    router = router_with_signal(n_experts, k, balance_loss=0.1, scaling=2.5)
    routing = router(torch.randn(n_tokens, 6))
    assert routing.choices == k
    assert routing.assigned.sum() == n_tokens * k
    torch.testing.assert_close(by_token(routing)[1].sum(dim=1), torch.full((n_tokens,), 2.5))
    assert math.isfinite(routing.losses["balance"].item())
    (routing.weights.sum() + routing.losses["balance"]).backward()
    router.update_bias(routing.assigned)
    if n_experts == 1 or k == n_experts or n_tokens == 0:
        before = router.bias.clone()
        router.update_bias(routing.assigned)
        assert torch.equal(before, router.bias)


def test_affinities_that_underflow_still_share_the_weight() -> None:
    logits = torch.full((1, 4), -200.0, requires_grad=True)
    routing = SigmoidRouter(6, 4, 2).route(logits, torch.zeros(1, 6))
    torch.testing.assert_close(routing.weights, torch.tensor([0.5, 0.5]))
    routing.weights[0].backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


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
    assert torch.equal(routing.experts, expected.experts)
    assert torch.equal(routing.weights, expected.weights)


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_bias_stays_exact_in_a_model_cast_to_half_precision(cast: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), router_with_signal())
    router = model[1]
    with torch.no_grad():
        router.bias.fill_(0.7)
    getattr(model, cast)()
    assert model[0].weight.dtype == router.weight.dtype != torch.float32
    assert router.bias.dtype == torch.float32
    assert torch.equal(router.bias, torch.full((8,), 0.7))
    router.update_bias(torch.tensor([8, 0, 0, 0, 0, 0, 0, 0]))
    assert (router.bias != 0.7).all()
    assert "bias" in router.state_dict()
    assert getattr(copy.deepcopy(router).double(), cast)().bias.dtype == torch.float32


def test_cast_on_the_meta_device() -> None:
    with torch.device("meta"):
        router = SigmoidRouter(6, 4, 2)
    router = router.to(torch.bfloat16)
    assert (router.bias.device.type, router.bias.dtype) == ("meta", torch.float32)
    router = router.to_empty(device="cpu")
    assert (router.bias.device.type, router.bias.dtype) == ("cpu", torch.float32)


def test_float64_stays() -> None:
    router = router_with_signal(balance_loss=0.1).double()
    routing = router(torch.randn(4, 6, dtype=torch.float64))
    tensors = (router.bias, routing.weights, routing.probabilities, routing.losses["balance"])
    assert {t.dtype for t in tensors} == {torch.float64}


def test_frozen_router_still_passes_gradients_to_the_tokens() -> None:
    x = torch.randn(8, 6, requires_grad=True)
    router_with_signal().requires_grad_(False)(x).weights.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


def test_compiled_equals_eager_before_and_after_an_update() -> None:
    router = router_with_signal(8, 3, n_groups=4, groups_per_token=2)
    compiled = torch.compile(router, fullgraph=True, backend="eager")
    x = torch.randn(9, 6)
    for _ in range(2):
        routing, expected = compiled(x), router(x)
        assert torch.equal(routing.experts, expected.experts)
        assert torch.equal(routing.weights, expected.weights)
        router.update_bias(routing.assigned, rate=0.3)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), n_tokens=st.integers(1, 12), n_groups=st.integers(1, 4), size=st.integers(1, 3))
def test_invariants(data: st.DataObject, n_tokens: int, n_groups: int, size: int) -> None:
    n_experts = n_groups * size
    groups_per_token = data.draw(st.integers(1, n_groups))
    k = data.draw(st.integers(1, groups_per_token * size))
    torch.manual_seed(data.draw(st.integers(0, 10_000)))
    router = router_with_signal(n_experts, k, scaling=2.5, n_groups=n_groups, groups_per_token=groups_per_token)
    logits, x = torch.randn(n_tokens, n_experts), torch.empty(n_tokens, 6)
    routing = router.route(logits, x)
    experts, weights = by_token(routing)
    assert all(len(set(row)) == k for row in experts.tolist())
    assert all(len(set(row)) <= groups_per_token for row in (experts // size).tolist())
    torch.testing.assert_close(weights.sum(dim=1), torch.full((n_tokens,), 2.5))
    assert (weights > 0).all()
    # Best first, of what the choice goes by.
    scores = (logits.sigmoid() + router.bias).gather(1, experts)
    assert (scores.diff(dim=1) <= 0).all()
    # Tokens are routed one by one; experts have no names, as long as their groups stay together.
    order = torch.randperm(n_tokens)
    shuffled_experts, shuffled_weights = by_token(router.route(logits[order], x))
    assert torch.equal(shuffled_experts, experts[order])
    assert torch.equal(shuffled_weights, weights[order])
    names = torch.cat([torch.randperm(size) + size * group for group in torch.randperm(n_groups).tolist()])
    router.bias = router.bias[names]
    renamed_experts, renamed_weights = by_token(router.route(logits[:, names], x))
    assert torch.equal(names[renamed_experts], experts)
    torch.testing.assert_close(renamed_weights, weights)
