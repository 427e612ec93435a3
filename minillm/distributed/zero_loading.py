"""Loading a saved state into any number of ranks: each takes from what was saved the pieces that it now owns.

That is all that re-sharding is: a saved part says where in each parameter its pieces stand, and elements start to stop
of a parameter can be put together from whatever pieces overlap with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from minillm.distributed.zero_mics import Ranks
from minillm.distributed.zero_optimizer import ParameterState, ShardedOptimizer
from minillm.distributed.zero_shards import FlatParameters
from minillm.distributed.zero_state import FORMAT

PARAMETER = ""  # the key of the parameter itself, beside those of the optimizer's state ("exp_avg")


class Source(Protocol):
    """A saved state.

    Attributes:
        states: what there is of the optimizer's state, by name of the parameter.
        param_groups: the settings of each of the optimizer's groups.
    """

    states: dict[str, ParameterState]
    param_groups: list[dict[str, Any]]

    def piece(self, name: str, key: str, start: int, stop: int) -> Tensor:
        """Elements start to stop of a flattened parameter, or of the state that is called `key`."""

    def undivided(self, name: str) -> Tensor | None:
        """A buffer, or a parameter that every rank has whole; None where only another rank's state has it."""


class WholeSource:
    """What :meth:`Zero.state_dict` gave as a whole, or what one process had."""

    def __init__(self, state: Mapping[str, Any], entries: Mapping[str, Any], optimizer: ShardedOptimizer) -> None:
        if not {"model", "optimizer"} <= state.keys():
            raise ValueError(f"state must have 'model' and 'optimizer', or be parts; got {sorted(state)}")
        self._model: dict[str, Tensor] = dict(state["model"])
        self.param_groups = state["optimizer"]["param_groups"]
        saved = [len(group["params"]) for group in self.param_groups]
        if saved != [len(names) for names in optimizer.names]:
            raise ValueError(
                f"state must be of an optimizer with groups of {[len(names) for names in optimizer.names]} parameters, "
                f"got groups of {saved}"
            )
        for name, value in entries.items():
            if isinstance(value, Tensor):
                _check_shape(name, value.shape, self._model[name].shape if name in self._model else None)
        numbers = {
            name: number
            for names, group in zip(optimizer.names, self.param_groups, strict=True)
            for name, number in zip(names, group["params"], strict=True)
        }
        learnt = state["optimizer"]["state"]
        self._learnt = {name: learnt[number] for name, number in numbers.items() if learnt.get(number)}
        self.states = {name: optimizer.describe(values) for name, values in self._learnt.items()}
        for name, described in self.states.items():
            for key in described.divided:
                _check_shape(f"{key} of {name}", self._model[name].shape, self._learnt[name][key].shape)

    def tensor(self, name: str, key: str) -> Tensor:
        """All of a parameter, or of its state."""
        found: Tensor = self._model[name] if key == PARAMETER else self._learnt[name][key]
        return found

    def piece(self, name: str, key: str, start: int, stop: int) -> Tensor:
        return self.tensor(name, key).reshape(-1)[start:stop]

    def undivided(self, name: str) -> Tensor | None:
        return self._model[name]


