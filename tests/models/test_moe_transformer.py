"""A transformer with experts: its config, its records, its cache, and that with one expert it is the dense model."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minillm.inference import generate
from minillm.layers import FeedForward, MixtureOfExperts, SwiGLU
from minillm.layers.routers import ROUTERS
from minillm.models import MoEConfig, Transformer, TransformerConfig, presets

K = {"switch": 1, "glam": 2}


def _config(moe: MoEConfig, **changes) -> TransformerConfig:
    small = {"vocab_size": 29, "context_length": 16, "d_model": 16, "n_layers": 3, "n_heads": 2, "activation": "swiglu"}
    return TransformerConfig(**(small | {"moe": moe, "initializer_std": 0.2} | changes))


@settings(max_examples=25, deadline=None)
@given(
    n_experts=st.integers(2, 9),
    layers=st.sampled_from([None, (0,), (2, 0), (1, 2)]),
    router=st.sampled_from(sorted(ROUTERS)),
    capacity=st.sampled_from([None, 0.5, 1.25]),
    shared=st.integers(0, 2),
    d_ff=st.sampled_from([None, 7]),
)
def test_the_config_survives_json_and_builds_what_it_says(n_experts, layers, router, capacity, shared, d_ff):
    k = K.get(router, 2)
    moe = MoEConfig(
        n_experts, k, layers=layers, router=router, capacity_factor=capacity, n_shared_experts=shared, d_ff=d_ff
    )
    config = _config(moe)
    again = TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    model = Transformer(config)
    for layer, block in enumerate(model.blocks):
        if layers is None or layer in layers:
            assert isinstance(block.feed_forward, MixtureOfExperts)
            assert isinstance(block.feed_forward.router, ROUTERS[router])
            assert block.feed_forward.experts.up.shape == (n_experts, d_ff or config.d_ff, 16)
            assert block.feed_forward.capacity_factor == capacity
        else:
            assert isinstance(block.feed_forward, SwiGLU)
    assert len(model.mixtures()) == (3 if layers is None else len(layers))
    logits, records = model(torch.randint(0, 29, (2, 5)), return_records=True)
    assert logits.shape == (2, 5, 29)
    assert len(records) == len(model.mixtures())
    assert all(record.routing.n_tokens == 10 and record.routing.n_experts == n_experts for record in records)


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_one_expert_is_the_dense_model(activation, bias):
    """The weights of the dense model in the only expert: the same logits, the same gradients."""
    dense = Transformer(dataclasses.replace(_config(None), activation=activation, bias=bias)).double()
    sparse = Transformer(dataclasses.replace(_config(MoEConfig(1, 1)), activation=activation, bias=bias)).double()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, parameter in sparse.named_parameters():
            if ".router." not in name:
                dense_name = name.replace(".experts.", ".").replace("_bias", ".bias")
                dense_name += "" if dense_name.endswith(("weight", "bias")) else ".weight"
                parameter.copy_(dense.get_parameter(dense_name))
    tokens, targets = torch.randint(0, 29, (2, 3, 7))
    torch.testing.assert_close(sparse(tokens), dense(tokens))
    for model in (dense, sparse):
        F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
    for ours, theirs in zip(sparse.blocks, dense.blocks, strict=True):
        torch.testing.assert_close(ours.feed_forward.experts.down.grad[0], theirs.feed_forward.down.weight.grad)
        torch.testing.assert_close(ours.feed_forward.experts.up.grad[0], theirs.feed_forward.up.weight.grad)
        torch.testing.assert_close(ours.attention.qkv.weight.grad, theirs.attention.qkv.weight.grad)
    assert isinstance(dense.blocks[0].feed_forward, SwiGLU | FeedForward)


@pytest.mark.parametrize("router", sorted(set(ROUTERS) - {"expert_choice"}))
def test_the_future_changes_nothing_and_neither_does_the_cache(router):
    """In evaluation mode, where nothing is dropped, a token's experts depend on the token alone."""
    model = Transformer(_config(MoEConfig(4, K.get(router, 2), router=router, capacity_factor=0.5))).double().eval()
    tokens = torch.randint(0, 29, (3, 16))
    whole = model(tokens)
    torch.testing.assert_close(model(tokens[:, :9]), whole[:, :9])
    cache = model.new_cache(3)
    steps = [model(piece, cache=cache) for piece in tokens.split([5, 1, 4, 6], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)
    prompts = [[1, 2, 3], [4]]  # one row is padded: the other's text is what it is alone
    model = model.float()
    together = generate(model, prompts, max_new_tokens=8, temperature=0.0)
    alone = [generate(model, [prompt], max_new_tokens=8, temperature=0.0)[0] for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize("router", ["softmax", "expert_choice"])
def test_padding_takes_nobodys_room(router):
    """With a capacity in evaluation mode, and where experts choose, a row's text would depend on its padding."""
    model = Transformer(_config(MoEConfig(4, 2, router=router, eval_capacity_factor=0.5))).double().eval()
    tokens = torch.randint(0, 29, (2, 9))
    token_mask = torch.ones(2, 9, dtype=torch.bool)
    token_mask[1, :4] = False
    mask = token_mask[:, None, None, :]
    other = tokens.masked_fill(~token_mask, 3)
    expected, records = model(tokens, mask=mask, token_mask=token_mask, return_records=True)
    logits = model(other, mask=mask, token_mask=token_mask)
    torch.testing.assert_close(logits[token_mask], expected[token_mask])
    assert records[0].routing.n_tokens == 14
    seen = []
    model.mixtures()[0].register_forward_pre_hook(lambda m, args, kw: seen.append(kw["token_mask"]), with_kwargs=True)
    generate(model.float(), [[1, 2, 3], [4]], max_new_tokens=2, temperature=0.0)
    assert seen[0].tolist() == [[True] * 3, [False, False, True]]


def test_a_noisy_router_begins_with_zeros():
    """Equal loads at the start (Shazeer et al. 2017, appendix A), though other matrices are drawn."""
    model = Transformer(_config(MoEConfig(4, 2, router="noisy_top_k")))
    for mixture in model.mixtures():
        assert not any(parameter.any() for parameter in mixture.router.parameters())
        assert mixture.experts.up.any()


def test_dropped_tokens_pass_their_block_through_the_residual():
    model = Transformer(_config(MoEConfig(4, 1, layers=(2,), router="switch", capacity_factor=0.5)))
    tokens = torch.randint(0, 29, (2, 16))
    block, seen = model.blocks[2], {}
    block.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    block.attention.register_forward_hook(lambda module, inputs, out: seen.update(attended=out))
    block.register_forward_hook(lambda module, inputs, out: seen.update(out=out[0]))
    _, (record,) = model(tokens, return_records=True)
    dropped = record.routing.tokens[~record.kept]
    assert 16 <= len(dropped) < 32
    unchanged = (seen["out"] == seen["x"] + seen["attended"]).all(dim=-1).flatten()
    assert unchanged[dropped].all()
    assert not unchanged[record.routing.tokens[record.kept]].any()


def test_initial_weights_are_those_of_the_dense_model():
    config = presets.get("tiny").replace(moe=MoEConfig(8, 2, n_shared_experts=1), n_layers=2)
    model = Transformer(config)
    layer = model.mixtures()[0]
    for weight, std in (
        (layer.router.weight, 0.02),
        (layer.experts.up, 0.02),
        (layer.experts.down, 0.02 / 2),  # sqrt(2 n_layers)
        (layer.shared.down.weight, 0.02 / 2),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.1)
    assert not layer.experts.up_bias.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_near_float64(dtype):
    model = Transformer(_config(MoEConfig(4, 2, n_shared_experts=1))).eval()
    tokens = torch.randint(0, 29, (2, 9))
    exact, records = model.double()(tokens, return_records=True)
    logits, again = model.to(dtype)(tokens, return_records=True)
    assert logits.dtype is dtype
    assert all(record.routing.probabilities.dtype is torch.float32 for record in again)
    same = torch.tensor(
        [torch.equal(a.routing.experts, b.routing.experts) for a, b in zip(records, again, strict=True)]
    )
    if same.all():  # a token between two experts may go to the other one in half precision
        atol = 1e-4 if dtype is torch.float32 else 0.5
        torch.testing.assert_close(logits.double(), exact, atol=atol, rtol=0.1)
    assert logits.isfinite().all()


def test_autocast_trains():
    model = Transformer(_config(MoEConfig(4, 2)))
    tokens = torch.randint(0, 29, (2, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, records = model(tokens, return_records=True)
    assert logits.dtype is torch.bfloat16
    (logits.float().mean() + sum(records[0].losses.values())).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert records[0].routing.weights.dtype is torch.float32


def test_blocks_can_be_recomputed():
    model = Transformer(_config(MoEConfig(4, 2)))
    x = torch.randn(2, 5, 16, requires_grad=True)
    plain, record = model.blocks[0](x, return_record=True)
    again, same = checkpoint(model.blocks[0], x, return_record=True, use_reentrant=False)
    assert torch.equal(plain, again)
    for out, its in ((plain, record), (again, same)):
        model.zero_grad()
        (out.square().sum() + its.losses["balance"]).backward()
        gradient = model.blocks[0].feed_forward.router.weight.grad.clone()
        if out is plain:
            expected = gradient
    torch.testing.assert_close(gradient, expected)


# Both are about what torch's compiler does itself, where a graph breaks and goes on.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated:DeprecationWarning")
def test_compiled_it_computes_the_same():
    model = Transformer(_config(MoEConfig(4, 2), n_layers=1))
    tokens = torch.randint(0, 29, (2, 9))
    expected, (record,) = model(tokens, return_records=True)
    logits, (compiled,) = torch.compile(model, backend="eager")(tokens, return_records=True)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(compiled.losses["balance"], record.losses["balance"])
    assert torch.equal(compiled.load, record.load)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MoEConfig(4, 5), ValueError, "k must be at most n_experts=4, got 5"),
        (lambda: MoEConfig(0), ValueError, "n_experts must be at least 1, got 0"),
        (lambda: MoEConfig(4.0), TypeError, "n_experts must be an integer, got 4.0"),
        (lambda: MoEConfig(4, d_ff=0), ValueError, "d_ff must be at least 1, got 0"),
        (lambda: MoEConfig(4, capacity_factor=0), ValueError, "capacity_factor must be above 0 and finite, got 0"),
        (lambda: MoEConfig(4, eval_capacity_factor=-1.0), ValueError, "eval_capacity_factor must be .*got -1.0"),
        (lambda: MoEConfig(4, capacity_factor="1"), TypeError, "capacity_factor must be .*got '1'"),
        (lambda: MoEConfig(4, n_shared_experts=-1), ValueError, "n_shared_experts must be at least 0, got -1"),
        (lambda: MoEConfig(4, router="best"), ValueError, "router must be one of softmax, .*got 'best'"),
        (lambda: MoEConfig(4, router="switch"), ValueError, "k must be 1"),
        (lambda: MoEConfig(4, balance_loss=-1.0), ValueError, "balance_loss must be at least 0"),
        (
            lambda: MoEConfig(4, router_options={"temperature": 2}),
            ValueError,
            "no option temperature; it has renormalise",
        ),
        (lambda: MoEConfig(4, router_options=None), TypeError, "router_options must be a dict, got None"),
        (
            lambda: MoEConfig(4, router_options={"k": 3}),
            ValueError,
            "router_options must not hold k: give them as fields",
        ),
        (lambda: MoEConfig(4, router_options={"renormalise": "no"}), TypeError, "renormalise must be True or False"),
        (lambda: MoEConfig(4, layers=()), ValueError, "layers must be"),
        (lambda: MoEConfig(4, layers=(1, 1)), ValueError, "layers must be different numbers"),
        (lambda: MoEConfig(4, layers=(0.5,)), TypeError, "layers must be None or integers"),
        (lambda: MoEConfig(4, layers="ab"), TypeError, "layers must be None or integers, got 'ab'"),
        (lambda: _config(MoEConfig(4, layers=(3,))), ValueError, r"moe.layers must be below n_layers=3, got \(3,\)"),
        (lambda: _config({"n_experts": 4}), TypeError, "moe must be None or a MoEConfig"),
        (lambda: TransformerConfig.from_dict({"vocab_size": 9, "moe": {"k": 2}}), ValueError, "n_experts is missing"),
        (
            lambda: TransformerConfig.from_dict({"vocab_size": 9, "moe": {"n_experts": 2, "top": 2}}),
            ValueError,
            "unknown moe field top; the fields are n_experts, k, layers",
        ),
    ],
)
def test_bad_configs_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()
