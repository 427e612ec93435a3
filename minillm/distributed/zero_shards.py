"""The shard map: parameters laid end to end in one flat buffer, of which each of n ranks owns an equal part.

One buffer for many parameters makes one collective out of many, and lets parts be equal where the parameters' sizes
are not: a part begins and ends anywhere, also inside of a parameter (Rajbhandari et al. 2020, "ZeRO", section 5).

         part 0            part 1            part 2
    |-----------------|-----------------|-----------------|
    | qkv.weight          | qkv.bias | output.weight    |//|     // padding
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.distributed.tensor_collectives import all_gather_tensor
from minillm.distributed.zero_mics import Ranks


@dataclass(frozen=True)
class Member:
    """A parameter before it has a place; `group`: which of the optimizer's groups it is in, None for a frozen one."""

    name: str
    parameter: nn.Parameter
    group: int | None


@dataclass(frozen=True)
class Place:
    """Where a parameter stands in the flat buffer: elements start to stop, in the order of its own flattening."""

    name: str
    parameter: nn.Parameter
    shape: torch.Size
    group: int | None
    start: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """What this rank owns of one parameter: its elements start to stop, at offset of this rank's part."""

    place: Place
    start: int
    stop: int
    offset: int

    @property
    def in_part(self) -> slice:
        """Where the piece stands in this rank's part."""
        return slice(self.offset, self.offset + self.stop - self.start)


@dataclass(frozen=True)
class Segment:
    """A run of this rank's part that one group of the optimizer updates; `parameter` is what the optimizer holds."""

    parameter: nn.Parameter
    group: int
    in_part: slice


class FlatParameters:
    """Parameters of one dtype, device and `requires_grad` in one buffer.

    Attributes:
        full: (size,) all parameters in the dtype of computing; the modules' parameters are views of it. Its storage is
            empty while it is freed.
        shard: (part_size,) this rank's part in the dtype of computing: a view of `full` where that is never freed.
        master: (part_size,) what the optimizer updates: `shard` itself, or where computing is in a shorter dtype this
            rank's part in the longer one.
        segments: `master` cut where the optimizer's group changes.

    Args:
        members: what to hold; members of one optimizer group must be neighbours.
        ranks: who shares it.
        dtype: the dtype of computing.
        freed: begin with `full` freed: between `gathered` and `free` the parameters hold their numbers, else NaN.
    """

    def __init__(self, members: Sequence[Member], ranks: Ranks, dtype: torch.dtype, *, freed: bool = False) -> None:
        self.ranks, self.dtype = ranks, dtype
        first = members[0].parameter
        self.trainable = first.requires_grad
        # A matrix that does not begin at a multiple of 16 bytes is multiplied more slowly on many devices.
        aligned = max(1, 16 // dtype.itemsize)
        self.places: list[Place] = []
        end = 0
        for member in members:
            start = -(-end // aligned) * aligned
            end = start + member.parameter.numel()
            self.places.append(Place(member.name, member.parameter, member.parameter.shape, member.group, start, end))
        self.part_size = -(-max(end, 1) // ranks.n_parts)
        self.size = self.part_size * ranks.n_parts
        own = slice(ranks.part * self.part_size, (ranks.part + 1) * self.part_size)
        self.own = own

        master_dtype = torch.promote_types(first.dtype, torch.float32) if dtype != first.dtype else dtype
        source = torch.zeros(self.size, dtype=master_dtype, device=first.device)
        for place in self.places:
            source[place.start : place.stop].copy_(place.parameter.detach().reshape(-1))
        ranks.broadcast(source)
        self.full = source.to(dtype)
        self.views = [self.full[place.start : place.stop].view(place.shape) for place in self.places]
        self.can_free = freed and ranks.n_parts > 1
        self.shard = self.full[own].clone() if self.can_free else self.full[own]
        keeps_master = self.trainable and master_dtype != dtype
        self.master = source[own].clone() if keeps_master else self.shard
        self.segments = list(self._segments()) if self.trainable else []

        # Freed parameters show NaN of their shape, and not storage that is gone: reading that would end the process.
        nothing = torch.full((), torch.nan, dtype=dtype, device=first.device)
        self._freed_views = [nothing.expand(place.shape) for place in self.places]
        self.is_full = True
        self._show(self.views)
        if self.can_free:
            self.free()

    def _segments(self) -> Iterator[Segment]:
        starts = [(self.places[0].group, 0)]
        for place in self.places:
            if place.group != starts[-1][0]:
                starts.append((place.group, place.start))
        stops = [start for _, start in starts[1:]] + [self.size]
        for (group, start), stop in zip(starts, stops, strict=True):
            begin, end = max(start, self.own.start) - self.own.start, min(stop, self.own.stop) - self.own.start
            if begin < end and group is not None:
                yield Segment(nn.Parameter(self.master[begin:end]), group, slice(begin, end))

    def pieces(self) -> list[Piece]:
        """What this rank owns of each parameter; start = stop where it owns nothing."""
        pieces = []
        for place in self.places:
            start = min(max(place.start, self.own.start), place.stop)
            stop = max(min(place.stop, self.own.stop), start)
            offset = start - self.own.start if start < stop else 0
            pieces.append(Piece(place, start - place.start, stop - place.start, offset))
        return pieces

    def gaps(self) -> list[slice]:
        """The elements of the buffer that belong to no parameter."""
        edges = [0, *(edge for place in self.places for edge in (place.start, place.stop)), self.size]
        return [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]

    def _show(self, views: Sequence[Tensor]) -> None:
        for place, view in zip(self.places, views, strict=True):
            place.parameter.data = view

    def start_gather(self) -> dist.Work | None:
        """Fetch all parts into `full`; a handle whose `wait()` must come before `gathered()`."""
        self.full.untyped_storage().resize_(self.full.numel() * self.full.itemsize)
        return all_gather_tensor(self.full, self.shard, group=self.ranks.partition, async_op=True)

    def gathered(self) -> None:
        """All parts have come: the parameters show them."""
        self._show(self.views)
        self.is_full = True

    def free(self) -> None:
        """Give the memory of the other ranks' parts back."""
        if self.can_free:
            self._show(self._freed_views)
            self.full.untyped_storage().resize_(0)
            self.is_full = False

    def read_full(self) -> None:
        """This rank's part anew from `full`, after somebody else has changed that."""
        if self.shard.data_ptr() != self.full[self.own].data_ptr():
            self.shard.copy_(self.full[self.own])
        if self.master is not self.shard:
            self.master.copy_(self.shard)

    def publish(self) -> dist.Work | None:
        """After a change of `master`: make `shard` anew, and where `full` is kept send it around (handle or None)."""
        if self.master is not self.shard:
            self.shard.copy_(self.master)
        if self.can_free or self.ranks.n_parts == 1:
            return None
        return all_gather_tensor(self.full, self.shard, group=self.ranks.partition, async_op=True)

    def assemble(self, part: Tensor) -> Tensor:
        """(size,) from every rank's `part` (part_size,), of any dtype."""
        if self.ranks.n_parts == 1:
            return part
        full = part.new_empty(self.size)
        all_gather_tensor(full, part, group=self.ranks.partition)
        return full
