"""Models in pieces: what the whole computes, under its names, cut by parameters, FLOPs or time."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillm import costs
from minillm.distributed.pipeline import Split, partition, split
from minillm.distributed.pipeline.layer_costs import flop_costs, parameter_costs, time_costs
from minillm.models import MoEConfig, Transformer, TransformerConfig

WIDTH = 4


class Residual(nn.Module):
    """Several tensors in, several out."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.map(x)) + skip, x


class Fork(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, 2 * x


class Join(nn.Module):
    """Takes a pair as one argument, as a child of `nn.Sequential` does."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] * pair[1]


def row() -> nn.Sequential:
    """A linear layer and an activation that stand there twice, a name of its own, frozen parts."""
    torch.manual_seed(2)
    shared, again = nn.Tanh(), nn.Linear(WIDTH, WIDTH)
    layers = [nn.Linear(WIDTH, 6), shared, nn.Linear(6, WIDTH), again, shared, again, nn.Linear(WIDTH, 3)]
    model = nn.Sequential(*layers).double()
    model.add_module("last", nn.LayerNorm(3).double())
    model[2].requires_grad_(False)
    return model


def chain(pieces: Sequence[nn.Module], x: Any) -> Any:
    for piece in pieces:
        x = piece(*x) if isinstance(x, tuple) else piece(x)
    return x


def transformer(**changes: Any) -> Transformer:
    torch.manual_seed(4)
    fields = {"vocab_size": 17, "context_length": 12, "d_model": 16, "n_layers": 3, "n_heads": 2} | changes
    return Transformer(TransformerConfig(**fields)).double()


@pytest.mark.parametrize("n_pieces", range(1, 9))
def test_pieces_of_a_row_are_the_row(n_pieces: int) -> None:
    model, x = row(), torch.randn(5, WIDTH, dtype=torch.float64)
    parts = split(model, n_pieces)
    assert isinstance(parts, Split)
    assert len(parts.pieces) == len(parts.boundaries) == n_pieces
    expected = model(x)
    expected.square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    found = chain(parts.pieces, x)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (wanted[name] is None) == name.startswith("2.")
        assert parameter.grad is None or torch.equal(parameter.grad, wanted[name])


@pytest.mark.parametrize("n_pieces", range(1, 9))
def test_state_dicts_make_up_the_rows(n_pieces: int) -> None:
    model = row()
    whole, together = model.state_dict(keep_vars=True), {}
    for piece in split(model, n_pieces).pieces:
        together |= piece.state_dict(keep_vars=True)
    assert list(together) == list(whole)
    assert all(together[name] is whole[name] for name in whole)


def test_a_module_that_stands_twice_is_shared() -> None:
    assert split(row(), 8).shared == (((3, "3.weight"), (5, "5.weight")), ((3, "3.bias"), (5, "5.bias")))
    assert split(row(), 1).shared == ()


def test_layers_of_several_tensors() -> None:
    layers = [Fork(), Residual(), Residual(), Residual()]
    x = torch.randn(2, WIDTH)
    expected = chain(layers, x)
    for given in (layers, tuple(layers), nn.ModuleList(layers)):
        for n_pieces in range(1, 5):
            parts = split(given, n_pieces)
            assert [tuple(y.tolist() for y in chain(parts.pieces, x))] == [tuple(y.tolist() for y in expected)]
    assert {name for piece in parts.pieces for name in piece.state_dict()} == set(nn.ModuleList(layers).state_dict())
    assert flop_costs(layers, x) == (0, *[2 * 2 * WIDTH**2] * 3)
    assert split(layers, 2, balance="time", sample=x).boundaries[0] == 0


def test_children_of_a_sequential_are_called_as_there() -> None:
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), Fork(), Join()), torch.randn(2, WIDTH)
    for n_pieces in (1, 2, 3):
        assert torch.equal(chain(split(model, n_pieces).pieces, x), model(x))
    assert split(model, 3, balance="flops", sample=x).costs == (2 * 2 * WIDTH**2, 0, 0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_pieces", range(1, 6))
def test_a_transformer_and_what_its_pieces_share(n_pieces: int, tied: bool) -> None:
    model, rows = transformer(positions="rope", tied_embeddings=tied), torch.randint(17, (2, 12))
    parts = split(model, n_pieces)
    assert parts.boundaries == partition(parts.costs, n_pieces)
    assert len(parts.costs) == 5
    name = "token_embedding.weight"
    assert parts.shared == ((((0, name), (n_pieces - 1, name)),) if tied and n_pieces > 1 else ())
    assert torch.equal(chain(parts.pieces, rows), model(rows))
    for piece, index in parts.shared[0] if parts.shared else ():
        assert parts.pieces[piece].get_parameter(index) is model.token_embedding.weight


def test_a_table_that_all_blocks_use_is_shared_by_the_pieces_with_blocks() -> None:
    shared = split(transformer(positions="t5", tied_embeddings=False), 5).shared
    assert shared == (tuple((piece, "position_bias.weight") for piece in (1, 2, 3)),)


def test_experts_hand_on_their_losses() -> None:
    model, rows = transformer(moe=MoEConfig(n_experts=4)), torch.randint(17, (2, 12))
    logits, records = model(rows, return_records=True)
    found, added = chain(split(model, 3).pieces, rows)
    assert torch.equal(found, logits)
    torch.testing.assert_close(
        added, sum(loss for record in records for loss in record.losses.values()), rtol=1e-6, atol=0
    )


def test_parameters_are_those_of_the_costs() -> None:
    model = transformer(tied_embeddings=False)
    found, by_part = split(model, 2).costs, costs.parameters_by_part(model.config)
    assert sum(found) == costs.parameters(model.config) == sum(by_part.values())
    assert found[1] == found[2] == found[3]
    tied = split(transformer(), 2).costs  # its matrix is in the first layer and in the last
    assert sum(tied) == costs.parameters(transformer().config) + 17 * 16
    assert parameter_costs([nn.Tanh(), nn.Linear(2, 3)]) == (0, 9)


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 1}, {"positions": "alibi"}, {"activation": "swiglu"}])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_those_of_the_costs(device: str, changes: dict[str, Any]) -> None:
    model = transformer(**changes).to(device)
    parts = split(model, 3, balance="flops", sample=torch.zeros(2, 12, dtype=torch.int64, device=device))
    assert sum(parts.costs) == costs.forward_flops(model.config, 2, 12)
    assert parts.costs[0] == 0
    assert parts.costs[-1] == 2 * 2 * 12 * 16 * 17
    assert parts.piece_costs == tuple(
        sum(parts.costs[i:j]) for i, j in zip(parts.boundaries, (*parts.boundaries[1:], 5), strict=False)
    )


class Clock:
    """A clock that says when each layer is done: hours of nothing, and of `seconds` in the layers."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self.readings, now = [], 0.0
        for duration in seconds:
            self.readings += [now, now + duration]
            now += duration + 3600
        self.left = iter(self.readings)

    def __call__(self) -> float:
        return next(self.left)


def test_time_is_the_median_of_the_rounds_after_the_first() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    clock = Clock([50, 60, 1, 10, 9, 12, 2, 11])  # a first round that does not count, then three
    assert time_costs(list(model), torch.randn(1, 2), rounds=3, clock=clock) == (2, 11)
    assert list(clock.left) == []


@pytest.mark.parametrize("balance", ["flops", "time"])
def test_measuring_leaves_no_trace(balance: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3))
    model[0].weight.grad = torch.ones(3, 3)
    state, generator = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    sample = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    split(model, 2, balance=balance, sample=sample)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(model[0].weight.grad, torch.ones(3, 3))
    assert all(p.grad is None for p in model[1:].parameters())
    assert sample.grad is None


