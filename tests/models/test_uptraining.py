"""Merged key and value heads: the mean written with einops, and transformers' Llama where nothing may change."""

import copy

import pytest
import torch
import transformers
from einops import reduce
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from minillm.costs import kv_cache_bytes_per_token, parameters
from minillm.models import Transformer, TransformerConfig, convert_kv_heads, huggingface

transformers.utils.logging.set_verbosity_error()


def _model(**changes) -> Transformer:
    small = {"vocab_size": 29, "context_length": 12, "d_model": 24, "n_layers": 2, "n_heads": 4, "head_dim": 6}
    model = Transformer(TransformerConfig(**(small | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # biases start as zeros, which would hide a swap
    return model


def _with_equal_heads(model: Transformer, n_groups: int) -> Transformer:
    """Each group's key heads, and value heads, made copies of its first."""
    with torch.no_grad():
        for block in model.blocks:
            attention = block.attention
            for parameter in attention.qkv.parameters():
                for part in parameter.split(attention.qkv_sizes)[1:]:
                    heads = part.unflatten(0, (n_groups, -1, attention.head_dim))
                    heads.copy_(heads[:, :1].clone().expand_as(heads))
    return model


TOKENS = torch.arange(24).reshape(2, 12)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    heads=st.sampled_from([(4, 4, 2), (4, 4, 1), (4, 2, 1), (6, 6, 3), (6, 6, 2), (1, 1, 1)]),
    bias=st.booleans(),
    tied=st.booleans(),
    positions=st.sampled_from(["learned", "sinusoidal", "rope", "alibi", "t5", "shaw", "none"]),
)
def test_the_mean_is_that_of_each_groups_rows_and_nothing_else_changes(seed, heads, bias, tied, positions):
    torch.manual_seed(seed)
    n_heads, old, new = heads
    model = _model(n_heads=n_heads, n_kv_heads=old, bias=bias, tied_embeddings=tied, positions=positions)
    before = copy.deepcopy(model.state_dict())
    converted = convert_kv_heads(model, new)
    assert converted.config == model.config.replace(n_kv_heads=new)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)  # the original is untouched
        got = converted.state_dict()[name]
        if ".qkv." not in name:
            torch.testing.assert_close(got, tensor, rtol=0, atol=0)
            continue
        query, key, value = tensor.split([n_heads * 6, old * 6, old * 6])
        axes = "(g h d) m -> (g d) m" if tensor.dim() == 2 else "(g h d) -> (g d)"
        pooled = [reduce(part, axes, "mean", g=new, d=6) for part in (key, value)]
        torch.testing.assert_close(got, torch.cat([query, *pooled]))
    fresh = Transformer(converted.config)
    fresh.load_state_dict(converted.state_dict())
    torch.testing.assert_close(converted(TOKENS), fresh(TOKENS))
    assert sum(p.numel() for p in converted.parameters()) == parameters(converted.config)


@pytest.mark.parametrize("method", ["mean", "first"])
@pytest.mark.parametrize(("old", "new"), [(4, 2), (4, 1), (2, 1)])
def test_merging_equal_heads_changes_nothing(method, old, new):
    model = _with_equal_heads(_model(n_kv_heads=old, positions="rope"), new)
    torch.testing.assert_close(convert_kv_heads(model, new, method=method)(TOKENS), model(TOKENS))


@pytest.mark.parametrize("method", ["mean", "first"])
@pytest.mark.parametrize("heads", [4, 2])
def test_as_many_heads_as_there_are_is_the_identity(method, heads):
    model = _model(n_kv_heads=heads)
    converted = convert_kv_heads(model, heads, method=method)
    for name, tensor in model.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor)
    assert converted.blocks[0].attention.qkv.weight is not model.blocks[0].attention.qkv.weight


def test_the_mean_in_two_steps_is_the_mean_in_one():
    model = _model()
    once = convert_kv_heads(model, 1).state_dict()
    twice = convert_kv_heads(convert_kv_heads(model, 2), 1).state_dict()
    for name, tensor in once.items():
        torch.testing.assert_close(twice[name], tensor)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_llama_with_equal_heads_keeps_its_logits(kv_heads):
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37,
            max_position_embeddings=16,
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    with torch.no_grad():
        for layer in llama.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                heads = projection.weight.unflatten(0, (kv_heads, -1, 4))
                heads.copy_(heads[:, :1].clone().expand_as(heads))
        tokens = torch.randint(0, 37, (2, 9))
        converted = convert_kv_heads(huggingface.from_transformers(llama), kv_heads)
        expected = llama(tokens).logits
        torch.testing.assert_close(converted(tokens), expected, atol=1e-5, rtol=1e-4)
        back = huggingface.to_transformers(converted)
        assert back.config.num_key_value_heads == kv_heads
        torch.testing.assert_close(back(tokens).logits, expected, atol=1e-5, rtol=1e-4)


