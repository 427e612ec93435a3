"""Switch routing against transformers' Switch Transformers: router, losses and the whole sparse layer."""

import pytest
import torch
from torch import nn
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
    SwitchTransformersTop1Router,
    load_balancing_loss_func,
    router_z_loss_func,
)

from minillm.layers import MixtureOfExperts
from minillm.layers.dispatch import expert_capacity
from minillm.layers.routers import SwitchRouter, load_balancing_loss, make_router, router_z_loss

D_MODEL, D_FF, N_EXPERTS, N_TOKENS = 12, 20, 4, 24


def _config(capacity: int = 64, jitter: float = 0.0) -> SwitchTransformersConfig:
    return SwitchTransformersConfig(
        d_model=D_MODEL,
        d_ff=D_FF,
        num_experts=N_EXPERTS,
        expert_capacity=capacity,
        router_jitter_noise=jitter,
        dropout_rate=0.0,
    )


def _twin_router(jitter: float = 0.0) -> tuple[SwitchTransformersTop1Router, SwitchRouter]:
    twin = SwitchTransformersTop1Router(_config(jitter=jitter))
    nn.init.normal_(twin.classifier.weight, std=0.5)
    router = SwitchRouter(D_MODEL, N_EXPERTS, jitter=jitter)
    with torch.no_grad():
        router.weight.copy_(twin.classifier.weight)
    return twin, router


def _twin_layer(capacity: int, dtype: torch.dtype) -> tuple[SwitchTransformersSparseMLP, MixtureOfExperts]:
    twin = SwitchTransformersSparseMLP(_config(capacity)).to(dtype)
    # Their capacity is a number of tokens; the factor that gives it to ours.
    factor = capacity * N_EXPERTS / N_TOKENS
    assert expert_capacity(N_TOKENS, N_EXPERTS, 1, factor) == capacity
    layer = MixtureOfExperts(
        D_MODEL,
        D_FF,
        N_EXPERTS,
        1,
        router=SwitchRouter(D_MODEL, N_EXPERTS, jitter=0.0),
        activation="relu",
        capacity_factor=factor,
        eval_capacity_factor=factor,
    ).to(dtype)
    with torch.no_grad():
        layer.router.weight.copy_(nn.init.normal_(twin.router.classifier.weight, std=0.5))
        for number, expert in enumerate(twin.experts.values()):
            layer.experts.up[number].copy_(nn.init.normal_(expert.wi.weight, std=0.3))
            layer.experts.down[number].copy_(nn.init.normal_(expert.wo.weight, std=0.3))
    return twin, layer


def test_router_equals_transformers():
    twin, router = _twin_router()
    x = torch.randn(1, N_TOKENS, D_MODEL)
    one_hot, weights, logits = twin(x)
    routing = router(x[0])
    assert torch.equal(routing.experts, one_hot[0].argmax(-1))
    assert torch.equal(routing.tokens, torch.arange(N_TOKENS))
    torch.testing.assert_close(routing.weights, weights.flatten())
    torch.testing.assert_close(routing.probabilities, logits[0].softmax(-1))
    torch.testing.assert_close(routing.weights, routing.probabilities.max(-1).values)  # not divided by anything


def test_losses_equal_transformers_with_gradients():
    """A sequence at a time: theirs takes the mean over sequences, each balanced by itself."""
    logits = torch.randn(3, N_TOKENS, N_EXPERTS, requires_grad=True)
    probabilities = logits.softmax(-1)
    experts = probabilities.argmax(-1)
    expected = load_balancing_loss_func(probabilities, experts)
    balance = torch.stack([load_balancing_loss(*pair) for pair in zip(probabilities, experts, strict=True)]).mean()
    z, expected_z = router_z_loss(logits.flatten(0, 1)), router_z_loss_func(logits)
    for ours, theirs in ((balance, expected), (z, expected_z)):
        torch.testing.assert_close(ours, theirs)
        grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*grads)


def test_the_routers_losses_are_those_with_the_papers_coefficients():
    twin, router = _twin_router()
    router.z_loss = 0.001
    x = torch.randn(1, N_TOKENS, D_MODEL)
    one_hot, _, logits = twin(x)
    losses = router(x[0]).losses
    torch.testing.assert_close(
        losses["balance"], 0.01 * load_balancing_loss_func(logits.softmax(-1), one_hot.argmax(-1))
    )
    torch.testing.assert_close(losses["z"], 0.001 * router_z_loss_func(logits))


def test_the_loss_is_alpha_at_uniform_load_and_larger_as_soon_as_it_is_not():
    """Section 2.2: with f = P = 1 / N the sum is 1 / N, and the loss alpha, whatever N is."""
    for n_experts in (1, 2, 8):
        router = SwitchRouter(n_experts, n_experts, jitter=0.0)
        with torch.no_grad():
            router.weight.copy_(5.0 * torch.eye(n_experts))
        uniform = torch.eye(n_experts).repeat(6, 1)
        assert router(uniform).losses["balance"].item() == pytest.approx(0.01)
        if n_experts > 1:
            skewed = torch.cat((uniform, torch.eye(n_experts)[:1]))
            assert router(skewed).losses["balance"].item() > 0.01 + 1e-6