def test_time_of_a_transformer_with_frozen_parts() -> None:
    model = transformer()
    model.requires_grad_(False)
    parts = split(model, 5, balance="time", sample=torch.randint(17, (1, 4)))
    assert parts.boundaries == (0, 1, 2, 3, 4)
    assert min(parts.costs) > 0


def test_given_costs_are_what_the_cut_goes_by() -> None:
    parts = split(row(), 3, balance=[8, 1, 1, 1, 1, 1, 1, 2])
    assert parts.costs == (8, 1, 1, 1, 1, 1, 1, 2)
    assert parts.boundaries == (0, 1, 5)
    assert parts.piece_costs == (8, 4, 4)


def test_costs_decide_the_cut_of_a_transformer() -> None:
    model = transformer(vocab_size=4000, tied_embeddings=False)  # most parameters in two layers, FLOPs in the last
    assert split(model, 3).boundaries == (0, 1, 4)
    sample = torch.zeros(1, 12, dtype=torch.int64)
    assert split(model, 2, balance="flops", sample=sample).boundaries == (0, 4)


@pytest.mark.parametrize("make", [row, transformer])
def test_a_piece_alone_frees_the_rest(make: Any) -> None:
    model = make()
    parts = split(model, 3)
    kept = parts.pieces[1]
    first = next(parts.pieces[0].parameters())
    gone = [weakref.ref(x) for x in (model, parts, parts.pieces[0], parts.pieces[2], first)]
    del model, parts, first
    gc.collect()
    assert [ref() for ref in gone] == [None] * 5
    assert next(kept.parameters()) is not None