def test_first_takes_the_first_head_of_each_group_and_random_draws_as_a_new_model_does():
    model = _model(d_model=96, n_heads=8, head_dim=12)
    query, key, value = model.blocks[1].attention.qkv.weight.split([96, 96, 96])
    first = convert_kv_heads(model, 2, method="first").blocks[1].attention.qkv
    torch.testing.assert_close(first.weight, torch.cat([query, key[:12], key[48:60], value[:12], value[48:60]]))

    random = convert_kv_heads(model, 2, method="random", seed=3)
    drawn = torch.stack([block.attention.qkv.weight[96:] for block in random.blocks])
    assert drawn.std().item() == pytest.approx(model.config.initializer_std, rel=0.05)
    assert not torch.equal(drawn[0], drawn[1])
    assert not random.blocks[1].attention.qkv.bias[96:].any()
    torch.testing.assert_close(random.blocks[1].attention.qkv.weight[:96], query)
    again, other = (convert_kv_heads(model, 2, method="random", seed=seed) for seed in (3, 4))
    assert torch.equal(again.blocks[0].attention.qkv.weight, random.blocks[0].attention.qkv.weight)
    assert not torch.equal(other.blocks[0].attention.qkv.weight, random.blocks[0].attention.qkv.weight)


@pytest.mark.parametrize("method", ["mean", "first", "random"])
def test_what_was_shared_frozen_or_of_another_dtype_still_is(method):
    model = _model(dropout=0.1)
    model.blocks[1].attention.qkv.weight = model.blocks[0].attention.qkv.weight
    model.blocks[0].attention.qkv.weight.requires_grad_(False)
    model.token_embedding.weight.requires_grad_(False)
    model.bfloat16().eval()
    model.blocks[0].attention.qkv.bias.data = model.blocks[0].attention.qkv.bias.data.double()
    converted = convert_kv_heads(model, 1, method=method)
    assert converted.blocks[1].attention.qkv.weight is converted.blocks[0].attention.qkv.weight
    flags = {name: (p.requires_grad, p.dtype, p.device) for name, p in model.named_parameters()}
    assert flags == {name: (p.requires_grad, p.dtype, p.device) for name, p in converted.named_parameters()}
    assert not any(module.training for module in converted.modules())


def test_a_linear_map_that_two_blocks_share_is_merged_once():
    model = _model()
    model.blocks[1].attention.qkv = model.blocks[0].attention.qkv
    converted = convert_kv_heads(model, 2)
    assert converted.blocks[1].attention.qkv is converted.blocks[0].attention.qkv
    assert converted.blocks[0].attention.qkv.weight.shape == (48, 24)
    assert converted(TOKENS).isfinite().all()


def test_the_mean_of_half_precision_heads_is_rounded_once():
    model = _model(n_heads=4).bfloat16()
    exact = copy.deepcopy(model).double()
    ours, wanted = (convert_kv_heads(m, 1).blocks[0].attention.qkv.weight for m in (model, exact))
    assert torch.equal(ours, wanted.bfloat16())


def test_a_converted_model_trains_and_generates_with_the_smaller_cache():
    model = _model(positions="rope")
    converted = convert_kv_heads(model, 1)
    F.cross_entropy(converted(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in converted.parameters())
    assert all(p.grad is None for p in model.parameters())
    cache = converted.new_cache(2)
    assert cache.nbytes * 4 == model.new_cache(2).nbytes
    assert cache.nbytes == 2 * 12 * kv_cache_bytes_per_token(converted.config, 4)
    with torch.no_grad():
        stepwise = torch.cat([converted(TOKENS[:, [i]], cache=cache) for i in range(12)], dim=1)
    torch.testing.assert_close(stepwise, converted(TOKENS))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_kv_heads": 3}, ValueError, "n_kv_heads must divide the model's 4 key heads, got 3"),
        ({"n_kv_heads": 8}, ValueError, "got 8"),
        ({"n_kv_heads": 0}, ValueError, "got 0"),
        ({"n_kv_heads": 2.0}, ValueError, "got 2.0"),
        ({"n_kv_heads": 2, "method": "median"}, ValueError, "method must be one of mean, first, random, got 'median'"),
        ({"model": torch.nn.Linear(2, 2), "n_kv_heads": 1}, TypeError, "model must be a .*Transformer, got Linear"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        convert_kv_heads(**({"model": _model()} | arguments))
