"""A model in pieces, for the stages of a pipeline."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from minillm.distributed.pipeline.layer_costs import flop_costs, parameter_costs, time_costs
from minillm.distributed.pipeline.partition import partition
from minillm.models.transformer import Transformer
from minillm.models.transformer_piece import TransformerPiece

_BALANCES = ("parameters", "flops", "time")


@dataclass(frozen=True)
class Split:
    """Pieces of a model.

    Attributes:
        pieces: they follow on one another. Their parameters are the model's own, under the names that they have in the
            model's state dict.
        boundaries: the first layer of each piece.
        costs: of each layer, by what the cut was made.
        shared: the parameters that stand in several pieces (tied embeddings), each as its (piece, name) in all of them.
    """

    pieces: tuple[nn.Module, ...]
    boundaries: tuple[int, ...]
    costs: tuple[float, ...]
    shared: tuple[tuple[tuple[int, str], ...], ...]

    @property
    def piece_costs(self) -> tuple[float, ...]:
        """The sum over the layers of each piece."""
        ends = (*self.boundaries[1:], len(self.costs))
        return tuple(sum(self.costs[i:j]) for i, j in zip(self.boundaries, ends, strict=True))


def split(
    model: nn.Module | Sequence[nn.Module],
    n_pieces: int,
    *,
    balance: str | Sequence[float] = "parameters",
    sample: Any = None,
) -> Split:
    """Cut a model into pieces of about the same cost, by `partition`.

    A rank that keeps its piece alone frees the rest: pieces do not hold on to the model.

    Args:
        model: a `minillm.models.Transformer` (layers: the embedding, each block, the last norm with the head), an
            `nn.Sequential` (its children, each called with what the one before gives, as there), or a sequence of
            modules, each of which takes the tensor that the one before gives, or the tensors of its tuple one by one.
            A module may stand there twice.
        n_pieces: 1 to the number of layers.
        balance: what to balance: "parameters" (memory), "flops" of a forward pass, measured "time" of both passes, or
            the cost of each layer. Measured time differs from rank to rank: cut on one of them and give the others its
            `costs`.
        sample: what the first layer takes, for "flops" and "time".

    Raises:
        ValueError: fewer layers than pieces, costs that are not one a layer, an unknown balance, or no sample for it.
        TypeError: a model whose layers nobody knows, such as an nn.Sequential with a forward of its own.
    """
    n_layers, cut = _layers(model)
    if isinstance(n_pieces, bool) or not isinstance(n_pieces, int):
        raise TypeError(f"n_pieces must be an int, got {n_pieces!r}")
    if not 1 <= n_pieces <= n_layers:
        raise ValueError(
            f"n_pieces must be 1 to {n_layers}, the layers of the model, got {n_pieces}; the nearest that will do is "
            f"{max(1, min(n_pieces, n_layers))}"
        )
    costs = _costs([cut(i, i + 1) for i in range(n_layers)], balance, sample)
    boundaries = partition(costs, n_pieces)
    ends = (*boundaries[1:], n_layers)
    pieces = tuple(cut(i, j) for i, j in zip(boundaries, ends, strict=True))
    return Split(pieces, boundaries, costs, tuple(shared_parameters(pieces)))


def shared_parameters(modules: Sequence[nn.Module]) -> list[tuple[tuple[int, str], ...]]:
    """The parameters that stand in several of the modules, each as its (module, name) in all of them."""
    places: dict[nn.Parameter, list[tuple[int, str]]] = {}
    for piece, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            places.setdefault(parameter, []).append((piece, name))
    return [tuple(keys) for keys in places.values() if len(keys) > 1]


def _layers(model: nn.Module | Sequence[nn.Module]) -> tuple[int, Callable[[int, int], nn.Module]]:
    """How many layers there are, and what makes a module of those from i to j - 1."""
    if isinstance(model, Transformer):
        return len(model.blocks) + 2, lambda i, j: TransformerPiece(model, i, j)
    row_type: type[nn.Sequential] = _Row
    if isinstance(model, nn.Sequential):
        if type(model).forward is not nn.Sequential.forward:
            raise TypeError(
                f"model must be the row of its children, and {type(model).__name__} has a forward of its own: give the "
                "layers as a sequence of modules"
            )
        # Not named_children: it leaves out a module that stands there a second time.
        named = list(zip(model._modules, model, strict=True))
    elif isinstance(model, (Sequence, nn.ModuleList)):
        row_type, named = _Chain, [(str(index), layer) for index, layer in enumerate(model)]
    else:
        named = []
    if not named or not all(isinstance(layer, nn.Module) for _, layer in named):
        raise TypeError(
            "model must be a minillm Transformer, an nn.Sequential or a sequence of modules of which each takes what "
            f"the one before gives, got {type(model).__name__}"
        )

    def cut(i: int, j: int) -> nn.Module:
        row = row_type(OrderedDict(named[i:j]))
        row.training = named[i][1].training
        return row

    return len(named), cut


class _Row(nn.Sequential):
    """Children of an `nn.Sequential`, called as there: one that takes several tensors takes them as a tuple."""

    def forward(self, *given: Any) -> Any:
        result: Any = given if len(given) > 1 else given[0]
        for layer in self:
            result = layer(result)
        return result


class _Chain(nn.Sequential):
    """Layers that may take several tensors, each as an argument of its own."""

    def forward(self, *given: Any) -> Any:
        result: Any = given
        for layer in self:
            result = layer(*result) if isinstance(result, tuple) else layer(result)
        return result


def _costs(layers: Sequence[nn.Module], balance: str | Sequence[float], sample: Any) -> tuple[float, ...]:
    if not isinstance(balance, str):
        if len(balance) != len(layers):
            raise ValueError(f"balance must have a cost for each of the {len(layers)} layers, got {len(balance)}")
        return tuple(float(cost) for cost in balance)
    if balance not in _BALANCES:
        raise ValueError(f"balance must be one of {', '.join(_BALANCES)}, or the cost of each layer, got {balance!r}")
    if balance == "parameters":
        return parameter_costs(layers)
    if sample is None:
        raise ValueError(f"balance={balance!r} needs sample: what the first layer takes")
    return flop_costs(layers, sample) if balance == "flops" else time_costs(layers, sample)