@pytest.mark.parametrize("make", [row, transformer])
def test_mode_and_device_stay(make: Any) -> None:
    model = make().eval()
    assert not any(module.training for piece in split(model, 3).pieces for module in piece.modules())
    assert all(module.training for piece in split(model.train(), 3).pieces for module in piece.modules())
    with torch.device("meta"):
        parts = split(make(), 3)
    assert all(parameter.is_meta for piece in parts.pieces for parameter in piece.parameters())


class OwnForward(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(super().forward(x))


SAMPLE = torch.zeros(1, WIDTH)
REFUSED: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "too many pieces": (row, (9,), {}, ValueError, "1 to 8, the layers of the model, got 9; the nearest .* is 8"),
    "no piece": (transformer, (0,), {}, ValueError, "1 to 5, the layers of the model, got 0; the nearest .* is 1"),
    "half a piece": (row, (1.5,), {}, TypeError, "n_pieces must be an int, got 1.5"),
    "another balance": (row, (2,), {"balance": "luck"}, ValueError, "parameters, flops, time.*'luck'"),
    "no sample": (row, (2,), {"balance": "flops"}, ValueError, "needs sample"),
    "costs of other layers": (row, (2,), {"balance": [1, 2]}, ValueError, "each of the 8 layers, got 2"),
    "costs of more layers": (row, (2,), {"balance": [1] * 9}, ValueError, "each of the 8 layers, got 9"),
    "a bad cost": (row, (2,), {"balance": [1] * 7 + [-1]}, ValueError, "at least 0"),
    "no row": (lambda: nn.Linear(2, 2), (1,), {}, TypeError, "a sequence of modules.* got Linear"),
    "no modules": (lambda: "model", (1,), {}, TypeError, "a sequence of modules.* got str"),
    "no layers": (nn.Sequential, (1,), {}, TypeError, "got Sequential"),
    "a forward of its own": (lambda: OwnForward(nn.Tanh()), (1,), {}, TypeError, "OwnForward has a forward of its own"),
    "time of nothing": (row, (2,), {"balance": "time", "sample": SAMPLE.to("meta")}, ValueError, "meta device"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    make, arguments, options, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        split(make(), *arguments, **options)


def test_no_rounds() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        time_costs([nn.Tanh()], SAMPLE, rounds=0)
