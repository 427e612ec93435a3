"""Every position scheme in a whole model: cache, padding, windows, grouped heads, gradients and costs."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillm.costs import parameters, parameters_by_part
from minillm.inference import generate
from minillm.layers import RollingLayerKVCache, causal_mask
from minillm.models import Transformer, TransformerConfig

SCHEMES = ["learned", "sinusoidal", "shaw", "t5", "rope", "alibi", "none"]


def _model(positions: str, **changes: object) -> Transformer:
    fields = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "relative_distance": 20} | changes
    config = TransformerConfig(**{"vocab_size": 29, "context_length": 40, "positions": positions} | fields)
    model = Transformer(config.replace(initializer_std=0.3)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


class _LargestTensor(TorchDispatchMode):
    """The most elements that any operation's result has."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.size = max([self.size, *(result.numel() for result in tree_leaves(results) if torch.is_tensor(result))])
        return results


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("positions", SCHEMES)
@pytest.mark.parametrize("chunks", [[30], [1] * 30, [7, 1, 1, 12, 1, 8]])
@torch.no_grad()
def test_a_cache_filled_in_pieces_gives_what_one_pass_gives(positions, window, chunks):
    model = _model(positions, window=window)
    tokens = torch.randint(0, 29, (2, 30))
    cache, pieces = model.new_cache(2), []
    assert isinstance(cache.layers[0], RollingLayerKVCache) == (window is not None)
    for piece in tokens.split(chunks, dim=1):
        pieces.append(model(piece, cache=cache))
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_cache_too_small_to_roll_is_masked_to_the_window():
    model = _model("rope", window=11, context_length=12)
    tokens = torch.randint(0, 29, (1, 12))
    cache = model.new_cache(1)
    assert not isinstance(cache.layers[0], RollingLayerKVCache)
    steps = torch.cat([model(token, cache=cache) for token in tokens.split(1, dim=1)], 1)
    torch.testing.assert_close(steps, model(tokens), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(steps, model.eval()(tokens, mask=causal_mask(12, 12, window=10)), atol=1e-4)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("positions", SCHEMES)
def test_unequal_prompts_generate_what_each_generates_alone(positions, window):
    model = _model(positions, window=window)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7], [1]]
    together = generate(model, prompts, max_new_tokens=20, temperature=0)
    assert together == [generate(model, prompt, max_new_tokens=20, temperature=0) for prompt in prompts]


@pytest.mark.parametrize("positions", SCHEMES)
@torch.no_grad()
def test_a_window_is_the_mask_that_hides_older_tokens(positions):
    windowed, plain = _model(positions, window=5), _model(positions)
    plain.load_state_dict(windowed.state_dict())
    tokens = torch.randint(0, 29, (2, 30))
    distance = torch.arange(30)[:, None] - torch.arange(30)
    torch.testing.assert_close(windowed(tokens), plain(tokens, mask=distance < 5))
    # Two layers of window 5 reach back 2 * 4 tokens and no further.
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 29
    differs = (windowed(tokens) - windowed(changed)).abs().amax(-1)[0] > 0
    assert differs.nonzero().flatten().tolist() == list(range(10, 19))


@pytest.mark.parametrize("positions", SCHEMES)
@torch.no_grad()
def test_one_layer_without_positions_sees_a_set_and_with_them_a_sequence(positions):
    model = _model(positions, n_layers=1)
    tokens = torch.randperm(29)[None, :12]
    shuffled = torch.cat([tokens[:, torch.randperm(11)], tokens[:, 11:]], 1)
    same = torch.allclose(model(tokens)[:, -1], model(shuffled)[:, -1], atol=1e-5)
    assert same == (positions == "none")


@pytest.mark.parametrize("positions", SCHEMES)
def test_every_parameter_learns_and_all_are_counted(positions):
    model = _model(positions, relative_distance=16, relative_buckets=8)
    tokens = torch.randint(0, 29, (2, 40))
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert parameters(model.config) == sum(p.numel() for p in model.parameters())
    expected = {"learned": 40 * 32, "t5": 8 * 4, "shaw": 2 * 2 * 17 * 8}.get(positions, 0)
    assert parameters_by_part(model.config)["position_embedding"] == expected


@pytest.mark.parametrize("positions", SCHEMES)
@torch.no_grad()
def test_float64_float32_and_bfloat16_agree_as_far_as_they_can(positions):
    model = _model(positions, initializer_std=0.05)
    tokens = torch.randint(0, 29, (2, 40))
    single = model(tokens)
    double = copy.deepcopy(model).double()(tokens)
    half = model.to(torch.bfloat16)(tokens)
    assert (single.dtype, double.dtype, half.dtype) == (torch.float32, torch.float64, torch.bfloat16)
    assert (single - double).abs().mean() < 1e-5 * double.abs().mean()
    assert (half - double).abs().mean() < 0.02 * double.abs().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", SCHEMES)
def test_gradients_in_half_precision_point_where_float32s_do(positions, dtype):
    model = _model(positions, initializer_std=0.05, window=12)
    tokens = torch.randint(0, 29, (2, 40))

    def gradient(**autocast: object) -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cpu", **autocast):
            logits = model(tokens)
        F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    exact = gradient(enabled=False)
    assert F.cosine_similarity(gradient(dtype=dtype), exact, dim=0) > 0.999


