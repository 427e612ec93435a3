"""Generation against transformers' greedy search, against the model run without a cache, and in its manners."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from minillm.inference import candidates, generate, stream
from minillm.models import Transformer, huggingface

VOCAB, CONTEXT = 61, 24


@functools.cache
def _theirs(family: str):
    torch.manual_seed(5)
    shared = {"vocab_size": VOCAB, "initializer_range": 0.4, "bos_token_id": None, "eos_token_id": None}
    if family == "gpt2":
        config = GPT2Config(n_positions=CONTEXT, n_embd=24, n_layer=2, n_head=4, **shared)
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        max_position_embeddings=CONTEXT,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **shared,
    )
    return LlamaForCausalLM(config).eval()


@functools.cache
def _ours(family: str) -> Transformer:
    return huggingface.from_transformers(_theirs(family))


FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama"])
prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)


@FAMILIES
@settings(max_examples=15, deadline=None)
@given(prompt=prompts, new=st.integers(1, 12))
def test_greedy_equals_transformers(family, prompt, new):
    tokens = torch.tensor([prompt])
    expected = _theirs(family).generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    assert generate(_ours(family), prompt, max_new_tokens=new, temperature=0) == expected[0, len(prompt) :].tolist()


def _without_cache(model: Transformer, prompt: list[int], new: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            tokens.append(int(model(torch.tensor([tokens[-CONTEXT:]]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@FAMILIES
@settings(max_examples=15, deadline=None)
@given(batch=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40), min_size=1, max_size=4))
def test_unequal_prompts_and_texts_beyond_the_context_equal_one_by_one_without_a_cache(family, batch):
    model = _ours(family)
    together = generate(model, batch, max_new_tokens=20, temperature=0)
    assert together == [_without_cache(model, prompt, 20) for prompt in batch]


@FAMILIES
def test_stop_tokens_end_each_row_for_itself_and_are_left_out(family):
    model = _ours(family)
    batch = [[1, 2, 3], [7], [20, 21]]
    full = generate(model, batch, max_new_tokens=15, temperature=0)
    stops = {full[0][4], full[1][2]}
    expected = [row[: next((i for i, token in enumerate(row) if token in stops), 15)] for row in full]
    assert generate(model, batch, max_new_tokens=15, temperature=0, stop_tokens=stops) == expected
    assert list(stream(model, batch[0], max_new_tokens=15, temperature=0, stop_tokens=stops)) == expected[0]
    assert generate(model, [1, 2, 3], max_new_tokens=5, temperature=0, stop_tokens=[full[0][0]]) == []


def test_a_seed_decides_and_the_global_generator_is_left_alone():
    model = _ours("gpt2")
    state = torch.get_rng_state()
    first = generate(model, [[1, 2], [3]], max_new_tokens=10, seed=4)
    assert first == generate(model, [[1, 2], [3]], max_new_tokens=10, seed=4)
    assert first != generate(model, [[1, 2], [3]], max_new_tokens=10, seed=5)
    assert generate(model, [1], max_new_tokens=30) != generate(model, [1], max_new_tokens=30)
    single = generate(model, [1, 2], max_new_tokens=10, seed=4, top_k=5, top_p=0.9)
    assert single == list(stream(model, [1, 2], max_new_tokens=10, seed=4, top_k=5, top_p=0.9))
    assert torch.equal(torch.get_rng_state(), state)


def test_first_tokens_follow_the_models_distribution():
    model, n = _ours("gpt2"), 4000
    drawn = generate(model, [[5, 6]] * n, max_new_tokens=1, temperature=2.0, top_k=5, seed=0)
    counts = torch.tensor(drawn).flatten().bincount(minlength=VOCAB)
    with torch.no_grad():
        probabilities, ids = candidates(model(torch.tensor([[5, 6]]))[:, -1], temperature=2.0, top_k=5)
    expected = probabilities[0] * n
    assert counts[ids[0]].sum() == n
    assert ((counts[ids[0]] - expected).square() / expected).sum() < 33.4  # chi-square, 4 degrees, one in a million


def test_the_model_is_given_back_as_it_was():
    model = Transformer(_ours("gpt2").config.replace(dropout=0.5))
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]

    def unchanged() -> bool:
        return [module.training for module in model.modules()] == modes and torch.is_grad_enabled()

    greedy = generate(model, [1, 2], max_new_tokens=5, temperature=0)
    assert unchanged()
    assert generate(model, [1, 2], max_new_tokens=5, temperature=0) == greedy  # no dropout
    tokens = stream(model, [1, 2], max_new_tokens=5, temperature=0)
    assert next(tokens) == greedy[0]
    assert unchanged()
    model(torch.tensor([[1]])).sum().backward()  # in the middle of the stream
    assert list(tokens) == greedy[1:]
    assert unchanged()

    def broken(*args: object) -> None:
        raise RuntimeError("on purpose")

    model.blocks[1].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        generate(model, [1], max_new_tokens=1)
    assert unchanged()


def test_a_step_feeds_one_token_and_scores_one_place():
    model = Transformer(_ours("llama").config)
    lengths: list[tuple[int, ...]] = []
    model.register_forward_hook(
        lambda m, args, kwargs, out: lengths.append((args[0].size(1), out.size(1))), with_kwargs=True
    )
    generate(model, [1, 2, 3, 4, 5], max_new_tokens=4)
    assert lengths == [(5, 1), (1, 1), (1, 1), (1, 1)]


def test_zero_new_tokens_tensors_and_bfloat16():
    model = _ours("gpt2")
    assert generate(model, [1], max_new_tokens=0) == []
    assert generate(model, [[1], [2]], max_new_tokens=0) == [[], []]
    assert list(stream(model, [1], max_new_tokens=0)) == []
    greedy = generate(model, [[1, 2], [3, 4]], max_new_tokens=3, temperature=0)
    assert generate(model, torch.tensor([[1, 2], [3, 4]]), max_new_tokens=3, temperature=0) == greedy
    half = huggingface.from_transformers(_theirs("llama")).to(torch.bfloat16)
    assert len(generate(half, [1, 2], max_new_tokens=30, temperature=0)) == 30


@pytest.mark.parametrize(
    ("prompt", "arguments", "error", "message"),
    [
        ("text", {}, TypeError, "prompt must be token ids, got str: encode it"),
        (["a", "b"], {}, TypeError, r"prompt\[0\] must be a list of token ids"),
        ([], {}, ValueError, "prompt must hold at least one token, got none"),
        ([[1], []], {}, ValueError, r"prompt\[1\] must hold at least one token"),
        ([1, 61], {}, ValueError, r"prompt must hold ids in \[0, 61\) .* from 1 to 61"),
        ([[1], [-2]], {}, ValueError, r"prompt\[1\] must hold ids in"),
        ([1.5], {}, TypeError, "prompt must be a list of token ids"),
        ([1], {"max_new_tokens": -1}, ValueError, "max_new_tokens must be an integer of at least 0, got -1"),
        ([1], {"temperature": -1.0}, ValueError, "temperature must be 0"),
        ([1], {"top_k": 0}, ValueError, "top_k must be None or"),
        ([1], {"top_p": 0}, ValueError, "top_p must be None or"),
        ([1], {"temperature": math.nan}, ValueError, "temperature must be 0"),
        ([1], {"top_p": math.nan}, ValueError, "top_p must be None or"),
        (3, {}, TypeError, "prompt must be a list of token ids"),
        (torch.tensor(3), {}, TypeError, "prompt must be a list of token ids"),
        ([1], {"seed": 1.5}, TypeError, "seed must be an integer or None, got 1.5"),
        ([1], {"seed": "1"}, TypeError, "seed must be an integer or None, got '1'"),
        ([1], {"seed": 2**64}, ValueError, "seed must fit into 64 bits, got 18446744073709551616"),
        ([1], {"seed": -(2**63) - 1}, ValueError, "seed must fit into 64 bits"),
        ([1], {"stop_tokens": 5}, TypeError, "stop_tokens must be a collection of token ids"),
        ([1], {"stop_tokens": ["."]}, TypeError, "stop_tokens must be a collection of token ids"),
    ],
)
@pytest.mark.parametrize("function", [generate, stream])
def test_bad_input_is_refused_at_the_call(function, prompt, arguments, error, message):
    if function is stream and isinstance(prompt, list) and prompt and isinstance(prompt[0], list | str):
        error, message = TypeError, "prompt"
        if prompt[-1] in ([], [-2]):
            error = ValueError
    with pytest.raises(error, match=message):
        function(_ours("gpt2"), prompt, **({"max_new_tokens": 2} | arguments))


def test_several_prompts_are_not_streamed():
    with pytest.raises(TypeError, match="several prompts cannot be streamed"):
        stream(_ours("gpt2"), [[1], [2]], max_new_tokens=2)


@pytest.mark.gpu
def test_gpu_generates_what_the_cpu_generates():
    model = _ours("llama")
    batch = [[1, 2, 3], [4, 5, 6, 7, 8]]
    expected = generate(model, batch, max_new_tokens=10, temperature=0)
    on_gpu = Transformer(model.config)
    on_gpu.load_state_dict(model.state_dict())
    assert isinstance(on_gpu, nn.Module)
    assert generate(on_gpu.to("cuda"), batch, max_new_tokens=10, temperature=0) == expected
    assert len(generate(on_gpu, [1], max_new_tokens=10, seed=1)) == 10
