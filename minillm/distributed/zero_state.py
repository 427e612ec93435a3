"""What ZeRO saves: the whole, as one process would have it, or each rank's part of it.

The whole is for going on without ZeRO; it passes through one rank's memory, buffer by buffer. Parts are for large
models: every rank writes its own, as flat pieces of parameters with their places, so that any number of ranks can put
together what it needs (:mod:`minillm.distributed.zero_loading`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.distributed.zero_optimizer import ParameterState, ShardedOptimizer
from minillm.distributed.zero_shards import FlatParameters

FORMAT = "minillm.zero.part.1"


class StateSaver:
    """Reads the state of the model and of the optimizer out of the parts.

    Args:
        entries: gives what `model.state_dict(keep_vars=True)` does.
        optimizer, flats: hold the parts.
    """

    def __init__(
        self, entries: Callable[[], dict[str, Any]], optimizer: ShardedOptimizer, flats: Sequence[FlatParameters]
    ) -> None:
        self._entries, self.optimizer, self.flats = entries, optimizer, list(flats)
        self.ranks = self.flats[0].ranks

    def whole(self, everywhere: bool) -> dict[str, Any]:
        """{"model": ..., "optimizer": ...} as one process has them, on the CPU; {} where it is not wanted."""
        wanted = everywhere or self.ranks.is_first
        values: dict[nn.Parameter, Tensor] = {}
        states: dict[str, dict[str, Any]] = {}
        learnt = self._learnt_anywhere()
        for flat in self.flats:
            values.update({place.parameter: tensor for place, tensor in self._split(flat, flat.master, wanted)})
            have = [place.name for place in flat.places if place.name in learnt]
            if wanted:
                states.update(
                    {name: {key: _copied(value) for key, value in learnt[name][0].single.items()} for name in have}
                )
            for key in sorted({key for name in have for key in learnt[name][0].divided}):
                dtype = next(learnt[name][1][key] for name in have if key in learnt[name][1])
                part = flat.master.new_zeros(flat.part_size, dtype=dtype)
                for segment in flat.segments:
                    own = self.optimizer.optimizer.state.get(segment.parameter, {}).get(key)
                    if own is not None:
                        part[segment.in_part].copy_(own)
                for place, tensor in self._split(flat, part, wanted):
                    if place.name in learnt and key in learnt[place.name][0].divided:
                        states[place.name][key] = tensor
        if not wanted:
            return {}
        model: dict[str, Any] = {}
        given: set[nn.Parameter] = set()
        for name, value in self._entries().items():
            if isinstance(value, nn.Parameter) and value in values:
                # A tied parameter has two names and gets two tensors: files of safetensors want that.
                model[name] = values[value].clone() if value in given else values[value]
                given.add(value)
            else:
                model[name] = _copied(value)
        return {"model": model, "optimizer": self._plain_layout(states)}

    def _split(self, flat: FlatParameters, part: Tensor, wanted: bool) -> Iterator[tuple[Any, Tensor]]:
        full = flat.assemble(part)
        for place in flat.places if wanted else ():
            yield place, full[place.start : place.stop].view(place.shape).to("cpu", copy=True)

    def _learnt_anywhere(self) -> dict[str, tuple[ParameterState, dict[str, torch.dtype]]]:
        """State by name of the parameter, with the dtypes of what is divided, from a rank that owns some of it.

        A rank may own nothing of a group but padding, whose count of steps begins anew when a state is loaded.
        """
        mine = {}
        for flat in self.flats:
            states: dict[int | None, Any] = {
                segment.group: self.optimizer.optimizer.state.get(segment.parameter) for segment in flat.segments
            }
            for own in flat.pieces():
                state = states.get(own.place.group)
                if state and (own.start < own.stop or own.place.start == own.place.stop):
                    described = self.optimizer.describe(state)
                    mine[own.place.name] = described, {key: state[key].dtype for key in described.divided}
        found: list[Any] = [mine]
        if self.ranks.n_parts > 1:
            found = [None] * self.ranks.n_parts
            dist.all_gather_object(found, mine, group=self.ranks.partition)
        merged: dict[str, tuple[ParameterState, dict[str, torch.dtype]]] = {}
        for theirs in reversed(found):
            merged.update(theirs)
        return merged

    def _plain_layout(self, states: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """What the optimizer's own `state_dict()` would be over whole parameters: they are numbered through."""
        numbered = {
            name: number for number, name in enumerate(name for names in self.optimizer.names for name in names)
        }
        state = {numbered[name]: values for name, values in states.items()}
        return {"state": dict(sorted(state.items())), "param_groups": self._groups(numbered)}

    def _groups(self, numbered: dict[str, int] | None) -> list[dict[str, Any]]:
        groups = []
        for group, names in zip(self.optimizer.optimizer.param_groups, self.optimizer.names, strict=True):
            settings = {key: _number(value) for key, value in group.items() if key != "params"}
            groups.append({**settings, "params": [numbered[name] if numbered else name for name in names]})
        return groups

    def part(self) -> dict[str, Any]:
        """{"tensors": ..., "metadata": ...} of this rank; what is not divided goes with the first rank's."""
        tensors: dict[str, Tensor] = {}
        pieces: dict[str, list[Any]] = {}
        single: dict[str, dict[str, Any]] = {}
        for flat in self.flats:
            segments = {segment.group: segment for segment in flat.segments}
            for own in flat.pieces():
                place = own.place
                if own.start == own.stop and place.shape.numel():
                    continue
                pieces[place.name] = [own.start, own.stop, list(place.shape)]
                tensors[f"model.{place.name}"] = flat.master[own.in_part].clone()
                segment = segments.get(place.group) if place.group is not None else None
                state = None if segment is None else self.optimizer.optimizer.state.get(segment.parameter)
                if segment is None or not state:
                    continue
                described = self.optimizer.describe(state)
                within = slice(own.offset - segment.in_part.start, own.in_part.stop - segment.in_part.start)
                for key in described.divided:
                    tensors[f"optimizer.{place.name}.{key}"] = state[key][within].clone()
                single[place.name] = {}
                for key, value in described.single.items():
                    if isinstance(value, Tensor):
                        tensors[f"optimizer.{place.name}.{key}"] = value.clone()
                    else:
                        single[place.name][key] = value
        if self.ranks.is_first:
            divided = {place.parameter for flat in self.flats for place in flat.places}
            for name, value in self._entries().items():
                if isinstance(value, Tensor) and value not in divided:
                    tensors[f"whole.{name}"] = value.detach().clone()
        metadata = {
            "format": FORMAT,
            "part": self.ranks.part,
            "n_parts": self.ranks.n_parts,
            "pieces": pieces,
            "divided": sorted(self.optimizer.elementwise),
            "single": single,
            "param_groups": self._groups(None),
        }
        return {"tensors": tensors, "metadata": metadata}


def _copied(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