@pytest.mark.parametrize("positions", SCHEMES)
def test_attention_weights_show_the_window(positions):
    model = _model(positions, window=4)
    for weights in model.attention_weights(torch.randint(0, 29, (1, 10))):
        assert weights.shape == (1, 4, 10, 10)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 10))
        distance = torch.arange(10)[:, None] - torch.arange(10)
        assert torch.equal(weights[0] > 0, ((distance >= 0) & (distance < 4)).expand(4, -1, -1))


def test_sinusoidal_positions_are_added_to_embeddings_of_their_size():
    """Vaswani et al. 2017, sections 3.4 and 3.5: the embedding times sqrt(d_model), plus sines and cosines."""
    model = _model("sinusoidal", n_layers=1)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.tensor([[3, 3]]))
    pair = torch.arange(0, 32, 2) / 32
    angles = torch.arange(2)[:, None] / 10000**pair
    expected = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)
    torch.testing.assert_close(seen[0][0], model.token_embedding.weight[3] * 32**0.5 + expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positions": "t5", "relative_buckets": 40, "relative_distance": 20}, "relative_buckets must be .* 40 and 20"),
        ({"positions": "sinusoidal", "d_model": 9, "n_heads": 3}, "d_model must be even for positions='sinusoidal'"),
    ],
)
def test_schemes_that_cannot_be_built_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(vocab_size=29, **fields)


@pytest.mark.parametrize("positions", SCHEMES)
def test_more_tokens_than_the_context_are_refused(positions):
    with pytest.raises(ValueError, match="context_length is 40, got 41 tokens"):
        _model(positions)(torch.zeros(1, 41, dtype=torch.int64))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("positions", SCHEMES)
def test_long_texts_with_a_window_give_what_masking_gives(positions, padded):
    windowed = _model(positions, window=24, relative_distance=20, context_length=530, n_layers=1)
    plain = _model(positions, relative_distance=20, context_length=530, n_layers=1)
    plain.load_state_dict(windowed.state_dict())
    tokens = torch.randint(0, 29, (2, 530))
    distance = torch.arange(530)[:, None] - torch.arange(530)
    padding = torch.ones(2, 1, 1, 530, dtype=torch.bool)
    if padded:
        padding[1, ..., :100] = False
    got = windowed(tokens, mask=padding if padded else None)
    expected = plain(tokens, mask=(distance < 24) & padding)
    seen = padding[:, 0, 0]
    torch.testing.assert_close(got[seen], expected[seen], atol=1e-4, rtol=1e-4)
    upstream = torch.randn_like(got[seen])
    got[seen].backward(upstream)
    expected[seen].backward(upstream)
    for ours, theirs in zip(windowed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("positions", ["alibi", "t5"])
def test_long_texts_with_a_bias_give_what_masking_gives(monkeypatch, positions, padded):
    model = _model(positions, context_length=530, n_layers=2, initializer_std=0.1)
    tokens = torch.randint(0, 29, (2, 530))
    mask = torch.arange(530) >= torch.tensor([0, 100])[:, None]  # (2, 530)
    seen = mask if padded else torch.ones_like(mask)
    upstream = torch.randn(int(seen.sum()), 29)
    results = []
    for way in ("walk", "mask"):
        if way == "mask":
            monkeypatch.setattr("minillm.models.sight._sparse_pays", lambda *_: False)
        model.zero_grad()
        logits = model(tokens, mask=mask[:, None, None] if padded else None)[seen]
        logits.backward(upstream)
        results.append([logits, *(parameter.grad.clone() for parameter in model.parameters())])
    for ours, masked in zip(*results, strict=True):
        torch.testing.assert_close(ours, masked, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("positions", ["alibi", "t5"])
@torch.no_grad()
def test_a_long_piece_behind_a_filled_cache_gives_what_one_pass_gives(positions):
    model = _model(positions, context_length=900, n_layers=1)
    tokens = torch.randint(0, 29, (1, 900))
    cache = model.new_cache(1)
    pieces = torch.cat([model(piece, cache=cache) for piece in tokens.split([300, 600], dim=1)], 1)
    torch.testing.assert_close(pieces, model(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "seq", "walks"),
    [
        ({"positions": "alibi"}, 512, True),
        ({"positions": "t5"}, 512, True),
        ({"positions": "alibi"}, 511, False),
        ({"positions": "rope"}, 600, False),
        ({"positions": "rope", "window": 100}, 512, True),
        ({"positions": "alibi", "window": 200}, 600, False),
        ({"positions": "shaw", "window": 100}, 600, False),
    ],
)
@torch.no_grad()
def test_where_a_walk_over_the_tiles_is_taken(changes, seq, walks):
    model = _model(context_length=600, n_layers=1, **changes)
    _, how = model._embed(torch.zeros(1, seq, dtype=torch.int64), None, None, None)
    assert ("attend" in how) == walks


@pytest.mark.parametrize("changes", [{"positions": "alibi"}, {"positions": "rope", "window": 64}])
@torch.no_grad()
def test_a_compiled_model_gives_the_same_on_a_long_text(changes):
    torch.compiler.reset()  # what other tests compiled would decide which sizes stand in the graph
    model = _model(context_length=520, n_layers=1, **changes)
    tokens = torch.randint(0, 29, (1, 520))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens), atol=1e-4, rtol=1e-4)


def test_a_window_makes_no_square_of_the_length():
    model = _model("rope", window=16, context_length=2048, n_layers=1)
    with _LargestTensor() as largest:
        model(torch.randint(0, 29, (1, 2048))).sum().backward()
    assert largest.size <= 2048 * 128  # the feed-forward's