@pytest.mark.parametrize("capacity", [1, 3, 6, N_TOKENS])
def test_whole_layer_equals_transformers_gradients_and_drops_included(capacity):
    twin, layer = _twin_layer(capacity, torch.float32)
    x = torch.randn(3, N_TOKENS, D_MODEL)
    n_dropped = 0
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = twin(other)
    answers = []
    for sequence in mine:  # their capacity counts in each sequence by itself
        answer, record = layer(sequence)
        answers.append(answer)
        dropped = record.routing.tokens[~record.kept]
        assert not answer[dropped].any()
        assert int(record.load.max()) <= capacity
        assert int(record.load.sum()) + len(dropped) == N_TOKENS
        n_dropped += len(dropped)
    out = torch.stack(answers)
    assert (n_dropped > 0) == (capacity < N_TOKENS)
    assert n_dropped == int((expected == 0).all(-1).sum())
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    pairs = [(mine.grad, other.grad), (layer.router.weight.grad, twin.router.classifier.weight.grad)]
    for number, expert in enumerate(twin.experts.values()):
        for ours, theirs in ((layer.experts.up, expert.wi.weight), (layer.experts.down, expert.wo.weight)):
            pairs.append((ours.grad[number], torch.zeros_like(theirs) if theirs.grad is None else theirs.grad))
    for grad, expected_grad in pairs:
        torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-4)


def test_whole_layer_in_bfloat16_equals_transformers():
    """The router in float32 in both, the experts in bfloat16; theirs rounds the probabilities before it compares."""
    twin, layer = _twin_layer(6, torch.bfloat16)
    x = torch.randn(4, N_TOKENS, D_MODEL, dtype=torch.bfloat16)
    expected = twin(x)
    for sequence, theirs in zip(x, expected, strict=True):
        out, record = layer(sequence)
        rounded = record.routing.probabilities.bfloat16().topk(2).values
        assert (rounded[:, 0] > rounded[:, 1]).all()  # no two equal by rounding among these tokens
        assert out.dtype is torch.bfloat16
        assert record.routing.weights.dtype is record.losses["balance"].dtype is torch.float32
        torch.testing.assert_close(out, theirs, atol=0.0, rtol=0.01)
        assert record.kept.sum() < N_TOKENS


def test_jitter_equals_transformers_from_the_same_seed():
    twin, router = _twin_router(jitter=0.2)
    x = torch.randn(1, N_TOKENS, D_MODEL)
    torch.manual_seed(5)
    expected = twin(x.clone())[2][0]  # they write into their input
    torch.manual_seed(5)
    torch.testing.assert_close(router.logits(x[0]), expected)
    assert (router.logits(x[0]) - expected).abs().max() > 0.01  # the next draw is another one


def test_jitter_stays_in_its_bounds_is_off_in_evaluation_and_leaves_the_input_alone():
    router = SwitchRouter(1, 4)
    assert router.jitter == 0.01  # the paper's, and what the name gives
    assert make_router("switch", 1, 4, 1).jitter == 0.01
    nn.init.ones_(router.weight)
    x = torch.full((20_000, 1), 2.0)
    kept = x.clone()
    factors = router.logits(x)[:, 0] / 2.0
    assert torch.equal(x, kept)
    assert 0.99 - 1e-6 <= factors.min() < 0.9901
    assert 1.0099 < factors.max() <= 1.01 + 1e-6
    # uniform: mean 1 and standard deviation 0.01 / sqrt(3), within five standard errors of each
    assert factors.mean().item() == pytest.approx(1.0, abs=5 * 0.01 / 3**0.5 / 20_000**0.5)
    assert factors.std().item() == pytest.approx(0.01 / 3**0.5, rel=0.03)
    router.eval()
    assert router.logits(x).eq(2.0).all()
    assert SwitchRouter(1, 4, jitter=0.0).train().logits(x).std(dim=0).max() == 0.0


def test_jitter_reaches_the_router_but_not_the_expert():
    layer = MixtureOfExperts(8, 16, 1, 1, router=SwitchRouter(8, 1, jitter=0.5))
    x = torch.randn(5, 8)
    trained = layer(x)[0]
    layer.eval()
    torch.testing.assert_close(trained, layer(x)[0])  # with one expert the weight is 1 whatever the router saw


def test_more_than_one_choice_is_refused():
    with pytest.raises(ValueError, match="k must be 1 for Switch routing, got 2"):
        SwitchRouter(8, 4, 2)
    with pytest.raises(ValueError, match="k must be 1 for Switch routing, got 2"):
        make_router("switch", 8, 4, 2)
