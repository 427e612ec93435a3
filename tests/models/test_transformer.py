"""The decoder by itself: initial weights, causality, cache, padding, precision, and its checks at the door."""

import contextlib
import math

import pytest
import torch
from torch.nn import functional as F

from minillm.costs import parameters
from minillm.models import Transformer, TransformerConfig, evaluation_mode, presets

GPT = TransformerConfig(vocab_size=50, context_length=16, d_model=32, n_layers=3, n_heads=4)
LLAMA = TransformerConfig(
    vocab_size=50,
    context_length=16,
    d_model=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    norm="rmsnorm",
    positions="rope",
    activation="swiglu",
    bias=False,
    tied_embeddings=False,
)
CONFIGS = pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 50, shape)


def test_initial_weights_have_the_intended_spread():
    config = TransformerConfig(vocab_size=2000, context_length=256, d_model=128, n_layers=8, initializer_std=0.05)
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
            expected = 0.05 / math.sqrt(16) if residual else 0.05
            # Five standard errors of a standard deviation of that many normal draws, and of their mean.
            n = parameter.numel()
            assert abs(parameter.std().item() / expected - 1) < 5 / math.sqrt(2 * n), name
            assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(n), name


@CONFIGS
def test_an_untrained_model_knows_nothing(config):
    tokens = _tokens(4, 16)
    loss = F.cross_entropy(Transformer(config)(tokens).flatten(0, 1), _tokens(4, 16).flatten())
    assert abs(loss.item() - math.log(50)) < 0.1


@CONFIGS
def test_no_token_sees_a_later_one_and_every_token_sees_all_before(config):
    model = Transformer(config.replace(initializer_std=0.3))
    embedded = []
    model.token_embedding.register_forward_hook(lambda module, args, out: embedded.append(out))
    logits = model(_tokens(1, 9))
    for place in range(9):
        (gradient,) = torch.autograd.grad(logits[0, place].square().sum(), embedded[0], retain_graph=True)
        touched = gradient[0].abs().sum(-1) > 0
        assert touched.tolist() == [True] * (place + 1) + [False] * (8 - place)


@CONFIGS
@pytest.mark.parametrize("chunks", [[1] * 13, [6, 1, 1, 5], [12, 1]])
def test_a_cache_gives_what_one_pass_gives(config, chunks):
    model = Transformer(config.replace(initializer_std=0.2)).eval()
    tokens = _tokens(2, 13)
    cache, pieces, start = model.new_cache(2, 13), [], 0
    with torch.no_grad():
        whole = model(tokens)
        for size in chunks:
            pieces.append(model(tokens[:, start : start + size], cache=cache))
            start += size
        assert cache.length == 13
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(tokens, last_only=True), whole[:, -1:], atol=1e-5, rtol=1e-4)


@CONFIGS
def test_padding_in_front_with_mask_and_positions_changes_nothing(config):
    model = Transformer(config.replace(initializer_std=0.2)).eval()
    tokens = _tokens(1, 9)
    padded = torch.cat([_tokens(1, 4), tokens], 1)
    positions = (torch.arange(13) - 4).clamp(min=0)[None]
    mask = (torch.arange(13) >= 4)[None, None, None]
    with torch.no_grad():
        out = model(padded, positions=positions, mask=mask)
        assert out.isfinite().all()
        torch.testing.assert_close(out[:, 4:], model(tokens), atol=1e-5, rtol=1e-4)


@CONFIGS
def test_packed_documents_behind_a_mask_do_not_see_each_other(config):
    model = Transformer(config.replace(initializer_std=0.2)).eval()
    first, second = _tokens(1, 5), _tokens(1, 7)
    document = torch.tensor([0] * 5 + [1] * 7)
    positions = torch.cat([torch.arange(5), torch.arange(7)])
    with torch.no_grad():
        packed = model(torch.cat([first, second], 1), positions=positions, mask=document[:, None] == document)
        torch.testing.assert_close(packed, torch.cat([model(first), model(second)], 1), atol=1e-5, rtol=1e-4)


@CONFIGS
def test_attention_weights_are_causal_distributions_and_leave_the_model_alone(config):
    model = Transformer(config.replace(dropout=0.5))
    model.blocks[1].eval()
    tokens = _tokens(2, 7)
    weights = model.attention_weights(tokens)
    assert [w.shape for w in weights] == [(2, 4, 7, 7)] * 3
    for w in weights:
        assert not w.triu(1).any()
        torch.testing.assert_close(w.sum(-1), torch.ones(2, 4, 7))
        assert not w.requires_grad
    assert model.training
    assert not model.blocks[1].training
    assert model.blocks[2].training
    assert all(torch.equal(a, b) for a, b in zip(weights, model.attention_weights(tokens), strict=True))