class FirstRankSource:
    """A whole that only the first rank has: the others are sent it, tensor by tensor.

    Every rank must ask for the same names and keys in the same order.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        entries: Mapping[str, Any],
        optimizer: ShardedOptimizer,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self._ranks, self._device = ranks, device
        self._whole: WholeSource | None = None
        message: Any = None
        if ranks.is_first:
            try:
                self._whole = whole = WholeSource(state, entries, optimizer)
                kinds = {(name, PARAMETER): _kind(entry) for name, entry in state["model"].items() if _is_tensor(entry)}
                kinds.update(
                    ((name, key), _kind(whole.tensor(name, key)))
                    for name, described in whole.states.items()
                    for key in described.divided
                )
                message = (whole.states, whole.param_groups, kinds)
            except ValueError as error:
                message = str(error)
        message = ranks.broadcast_object(message)
        if isinstance(message, str):
            raise ValueError(f"on the first rank: {message}")
        self.states, self.param_groups, self._kinds = message

    def piece(self, name: str, key: str, start: int, stop: int) -> Tensor:
        shape, dtype = self._kinds[name, key]
        sent = torch.empty(shape, dtype=dtype, device=self._device)
        if self._whole is not None:
            sent.copy_(self._whole.tensor(name, key))
        self._ranks.broadcast(sent)
        return sent.view(-1)[start:stop]

    def undivided(self, name: str) -> Tensor | None:
        return None if self._whole is None else self._whole.undivided(name)


class PartSource:
    """Parts that any number of ranks have saved."""

    def __init__(self, parts: Sequence[Mapping[str, Any]], flats: Sequence[FlatParameters]) -> None:
        self._parts = parts
        self._where: dict[str, list[tuple[int, int, Mapping[str, Tensor]]]] = {}
        self._shapes = shapes = dict[str, torch.Size]()
        states: dict[str, tuple[dict[str, Any], set[str]]] = {}
        self.param_groups = []
        for part in parts:
            if not {"tensors", "metadata"} <= part.keys() or part["metadata"].get("format") != FORMAT:
                raise ValueError(f"state must be parts of the format {FORMAT!r}, got {sorted(part)}")
            metadata, tensors = part["metadata"], part["tensors"]
            self.param_groups = metadata["param_groups"]
            for name, (start, stop, shape) in metadata["pieces"].items():
                self._where.setdefault(name, []).append((start, stop, tensors))
                shapes[name] = torch.Size(shape)
            for name, single in metadata["single"].items():
                states.setdefault(name, ({}, set()))[0].update(single)
            for key in tensors.keys():  # noqa: SIM118 - what reads a file lazily may have no other way
                if key.startswith("optimizer."):
                    name, _, kind = key.removeprefix("optimizer.").rpartition(".")
                    if kind in metadata["divided"]:
                        states[name][1].add(kind)
                    else:
                        states[name][0][kind] = tensors[key]
        self.states = {
            name: ParameterState(single, tuple(sorted(divided))) for name, (single, divided) in states.items()
        }
        for flat in flats:
            for own in flat.pieces():
                name, whole = own.place.name, self._whole(own.place.name)
                found = shapes.get(name) if whole is None else whole.shape
                if found is not None or own.start < own.stop:
                    _check_shape(name, own.place.shape, found)
                if whole is None:
                    self._overlaps(name, own.start, own.stop)

    def _overlaps(self, name: str, start: int, stop: int) -> list[tuple[int, int, int, Mapping[str, Tensor]]]:
        """Saved pieces that together are elements start to stop: (from, to, where the piece starts, its tensors)."""
        found = []
        at = start
        for begin, end, tensors in sorted(self._where.get(name, []), key=lambda piece: piece[:2]):
            if begin <= at < min(end, stop):
                found.append((at, min(end, stop), begin, tensors))
                at = min(end, stop)
        if at < stop:
            raise ValueError(
                f"the parts lack the elements {at} to {stop} of {name}: in another number of ranks load_state_dict "
                "needs a list of all the parts that were saved"
            )
        return found

    def piece(self, name: str, key: str, start: int, stop: int) -> Tensor:
        whole = self._whole(name)
        if whole is not None:  # frozen: stages 1 and 2 leave it in every rank
            return whole.reshape(-1)[start:stop]
        stored = f"model.{name}" if key == PARAMETER else f"optimizer.{name}.{key}"
        pieces = [t[stored][a - begin : b - begin] for a, b, begin, t in self._overlaps(name, start, stop)]
        return torch.cat(pieces) if pieces else torch.empty(0)

    def undivided(self, name: str) -> Tensor | None:
        if name in self._shapes:  # frozen: stage 3 divides it
            return self.piece(name, PARAMETER, 0, self._shapes[name].numel()).view(self._shapes[name])
        return self._whole(name)

    def _whole(self, name: str) -> Tensor | None:
        for part in self._parts:
            if f"whole.{name}" in part["tensors"].keys():  # noqa: SIM118
                found: Tensor = part["tensors"][f"whole.{name}"]
                return found
        return None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _check_shape(name: str, wanted: torch.Size, got: torch.Size | None) -> None:
    if got is None:
        raise ValueError(f"state must have {name}, which is missing")
    if got != wanted:
        raise ValueError(f"state must have {name} of shape {tuple(wanted)}, got {tuple(got)}")


def source_of(
    state: Any,
    entries: Mapping[str, Any],
    optimizer: ShardedOptimizer,
    flats: Sequence[FlatParameters],
    ranks: Ranks,
) -> Source:
    """The saved state behind what the ranks were given; all ranks must call this.

    Raises:
        TypeError, ValueError: nothing that `Zero.state_dict` gives, or not all that is needed.
    """
    if not isinstance(state, Mapping | list | tuple):
        raise TypeError(f"state must be a dictionary or a list of parts, got {type(state).__name__}")
    device = flats[0].full.device
    empty = torch.tensor(0 if state else 1, device=device)
    ranks.sum(empty)
    if empty.item():
        return FirstRankSource(state if isinstance(state, Mapping) else {}, entries, optimizer, ranks, device)
    if not isinstance(state, Mapping):
        return PartSource(state, flats)
    if "tensors" in state:
        return PartSource([state], flats)
    return WholeSource(state, entries, optimizer)


def load(
    state: Any,
    entries: Mapping[str, Any],
    optimizer: ShardedOptimizer,
    flats: Sequence[FlatParameters],
    ranks: Ranks,
) -> None:
    """Set the masters, the optimizer's state and settings, buffers and undivided parameters."""
    source = source_of(state, entries, optimizer, flats, ranks)
    with torch.no_grad():
        for flat in flats:
            for own in flat.pieces():
                flat.master[own.in_part].copy_(source.piece(own.place.name, PARAMETER, own.start, own.stop))
            optimizer.fill(flat, source.states, source.piece)
        divided = {place.parameter for flat in flats for place in flat.places}
        for name, entry in entries.items():
            if isinstance(entry, Tensor) and entry not in divided:
                saved = source.undivided(name)
                if saved is not None:
                    entry.data.copy_(saved)
                ranks.broadcast(entry.data)
    for group, saved_group in zip(optimizer.optimizer.param_groups, source.param_groups, strict=True):
        for key, value in saved_group.items():
            if key != "params":
                group[key] = tuple(value) if isinstance(value, list) and isinstance(group.get(key), tuple) else value
