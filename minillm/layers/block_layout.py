"""The tiles of an attention matrix: dead, partly alive or full, and what it costs to compute only the live ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import torch
from torch import Tensor

from minillm.layers.arguments import at_least

DEAD, PARTIAL, FULL = 0, 1, 2
_PAIRS_AT_ONCE = 2**18  # looked at together when a tile has to be looked into: 2 MiB of 8-byte integers


@dataclass(frozen=True)
class Extent:
    """First and last of each of several ranges of places, both included."""

    first: Tensor
    last: Tensor

    def in_blocks(self, block_size: int) -> "Extent":
        return Extent(self.first // block_size, self.last // block_size)


class Rule(Protocol):
    """What of a :class:`minillm.layers.Pattern` its tiles are made from; hashable."""

    def allowed(self, place: Tensor, key: Tensor, key_length: int) -> Tensor: ...
    def bounds(self, place: Extent, key: Extent, key_length: int) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class LiveRow:
    """One row of tiles, as the block-sparse execution walks it.

    start, stop: its queries. runs: the ranges of keys that are live, as few as possible. partial: in the live keys laid
        side by side, the ranges that still need a mask: (first column, number of columns, the masks' numbers in
        ``BlockLayout.masks``).
    """

    start: int
    stop: int
    runs: tuple[tuple[int, int], ...]
    partial: tuple[tuple[int, int, Tensor], ...]

    @property
    def n_keys(self) -> int:
        return sum(stop - start for start, stop in self.runs)

    def tiles(self, block_size: int) -> Tensor:
        """The numbers of the live tiles, int64; a narrower one at the ragged end is left out."""
        return torch.cat(
            [torch.arange(start // block_size, stop // block_size, device="cpu") for start, stop in self.runs]
        )


@dataclass(frozen=True)
class ExecutionCost:
    """What one forward execution computes and reads.

    flops: of the two matrix products, a multiplication and an addition counted as two. score_bytes: the scores that
    exist at one time. key_bytes: keys and values read, where every block of queries reads what it looks at.
    """

    flops: int
    score_bytes: int
    key_bytes: int


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """A (query_length, key_length) pattern cut into tiles of block_size; the last row and column may be narrower.

    states: int8 (rows, columns): DEAD (no pair allowed), PARTIAL or FULL (every pair that exists).
    pairs: int64 (rows, columns), allowed pairs.
    mask_numbers: int64 (rows, columns), for a partial tile its place in ``masks``, else -1.
    masks: boolean (n, block_size, block_size), each *different* partial tile once, so that a band or an aligned
        pattern needs a handful whatever the length; False beyond a ragged edge.
    """

    query_length: int
    key_length: int
    block_size: int
    states: Tensor
    pairs: Tensor
    mask_numbers: Tensor
    masks: Tensor

    @property
    def n_blocks(self) -> int:
        return self.states.numel()

    @cached_property
    def live_blocks(self) -> int:
        return int((self.states != DEAD).sum())

    @property
    def live_fraction(self) -> float:
        """Of the tiles: what the block-sparse execution computes of the dense one's work."""
        return self.live_blocks / max(1, self.n_blocks)

    @cached_property
    def live_pairs(self) -> int:
        """Pairs that the pattern allows."""
        return int(self.pairs.sum())

    @cached_property
    def computed_pairs(self) -> int:
        """Pairs in live tiles, the masked ones of partial tiles included."""
        return sum((row.stop - row.start) * row.n_keys for row in self.rows)

    @cached_property
    def rows(self) -> tuple[LiveRow, ...]:
        """The rows of tiles that have a live one."""
        return tuple(self._live_rows())

    def _live_rows(self) -> Iterator[LiveRow]:
        size = self.block_size
        for number, (states, masks) in enumerate(zip(self.states.tolist(), self.mask_numbers.tolist(), strict=True)):
            runs: list[list[int]] = []
            partial: list[tuple[int, int, list[int]]] = []
            columns = 0  # of the live keys so far, side by side
            for tile, state in enumerate(states):
                if state == DEAD:
                    continue
                start, stop = tile * size, min((tile + 1) * size, self.key_length)
                if runs and runs[-1][1] == start:
                    runs[-1][1] = stop
                else:
                    runs.append([start, stop])
                if state == PARTIAL:
                    if partial and partial[-1][0] + partial[-1][1] == columns:
                        first, width, numbers = partial.pop()
                        partial.append((first, width + stop - start, [*numbers, masks[tile]]))
                    else:
                        partial.append((columns, stop - start, [masks[tile]]))
                columns += stop - start
            if runs:
                yield LiveRow(
                    number * size,
                    min((number + 1) * size, self.query_length),
                    tuple((start, stop) for start, stop in runs),
                    tuple((first, width, torch.tensor(numbers, device="cpu")) for first, width, numbers in partial),
                )

    def cost(
        self,
        head_dim: int,
        *,
        n_heads: int = 1,
        n_kv_heads: int | None = None,
        value_dim: int | None = None,
        bytes_per_value: int = 4,
    ) -> ExecutionCost:
        """Of the block-sparse execution of one sequence, all heads; scores are float32."""
        work, widest = self.computed_pairs, max((row.n_keys for row in self.rows), default=0)
        read = sum(row.n_keys for row in self.rows)
        return self._cost(work, widest, read, head_dim, n_heads, n_kv_heads, value_dim, bytes_per_value)

    def dense_cost(
        self,
        head_dim: int,
        *,
        n_heads: int = 1,
        n_kv_heads: int | None = None,
        value_dim: int | None = None,
        bytes_per_value: int = 4,
    ) -> ExecutionCost:
        """Of the dense execution with a mask, which computes and keeps every score."""
        work = self.query_length * self.key_length
        read = self.states.size(0) * self.key_length
        cost = self._cost(work, 0, read, head_dim, n_heads, n_kv_heads, value_dim, bytes_per_value)
        return ExecutionCost(cost.flops, 4 * work * n_heads, cost.key_bytes)

    def _cost(
        self,
        work: int,
        widest: int,
        read: int,
        head_dim: int,
        n_heads: int,
        n_kv_heads: int | None,
        value_dim: int | None,
        bytes_per_value: int,
    ) -> ExecutionCost:
        at_least("head_dim", head_dim, 1)
        at_least("n_heads", n_heads, 1)
        if n_kv_heads is not None:
            at_least("n_kv_heads", n_kv_heads, 1)
        widths = head_dim + (head_dim if value_dim is None else value_dim)
        return ExecutionCost(
            flops=2 * work * widths * n_heads,
            score_bytes=4 * min(self.block_size, self.query_length) * widest * n_heads,
            key_bytes=read * widths * bytes_per_value * (n_heads if n_kv_heads is None else n_kv_heads),
        )

    def draw(self) -> str:
        """The tiles as text: ``█`` full, ``▒`` partial, ``·`` dead."""
        return "\n".join(" ".join("·▒█"[state] for state in row) for row in self.states.tolist())