def test_evaluation_mode_gives_back_after_an_error_too():
    model = Transformer(GPT)
    with contextlib.suppress(RuntimeError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert all(module.training for module in model.modules())


@CONFIGS
def test_dropout_acts_in_training_only(config):
    model = Transformer(config.replace(dropout=0.3))
    tokens = _tokens(2, 7)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@CONFIGS
@pytest.mark.parametrize("how", ["cast", "autocast"])
def test_bfloat16_runs_forward_and_backward_close_to_float32(config, how):
    model = Transformer(config)
    tokens, targets = _tokens(2, 16), _tokens(2, 16).flatten()
    exact = F.cross_entropy(model(tokens).flatten(0, 1), targets)
    wanted = torch.autograd.grad(exact, list(model.parameters()))
    if how == "cast":
        model.to(torch.bfloat16)
        logits = model(tokens)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens)
    assert logits.dtype is torch.bfloat16
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets)
    assert abs(loss.item() - exact.item()) < 0.02
    loss.backward()
    for (name, parameter), want in zip(model.named_parameters(), wanted, strict=True):
        cosine = F.cosine_similarity(parameter.grad.float().flatten(), want.flatten(), dim=0)
        assert cosine > 0.98, name
    cache = model.new_cache(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        pieces = [
            model(tokens[:, :5], cache=cache),
            model(tokens[:, 5:6], cache=cache),
            model(tokens[:, 6:], cache=cache),
        ]
    torch.testing.assert_close(torch.cat(pieces, 1), logits.detach(), atol=0.05, rtol=0)


@CONFIGS
def test_state_holds_parameters_only_and_each_once(config):
    model = Transformer(config)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert sum(t.numel() for t in model.state_dict().values()) == parameters(config)


@CONFIGS
def test_compiles_without_a_break(config):
    torch.compiler.reset()  # what other tests compiled would decide which sizes stand in the graph
    model = Transformer(config)
    tokens = _tokens(2, 7)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))


def test_a_big_model_is_built_without_memory():
    with torch.device("meta"):
        model = Transformer(presets.get("llama-3-8b").replace(n_layers=2))
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([[1, 2]], TypeError, "tokens must be an int64 tensor, got list"),
        (torch.zeros(1, 2), TypeError, "tokens must be an int64 tensor, got torch.float32"),
        (torch.zeros(1, 2, dtype=torch.int32), TypeError, "got torch.int32"),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"tokens must be \(batch, seq\) .* got shape \(2,\)"),
        (torch.zeros(1, 0, dtype=torch.int64), ValueError, "seq of at least 1"),
        (torch.zeros(1, 17, dtype=torch.int64), ValueError, "context_length is 16, got 17 tokens"),
        (torch.tensor([[3, 50]]), ValueError, r"tokens must be in \[0, 50\) \(vocab_size\), got values from 3 to 50"),
        (torch.tensor([[-1, 4]]), ValueError, "got values from -1 to 4"),
    ],
)
@CONFIGS
def test_bad_tokens_are_refused_by_name(config, tokens, error, message):
    with pytest.raises(error, match=message):
        Transformer(config)(tokens)


def test_bad_positions_and_a_full_cache_are_refused_by_name():
    model = Transformer(GPT)
    for positions in (torch.arange(4), torch.zeros(3, 3).long(), torch.zeros(1, 1, 3).long(), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"positions must be int64, .* of tokens \(1, 3\), got"):
            model(_tokens(1, 3), positions=positions)
    cache = model.new_cache(1)
    with torch.no_grad():
        model(_tokens(1, 15), cache=cache)
        with pytest.raises(ValueError, match="context_length is 16, got 2 tokens after 15 cached"):
            model(_tokens(1, 2), cache=cache)


@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_bad_masks_and_other_models_caches_are_refused_by_name(positions):
    model = Transformer(GPT.replace(positions=positions))
    tokens = _tokens(2, 4)
    with pytest.raises(ValueError, match=r"mask must be boolean \(True: may look\), got torch.float32"):
        model(tokens, mask=torch.ones(4))
    for shape in ((2, 1, 4, 5), (3, 4), (1, 1, 1, 1, 4)):
        with pytest.raises(ValueError, match=r"mask must broadcast to \(batch, heads, query, key\) = \(2, "):
            model(tokens, mask=torch.ones(shape, dtype=torch.bool))
    for other in (GPT.replace(n_layers=GPT.n_layers + 1), GPT.replace(window=4)):
        with pytest.raises(ValueError, match=f"cache must be one for {GPT.n_layers} layers and a window of None"):
            model(tokens, cache=Transformer(other).new_cache(2))


@pytest.mark.gpu
@CONFIGS
def test_gpu_agrees_with_cpu(config):
    model = Transformer(config)
    tokens = _tokens(2, 16)
    expected = model(tokens)
    torch.testing.assert_close(model.to("cuda")(tokens.to("cuda")).cpu(), expected, atol=1e-4, rtol=1e-4)
