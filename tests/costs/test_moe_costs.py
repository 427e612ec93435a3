"""Parameters and FLOPs of models with experts: the model's own tensors, their gradients, torch's FLOP counter."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minillm.costs import (
    active_parameters,
    decode_flops_per_token,
    dense_weights,
    expert_parameters,
    forward_flops,
    moe_layers,
    parameters,
    parameters_by_part,
    training_flops,
)
from minillm.models import MoEConfig, Transformer, TransformerConfig, presets

N_LAYERS = 3
_PARTS = {".experts.": "experts", ".shared.": "shared_experts", ".router.": "router"}


def _moe(router_and_k, n_experts, **fields):
    router, k = router_and_k
    return MoEConfig(n_experts, k or min(3, n_experts), router=router, **fields)


def _configs(routers):
    return st.builds(
        lambda moe, **fields: TransformerConfig(
            vocab_size=19, context_length=8, d_model=8, n_layers=N_LAYERS, n_heads=2, d_ff=12, moe=moe, **fields
        ),
        moe=st.builds(
            _moe,
            st.sampled_from(routers),
            st.integers(2, 5),
            layers=st.sampled_from([None, (1,), (0, 2)]),
            d_ff=st.sampled_from([None, 5]),
            n_shared_experts=st.integers(0, 2),
        ),
        activation=st.sampled_from(["gelu", "swiglu"]),
        bias=st.booleans(),
        tied_embeddings=st.booleans(),
    )


_ROUTERS = [("softmax", None), ("softmax", 1), ("switch", 1), ("glam", 2), ("noisy_top_k", 2), ("sigmoid", 2)]
_EVERY_ROUTER = [*_ROUTERS, ("expert_choice", 2)]


@settings(max_examples=20, deadline=None)
@given(config=_configs(_EVERY_ROUTER))
def test_parameters_equal_the_model_in_all_and_in_each_part(config):
    with torch.device("meta"):
        model = Transformer(config)
    expected = parameters_by_part(config)
    assert parameters(config) == sum(p.numel() for p in model.parameters()) == sum(expected.values())
    counted = dict.fromkeys(("experts", "shared_experts", "router", "feed_forward"), 0)
    for name, parameter in model.named_parameters():
        if "feed_forward." in name:
            counted[next((part for key, part in _PARTS.items() if key in name), "feed_forward")] += parameter.numel()
    assert {part: expected[part] for part in counted} == counted
    assert moe_layers(config) == tuple(range(N_LAYERS) if config.moe.layers is None else config.moe.layers)


@settings(max_examples=20, deadline=None)
@given(config=_configs(_ROUTERS), seed=st.integers(0, 99))
def test_active_parameters_are_those_that_one_token_reaches(config, seed):
    """A single token through the model: experts without a gradient are those it was not sent to."""
    torch.manual_seed(seed)
    model = Transformer(config)
    logits = model(torch.randint(0, 19, (1, 1)))
    logits.sum().backward()
    idle = 0
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            reached = torch.zeros(parameter.size(0), dtype=torch.bool)
            if parameter.grad is not None:
                reached = parameter.grad.flatten(1).ne(0).any(dim=1)
            # A layer's last bias reaches all of its outputs: zeros there mean that no token came.
            idle += int((~reached).sum()) * parameter[0].numel()
    assert active_parameters(config) == parameters(config) - idle
    dense = dataclasses.replace(config, moe=None)
    assert active_parameters(dense) == parameters(dense)


def _counted(run) -> int:
    # The counter knows addmm but not the form that adds in place, which the experts' backward pass uses.
    in_place = {torch.ops.aten.addmm_: lambda added, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run()
    return counter.get_total_flops()


@settings(max_examples=15, deadline=None)
@given(config=_configs(_ROUTERS), batch=st.integers(1, 3), seq=st.integers(1, 8))
def test_flops_equal_the_products_that_ran(config, batch, seq):
    model = Transformer(config).eval()
    tokens = torch.randint(0, 19, (batch, seq))
    assert _counted(lambda: model(tokens)) == forward_flops(config, batch, seq)
    model.train()

    def step() -> None:
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()

    assert _counted(step) == pytest.approx(training_flops(config, batch * seq, seq=seq), rel=1e-12)


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "noisy_top_k"])
def test_a_decode_step_equals_the_products_that_ran(router):
    moe = MoEConfig(4, 2, router=router, n_shared_experts=1, layers=(1,))
    config = TransformerConfig(vocab_size=19, context_length=8, d_model=8, n_layers=2, n_heads=2, moe=moe)
    model = Transformer(config).eval()
    cache = model.new_cache(2)
    tokens = torch.randint(0, 19, (2, 6))
    with torch.no_grad():
        model(tokens[:, :5], cache=cache)
        assert _counted(lambda: model(tokens[:, 5:], cache=cache)) == 2 * decode_flops_per_token(config, 5)


def test_expert_choice_costs_k_experts_a_token_on_average():
    """Exact where k * n_tokens is a multiple of n_experts."""
    moe = MoEConfig(4, 2, router="expert_choice")
    config = TransformerConfig(vocab_size=19, context_length=8, d_model=8, n_layers=2, n_heads=2, moe=moe)
    model = Transformer(config).eval()
    assert _counted(lambda: model(torch.randint(0, 19, (1, 8)))) == forward_flops(config, 1, 8)


def test_more_experts_cost_parameters_and_next_to_no_operations():
    """Fedus et al. 2022, section 2: parameters grow with the experts, FLOPs a token only with the router's rows."""
    few, many = (
        TransformerConfig(vocab_size=100, d_model=64, n_layers=2, n_heads=2, moe=MoEConfig(n, 1, router="switch"))
        for n in (8, 64)
    )
    assert parameters(many) - parameters(few) == 2 * 56 * (expert_parameters(few) + 64)
    assert dense_weights(many) - dense_weights(few) == 2 * 56 * 64
    assert active_parameters(many) - active_parameters(few) == 2 * 56 * 64
    # One expert of one and no choice is the dense model and a router row.
    one = few.replace(moe=MoEConfig(1, 1))
    assert parameters(one) == active_parameters(one) == parameters(few.replace(moe=None)) + 2 * 64


def test_mixtral_has_the_published_counts():
    """Jiang et al. 2024; the released weights have 46,702,792,704 parameters."""
    config = presets.get("mixtral-8x7b")
    assert parameters(config) == 46_702_792_704
    assert round(active_parameters(config) / 1e9, 1) == 12.9


def test_what_has_no_experts_is_refused_by_name():
    with pytest.raises(ValueError, match="config must have experts, got one with moe=None"):
        expert_parameters(presets.get("tiny"))
    assert moe_layers(presets.get("tiny")) == ()
