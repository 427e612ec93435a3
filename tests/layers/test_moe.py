"""The whole mixture: every router and dispatch against a loop over tokens in float64, and transformers' Mixtral."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from minillm.layers import FeedForward, MixtureOfExperts, SwiGLU
from minillm.layers.routers import ROUTERS, TopKRouter

K = {"switch": 1}  # the others: 2


def _mixture(router: str = "softmax", **arguments) -> MixtureOfExperts:
    sizes = {"d_model": 6, "d_ff": 5, "n_experts": 4, "k": K.get(router, 2), **arguments}
    layer = MixtureOfExperts(**sizes, router=router).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.7)
    return layer


def _by_token(layer: MixtureOfExperts, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, int]:
    """One token and one assignment after the other, and how many of them found their expert full.

    Each expert is a dense layer with its own copy of the numbers (views, so that gradients reach the stacks).
    """
    tokens = x if mask is None else x[mask]
    routing = layer.router(tokens)
    factor = layer.capacity_factor if layer.training else layer.eval_capacity_factor
    room = math.inf
    if factor is not None:
        room = math.ceil(round(factor * layer.router.k * len(tokens) / layer.router.n_experts, 9))
    out, used, dropped = [token * 0 for token in tokens], [0] * layer.router.n_experts, 0
    for number in range(len(routing.tokens)):
        token, expert = int(routing.tokens[number]), int(routing.experts[number])
        if used[expert] >= room:
            dropped += 1
            continue
        used[expert] += 1
        if layer.experts.gate is None:
            dense: nn.Module = FeedForward(layer.experts.d_model, layer.experts.d_ff)
        else:
            dense = SwiGLU(layer.experts.d_model, layer.experts.d_ff, bias=layer.experts.up_bias is not None)
        numbers = {}
        for name, stack in layer.experts.named_parameters():
            matrix, _, is_bias = name.partition("_")
            numbers[f"{matrix}.{'bias' if is_bias else 'weight'}"] = stack[expert]
        answer = torch.func.functional_call(dense, numbers, (tokens[token],), strict=True)
        out[token] = out[token] + routing.weights[number] * answer
    result = torch.stack(out) if out else tokens * 0
    if mask is not None:
        whole = torch.zeros_like(x)
        whole[mask] = result
        result = whole
    return result if layer.shared is None else result + layer.shared(x), dropped


def _compare(layer: MixtureOfExperts, x: Tensor, mask: Tensor | None = None) -> None:
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(1)  # routers draw noise
    out, record = layer(one, token_mask=mask)
    torch.manual_seed(1)
    expected, dropped = _by_token(layer, other, mask)
    torch.testing.assert_close(out, expected)
    assert int((~record.kept).sum()) == dropped
    assert int(record.load.sum()) == int(record.kept.sum()) == len(record.routing.tokens) - dropped
    gradient = torch.randn_like(out)
    parameters = list(layer.parameters())
    ours, theirs = (
        torch.autograd.grad(y, (leaf, *parameters), gradient, allow_unused=True, materialize_grads=True)
        for y, leaf in ((out, one), (expected, other))
    )
    for mine, loop in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, loop)


@pytest.mark.parametrize("dispatch", ["sorted", "einsum"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("capacity_factor", [None, 0.6, 1.0])
def test_every_router_and_dispatch_equals_a_loop_over_tokens(dispatch, router, capacity_factor):
    layer = _mixture(router, dispatch=dispatch, capacity_factor=capacity_factor)
    _compare(layer, torch.randn(11, 6, dtype=torch.float64))
    _compare(layer.eval(), torch.randn(7, 6, dtype=torch.float64))


@pytest.mark.parametrize("dispatch", ["sorted", "einsum"])
@pytest.mark.parametrize("router", ROUTERS)
def test_masked_tokens_and_shared_experts(dispatch, router):
    layer = _mixture(router, dispatch=dispatch, capacity_factor=0.7, n_shared_experts=2, bias=True)
    x, mask = torch.randn(12, 6, dtype=torch.float64), torch.rand(12) < 0.6
    _compare(layer, x, mask)
    _compare(layer, x, torch.zeros(12, dtype=torch.bool))


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_activations(activation):
    _compare(_mixture(activation=activation, bias=True), torch.randn(8, 6, dtype=torch.float64))


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "gelu_tanh"])
def test_shared_experts_are_one_dense_layer_of_their_width(activation):
    layer = _mixture(activation=activation, n_shared_experts=3, bias=True)
    if activation == "swiglu":
        dense: nn.Module = SwiGLU(6, 15, bias=True)
    else:
        dense = FeedForward(6, 15, approximate="tanh" if activation == "gelu_tanh" else "none")
    dense.double().load_state_dict(layer.shared.state_dict())
    x = torch.randn(8, 6, dtype=torch.float64)
    together = layer(x)[0]
    layer.shared = None
    torch.testing.assert_close(together, layer(x)[0] + dense(x))


@pytest.mark.parametrize("dispatch", ["sorted", "einsum"])
def test_capacities_of_training_and_of_evaluation(dispatch):
    """The mode decides which factor holds."""
    layer = _mixture("switch", dispatch=dispatch, capacity_factor=0.5, eval_capacity_factor=2.0)
    layer.router.jitter = 0.0
    x = torch.randn(1, 6, dtype=torch.float64).expand(12, 6)  # all to one expert
    assert int(layer(x)[1].kept.sum()) == 2  # ceil(0.5 * 12 / 4)
    assert int(layer.eval()(x)[1].kept.sum()) == 6
    _compare(layer, torch.randn(12, 6, dtype=torch.float64))
    layer.eval_capacity_factor = None
    assert bool(layer(x)[1].kept.all())


@settings(max_examples=30, deadline=None)
@given(
    n_tokens=st.integers(0, 9),
    d_model=st.integers(1, 5),
    d_ff=st.integers(1, 5),
    n_experts=st.integers(1, 6),
    k=st.integers(1, 6),
    capacity_factor=st.none() | st.floats(0.1, 3.0),
    dispatch=st.sampled_from(["sorted", "einsum"]),
)
def test_any_size(n_tokens, d_model, d_ff, n_experts, k, capacity_factor, dispatch):
    layer = MixtureOfExperts(
        d_model, d_ff, n_experts, min(k, n_experts), capacity_factor=capacity_factor, dispatch=dispatch
    ).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    _compare(layer, torch.randn(n_tokens, d_model, dtype=torch.float64))


@pytest.mark.parametrize(("n_experts", "k"), [(4, 2), (8, 2), (3, 3), (5, 1)])
@pytest.mark.parametrize("dispatch", ["sorted", "einsum"])
def test_equals_transformers_mixtral_block(n_experts, k, dispatch):
    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=n_experts, num_experts_per_tok=k)
    theirs = MixtralSparseMoeBlock(config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = MixtureOfExperts(16, 24, n_experts, k, dispatch=dispatch)
    with torch.no_grad():
        gate, up = theirs.experts.gate_up_proj.chunk(2, dim=1)
        pairs = (
            (ours.router.weight, theirs.gate.weight),
            (ours.experts.gate, gate),
            (ours.experts.up, up),
            (ours.experts.down, theirs.experts.down_proj),
        )
        for mine, other in pairs:
            mine.copy_(other)
    x = torch.randn(2, 9, 16)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ours(one)[0], theirs(other)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    gradient = torch.randn_like(x)
    out.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(ours.router.weight.grad, theirs.gate.weight.grad, atol=1e-4, rtol=1e-3)
    stacked = torch.cat((ours.experts.gate.grad, ours.experts.up.grad), dim=1)
    torch.testing.assert_close(stacked, theirs.experts.gate_up_proj.grad, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(ours.experts.down.grad, theirs.experts.down_proj.grad, atol=1e-4, rtol=1e-3)


def test_dropped_tokens_are_zero_and_counted():
    layer = _mixture("switch", capacity_factor=0.5)
    out, record = layer(torch.randn(40, 6, dtype=torch.float64))
    dropped = record.routing.tokens[~record.kept]
    assert len(dropped) > 0
    assert not out[dropped].any()
    assert out[record.routing.tokens[record.kept]].any(dim=1).all()
    assert record.load.tolist() == torch.bincount(record.routing.experts, minlength=4).clamp(max=5).tolist()
    assert int(record.load.sum()) + len(dropped) == 40


def test_ample_capacity_is_no_capacity():
    x = torch.randn(10, 6, dtype=torch.float64)
    layer = _mixture()
    expected = layer(x)[0]
    for dispatch in ("sorted", "einsum"):
        other = _mixture(capacity_factor=2.0, dispatch=dispatch)  # 4 experts, 2 choices: room for all in one
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(other(x)[0], expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("dispatch", ["sorted", "einsum"])
def test_precision(dtype, tolerance, dispatch):
    layer = MixtureOfExperts(32, 48, 4, 2, dispatch=dispatch)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    layer = layer.to(dtype)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(50, 32).to(dtype)
    out, record = layer(x)
    expected, exact_record = exact(x.double())
    assert out.dtype is dtype
    assert record.routing.weights.dtype is torch.float32
    assert torch.equal(record.routing.experts, exact_record.routing.experts)  # the router computes in float32
    error = (out.detach().double() - expected.detach()).norm() / expected.detach().norm()
    assert error < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_checkpointing(dtype):
    layer = MixtureOfExperts(16, 24, 4, 2, capacity_factor=1.0)
    x = torch.randn(20, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x)[0]
        again = checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)
    assert out.dtype is torch.float32
    assert torch.equal(out, again)
    torch.testing.assert_close(out, layer(x)[0], atol=1e-3, rtol=3e-2)
    parameters = (x, *layer.parameters())
    for one, other in zip(
        torch.autograd.grad(out.sum(), parameters), torch.autograd.grad(again.sum(), parameters), strict=True
    ):
        assert one.dtype is torch.float32
        assert torch.equal(one, other)


def test_the_same_seed_gives_the_same_layer_and_noise():
    x = torch.randn(9, 6, dtype=torch.float64)

    def run() -> Tensor:
        torch.manual_seed(3)
        return _mixture("noisy_top_k")(x)[0]

    assert torch.equal(run(), run())


def test_empty_batches():
    layer = _mixture(capacity_factor=1.0)
    for shape in ((0, 6), (2, 0, 6)):
        x = torch.empty(shape, dtype=torch.float64, requires_grad=True)
        out, record = layer(x)
        assert out.shape == shape
        assert record.load.tolist() == [0] * 4
        out.sum().backward()
        assert x.grad.shape == shape
    assert layer(torch.ones(6, dtype=torch.float64))[0].shape == (6,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 5}, "k must be at most n_experts=4, got 5"),
        ({"capacity_factor": 0.0}, r"capacity_factor must be above 0 and finite, got 0\.0"),
        ({"eval_capacity_factor": -1.0}, r"eval_capacity_factor must be above 0 and finite, got -1\.0"),
        ({"capacity_factor": math.nan}, "capacity_factor must be above 0 and finite, got nan"),
        ({"dispatch": "magic"}, "dispatch must be one of sorted, einsum, got 'magic'"),
        ({"n_shared_experts": -1}, "n_shared_experts must be at least 0, got -1"),
        ({"router": "nearest"}, "router must be one of softmax, .* got 'nearest'"),
        ({"router": TopKRouter(6, 4, 1)}, r"router must be one for .* \(6, 4, 2\), got \(6, 4, 1\)"),
        ({"d_ff": 0}, "d_ff must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfExperts(**{"d_model": 6, "d_ff": 5, "n_experts": 4, "k": 2, **arguments})


def test_bad_inputs():
    layer = _mixture()
    x = torch.randn(3, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"x must be \(..., d_model=6\), got \(3, 5\)"):
        layer(x[:, :5])
    with pytest.raises(ValueError, match=r"token_mask must be bool \(3,\), got torch.bool \(2,\)"):
        layer(x, token_mask=torch.ones(2, dtype=torch.bool))
    x[1, 2] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        layer(x)