@lru_cache(maxsize=32, typed=True)
def block_layout(pattern: Rule, query_length: int, key_length: int, block_size: int) -> BlockLayout:
    """Cut ``pattern`` into tiles. Only the tiles its ``bounds`` leave open are looked at pair by pair.

    Remembered for the last 32 questions: a model asks the same one in every layer of every step.
    """
    at_least("query_length", query_length, 0)
    at_least("key_length", key_length, 0)
    at_least("block_size", block_size, 1)
    block_size = min(block_size, max(query_length, key_length, 1))  # a longer tile would be empty beyond that
    offset = key_length - query_length
    query_starts, key_starts = (
        torch.arange(0, length, block_size, device="cpu") for length in (query_length, key_length)
    )
    query_ends = (query_starts + block_size).clamp(max=query_length)
    key_ends = (key_starts + block_size).clamp(max=key_length)
    area = (query_ends - query_starts)[:, None] * (key_ends - key_starts)
    shape = area.shape
    if area.numel():
        place = Extent((query_starts + offset)[:, None], (query_ends + offset - 1)[:, None])
        some, every = pattern.bounds(place, Extent(key_starts, key_ends - 1), key_length)
        some, every = some.expand(shape), every.expand(shape)
    else:
        some = every = torch.zeros(shape, dtype=torch.bool, device="cpu")

    pairs = torch.where(every, area, 0)
    mask_numbers = torch.full(shape, -1, device="cpu")
    masks: list[Tensor] = []
    known: dict[bytes, int] = {}
    within = torch.arange(block_size, device="cpu")
    for tiles in torch.split((some & ~every).nonzero(), max(1, _PAIRS_AT_ONCE // block_size**2)):
        row, column = tiles.unbind(1)
        query = (query_starts[row, None] + within)[:, :, None]
        key = (key_starts[column, None] + within)[:, None, :]
        exists = (query < query_length) & (key < key_length)
        # Beyond a ragged edge stands nothing: the rule is asked about the last key instead, and the answer dropped.
        inside = pattern.allowed((query + offset).clamp(max=key_length - 1), key.clamp(max=key_length - 1), key_length)
        inside = inside & exists
        counts = inside.sum((1, 2))
        pairs[row, column] = counts
        partial = (counts > 0) & (counts < area[row, column])
        numbers = []
        for mask in inside[partial]:
            number = known.setdefault(mask.numpy().tobytes(), len(masks))
            if number == len(masks):
                masks.append(mask.clone())
            numbers.append(number)
        mask_numbers[row[partial], column[partial]] = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    states = torch.where(pairs == area, FULL, torch.where(pairs > 0, PARTIAL, DEAD)).to(torch.int8)
    different = torch.stack(masks) if masks else torch.zeros(0, block_size, block_size, dtype=torch.bool, device="cpu")
    return BlockLayout(query_length, key_length, block_size, states, pairs, mask_numbers, different)
