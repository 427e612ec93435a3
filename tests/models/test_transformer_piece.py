"""Pieces of a decoder: chained they are the whole model, to the bit, and hold its own parameters."""

import gc
import itertools
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.models import MoEConfig, Transformer, TransformerConfig
from minillm.models.transformer_piece import TransformerPiece

VARIANTS = {
    **{positions: {"positions": positions} for positions in ("learned", "sinusoidal", "shaw", "t5", "rope", "alibi")},
    "none": {"positions": "none"},
    "untied": {"tied_embeddings": False},
    "t5 untied": {"positions": "t5", "tied_embeddings": False},
    "window": {"positions": "rope", "window": 3},
    "window and bias": {"positions": "alibi", "window": 3},
    "llama": {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "n_kv_heads": 2},
    "dropout": {"dropout": 0.3},
}
CUTS = [(), (1,), (3,), (4,), (2, 3), (1, 2, 3, 4)]
"""Of the five layers: embedding, three blocks, head."""


def make(dtype: torch.dtype = torch.float64, **changes: object) -> Transformer:
    torch.manual_seed(3)
    fields = {"vocab_size": 13, "context_length": 9, "d_model": 16, "n_layers": 3, "n_heads": 4} | changes
    config = TransformerConfig(relative_distance=4, relative_buckets=4, initializer_std=0.3, **fields)  # type: ignore[arg-type]
    return Transformer(config).to(dtype)


def cut(model: Transformer, cuts: Sequence[int]) -> list[TransformerPiece]:
    edges = (0, *cuts, len(model.blocks) + 2)
    return [TransformerPiece(model, i, j) for i, j in itertools.pairwise(edges)]


def chain(pieces: Sequence[nn.Module], tokens: Tensor) -> Tensor | tuple[Tensor, ...]:
    x: Tensor | tuple[Tensor, ...] = tokens
    for piece in pieces:
        x = piece(*x) if isinstance(x, tuple) else piece(x)
    return x


def learn(model: Transformer, pieces: Sequence[nn.Module] | None, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients, of the model or of its pieces."""
    torch.manual_seed(1)  # of dropout
    logits = model(rows[:, :-1]) if pieces is None else chain(pieces, rows[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return logits, grads


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_in_a_row_are_the_model(variant: str, cuts: tuple[int, ...]) -> None:
    model, rows = make(**VARIANTS[variant]), torch.randint(13, (2, 9))
    logits, grads = learn(model, None, rows)
    found, found_grads = learn(model, cut(model, cuts), rows)
    assert torch.equal(found, logits)
    for name, grad in grads.items():
        if name == "position_bias.weight":  # one sum over all blocks becomes a sum of sums: other roundings
            torch.testing.assert_close(found_grads[name], grad, rtol=1e-12, atol=1e-16)
        else:
            assert torch.equal(found_grads[name], grad), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_training_precisions(dtype: torch.dtype) -> None:
    model, tokens = make(dtype, positions="rope"), torch.randint(13, (2, 9))
    logits = chain(cut(model, (2, 3)), tokens)
    assert logits.dtype is dtype
    assert torch.equal(logits, model(tokens))


def test_a_long_text_takes_the_walk_over_tiles_in_pieces_too() -> None:
    model, tokens = make(torch.float32, context_length=520, positions="alibi", n_layers=2), torch.randint(13, (1, 520))
    with torch.no_grad():
        assert torch.equal(chain(cut(model, (2,)), tokens), model(tokens))


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_state_is_the_models_under_its_names(variant: str, cuts: tuple[int, ...]) -> None:
    model = make(**VARIANTS[variant])
    whole, together = model.state_dict(keep_vars=True), {}
    for piece in cut(model, cuts):
        for name, value in piece.state_dict(keep_vars=True).items():
            assert value is whole[name], name
            together[name] = value
        piece.load_state_dict({name: whole[name] for name in piece.state_dict()})
    assert together.keys() == whole.keys()


def test_what_several_pieces_need_is_in_each() -> None:
    pieces = cut(make(positions="t5"), (1, 2, 4))
    held = [{name for name, _ in piece.named_parameters() if "blocks" not in name} for piece in pieces]
    assert held == [
        {"token_embedding.weight"},
        {"position_bias.weight"},
        {"position_bias.weight"},
        {"token_embedding.weight", "final_norm.weight", "final_norm.bias"},
    ]


def test_mode_and_frozen_parts_stay() -> None:
    model = make(dropout=0.5).eval()
    model.blocks[1].requires_grad_(False)
    rows = torch.randint(13, (2, 9))
    pieces = cut(model, (2, 3))
    assert not any(module.training for piece in pieces for module in piece.modules())
    assert torch.equal(chain(pieces, rows), model(rows))
    _, grads = learn(model, None, rows)
    _, found = learn(model, pieces, rows)
    assert {name for name, grad in found.items() if grad is None} == {name for name in grads if "blocks.1." in name}
    assert all(found[name] is None or torch.equal(found[name], grad) for name, grad in grads.items())
    assert all(module.training for piece in cut(model.train(), (2, 3)) for module in piece.modules())


@pytest.mark.parametrize("cuts", CUTS)
def test_losses_of_routers_are_handed_on(cuts: tuple[int, ...]) -> None:
    model = make(moe=MoEConfig(n_experts=4, layers=(0, 2), z_loss=0.1)).train()
    tokens, upstream = torch.randint(13, (2, 9)), torch.randn(2, 9, 13, dtype=torch.float64)

    def backward(logits: Tensor, added: Tensor) -> dict[str, Tensor]:
        ((logits * upstream).sum() + added).backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        return grads

    logits, records = model(tokens, return_records=True)
    expected = sum(loss for record in records for loss in record.losses.values())
    wanted = backward(logits, expected)
    result = chain(cut(model, cuts), tokens)
    assert isinstance(result, tuple)
    assert torch.equal(result[0], logits)
    torch.testing.assert_close(result[1], expected, rtol=1e-6, atol=0)
    assert result[1].dim() == 0
    assert result[1] > 0
    found = backward(*result)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-6, atol=1e-9, msg=name)


def test_a_piece_alone_frees_the_rest() -> None:
    model = make(positions="t5")
    pieces = cut(model, (2, 3))
    kept, gone = (
        pieces[1],
        [
            weakref.ref(x)
            for x in (model, pieces[0], pieces[2], model.blocks[0], model.lm_head or model.token_embedding)
        ],
    )
    del model, pieces
    gc.collect()
    assert not any(ref() is not None for ref in gone)
    assert kept(torch.randn(1, 4, 16, dtype=torch.float64)).shape == (1, 4, 16)


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = make(torch.float32, positions="rope")
        logits = chain(cut(model, (1, 3)), torch.zeros(2, 9, dtype=torch.int64))
    assert logits.is_meta
    assert logits.shape == (2, 9, 13)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (2, 1), (-1, 2), (3, 6)])
def test_layers_that_are_not_there(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=rf"0 <= start < stop <= 5, got {start} and {stop}"):
        TransformerPiece(make(), start, stop)


def test_the_first_piece_reads_tokens_as_the_model_does() -> None:
    first = cut(make(), (2,))[0]
    with pytest.raises(TypeError, match="int64"):
        first(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="context_length is 9, got 10 tokens"):
        first(torch.zeros(1, 10, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"in \[0, 13\)"):
        first(torch.full((1, 4), 13))
