"""The tiles of flash attention: which are visited, what is loaded for them, and the scores of one."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.layers.arguments import at_least
from minillm.layers.block_layout import DEAD, FULL, BlockLayout
from minillm.layers.counter_random import attention_dropout_kept

# Scores in one tile of all heads together, by default at most: 2 MiB in float32, which a core's second cache holds.
_TILE_SCORES = 2**19


@dataclass(frozen=True, eq=False)
class FlashSettings:
    """What is computed, and in tiles of which size.

    causal, window, alibi_slopes, scale, layout, dropout, seed: as in :func:`minillm.layers.flash_attention`.
    query_tile, key_tile: queries and keys in a tile; with ``layout`` both are its block_size. None: chosen for a CPU.
    """

    causal: bool = False
    window: int | None = None
    alibi_slopes: Tensor | None = None
    scale: float | None = None
    layout: BlockLayout | None = None
    dropout: float = 0.0
    seed: int = 0
    query_tile: int | None = None
    key_tile: int | None = None


class Tile(NamedTuple):
    """One tile of scores: its place in the grid, its queries, its keys, and whether some of its pairs are hidden."""

    row: int
    column: int
    queries: slice
    keys: slice
    masked: bool


@dataclass
class Record:
    """What a run did: the tiles in the order of their visits, and the elements loaded and stored, by tensor."""

    tiles: list[Tile] = field(default_factory=list)
    loaded: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)


class Walk:
    """The tensors in slow memory, from which tiles are loaded and to which they are stored.

    The query heads that share a key head are kept together: shapes are (n, g, length, width), where n counts batch and
    key heads and g the query heads of a group (1 for what belongs to keys). A tile of them is a matrix for each n,
    (n, g * rows, width): the group's queries stand one below the other, so that shared keys are never repeated.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, settings: FlashSettings, record: Record | None
    ) -> None:
        self.settings, self.record = settings, record
        self.batch, self.n_heads, self.query_length, head_dim = query.shape
        self.n_kv_heads, self.key_length = key.shape[1:3]
        self.groups = self.n_heads // self.n_kv_heads
        self.scale = 1 / math.sqrt(head_dim) if settings.scale is None else settings.scale
        self.dtype, self.device = torch.promote_types(query.dtype, torch.float32), query.device
        self.query_tile, self.key_tile = self._tile_sizes()
        self.memory: dict[str, Tensor] = {}
        self.slopes: Tensor | None = None
        if settings.alibi_slopes is not None:
            self.slopes = settings.alibi_slopes.to(self.device, self.dtype).view(self.n_kv_heads, self.groups, 1, 1)
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            self.put(name, tensor)

    def _tile_sizes(self) -> tuple[int, int]:
        settings, layout = self.settings, self.settings.layout
        if layout is not None:
            if not {settings.query_tile, settings.key_tile} <= {None, layout.block_size}:
                raise ValueError(
                    f"with a layout the tiles are its own, of {layout.block_size}, "
                    f"got query_tile={settings.query_tile}, key_tile={settings.key_tile}"
                )
            return layout.block_size, layout.block_size
        query_tile, key_tile = _default_tiles(self.batch * self.n_heads, settings.window)
        query_tile = query_tile if settings.query_tile is None else settings.query_tile
        key_tile = key_tile if settings.key_tile is None else settings.key_tile
        at_least("query_tile", query_tile, 1)
        at_least("key_tile", key_tile, 1)
        return query_tile, key_tile

    # Slow memory -----------------------------------------------------------------------------------------------------

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep (batch, heads, length, width) under ``name``, in the dtype of the computation."""
        batch, heads, length, width = tensor.shape
        groups = heads // self.n_kv_heads
        grouped = tensor.to(self.dtype).reshape(batch * self.n_kv_heads, groups, length, width)
        self.memory[name] = grouped.contiguous()

    def room(self, name: str, *, like: str, width: int) -> None:
        """Unwritten memory for a result of the length and the heads of ``like``."""
        tensor = self.memory[like]
        self.memory[name] = tensor.new_empty(*tensor.shape[:3], width)

    def fill(self, name: str, value: float) -> None:
        self.memory[name].fill_(value)
        if self.record is not None:
            self.record.stored[name] += self.memory[name].numel()

    def load(self, name: str, part: slice) -> Tensor:
        """A tile of rows: (n, g * rows, width)."""
        tile = self.memory[name][:, :, part].flatten(1, 2)
        if self.record is not None:
            self.record.loaded[name] += tile.numel()
        return tile

    def store(self, name: str, part: slice, tile: Tensor) -> None:
        target = self.memory[name][:, :, part]
        target.copy_(tile.reshape(target.shape))
        if self.record is not None:
            self.record.stored[name] += tile.numel()

    def take(self, name: str, like: Tensor) -> Tensor:
        """A result whole again, in the heads of ``like``: (batch, heads, length, width)."""
        tensor = self.memory.pop(name)
        return tensor.view(*like.shape[:3], tensor.size(3))

    # The grid --------------------------------------------------------------------------------------------------------

    def rows(self) -> Iterator[tuple[int, slice]]:
        return _parts(self.query_length, self.query_tile)

    def columns(self) -> Iterator[tuple[int, slice]]:
        return _parts(self.key_length, self.key_tile)

    def tiles_of_row(self, row: int, queries: slice) -> Iterator[Tile]:
        """The live tiles of some queries, from the first keys to the last."""
        for column, keys in self.columns():
            yield from self._visit(row, column, queries, keys)

    def tiles_of_column(self, column: int, keys: slice) -> Iterator[Tile]:
        """The live tiles of some keys, from the first queries to the last."""
        for row, queries in self.rows():
            yield from self._visit(row, column, queries, keys)

    def _visit(self, row: int, column: int, queries: slice, keys: slice) -> Iterator[Tile]:
        state = self._state(queries, keys)
        layout = self.settings.layout
        if layout is not None and state is not None:
            in_layout = int(layout.states[row, column])
            state = None if in_layout == DEAD else state or in_layout != FULL
        if state is None:
            return
        tile = Tile(row, column, queries, keys, state)
        if self.record is not None:
            self.record.tiles.append(tile)
        yield tile

    def _state(self, queries: slice, keys: slice) -> bool | None:
        """None if causality and window hide the whole tile; else whether they hide a part of it."""
        window = self.settings.window
        offset = self.key_length - self.query_length  # the last query stands at the last key
        first, last = queries.start + offset, queries.stop - 1 + offset
        nearest, farthest = first - (keys.stop - 1), last - keys.start  # distances back from query to key
        if self.settings.causal:
            dead, masked = farthest < 0, nearest < 0
        else:
            dead, masked = window is not None and farthest <= -window, window is not None and nearest <= -window
        if window is not None:
            dead, masked = dead or nearest >= window, masked or farthest >= window
        return None if dead else masked

    # Scores ----------------------------------------------------------------------------------------------------------

    def scores(self, tile: Tile, queries: Tensor, keys: Tensor) -> Tensor:
        """Scaled, biased, masked with -inf: (n, g * rows, keys), for the caller to overwrite."""
        unused = queries.new_empty(1, 1, 1)
        scores = torch.baddbmm(unused, queries, keys.mT, beta=0, alpha=self.scale)
        rows = scores.size(1) // self.groups
        by_head = scores.view(self.batch, self.n_kv_heads, self.groups, rows, scores.size(2))
        if self.slopes is not None:
            by_head.addcmul_(self.slopes, self._distance(tile).abs_().to(self.dtype), value=-1)
        if tile.masked:
            hidden = torch.zeros(by_head.shape[-2:], dtype=self.dtype, device=self.device)
            by_head += hidden.masked_fill_(~self._allowed(tile), -math.inf)  # adding is quicker than filling
        return scores

    def _distance(self, tile: Tile) -> Tensor:
        """How far each key of the tile lies before each query: int64 (rows, keys)."""
        offset = self.key_length - self.query_length
        place = torch.arange(tile.queries.start, tile.queries.stop, device=self.device) + offset
        return place[:, None] - torch.arange(tile.keys.start, tile.keys.stop, device=self.device)

    def _allowed(self, tile: Tile) -> Tensor:
        causal, window, layout = self.settings.causal, self.settings.window, self.settings.layout
        back = self._distance(tile)
        if causal:
            allowed = back >= 0
        else:
            allowed = torch.ones_like(back, dtype=torch.bool) if window is None else back > -window
        if window is not None:
            allowed &= back < window
        if layout is not None:
            number = int(layout.mask_numbers[tile.row, tile.column])
            if number >= 0:
                allowed &= layout.masks[number, : back.size(0), : back.size(1)].to(self.device)
        return allowed

    def kept(self, tile: Tile) -> Tensor | None:
        """Dropout's factors (n, g * rows, keys): 0 or ``1 / (1 - dropout)``; None without dropout."""
        p = self.settings.dropout
        if not p:
            return None
        places = (slice(0, self.batch), slice(0, self.n_heads), tile.queries, tile.keys)
        batch, head, query, key = (
            torch.arange(part.start, part.stop, device=self.device).view(-1, *(1,) * (3 - axis))
            for axis, part in enumerate(places)
        )
        kept = attention_dropout_kept(batch, head, query, key, p=p, seed=self.settings.seed)
        return (kept.to(self.dtype) / (1 - p)).view(
            self.batch * self.n_kv_heads, self.groups * kept.size(2), kept.size(3)
        )


def _parts(length: int, size: int) -> Iterator[tuple[int, slice]]:
    for number, start in enumerate(range(0, length, size)):
        yield number, slice(start, min(start + size, length))


def _default_tiles(n: int, window: int | None) -> tuple[int, int]:
    """Sides of a tile that ``n`` heads share, for a CPU: of the sides from 64 to 512 measured, 128 by 256 lost nowhere
    much, and smaller ones for many heads bound the memory."""
    query_tile, key_tile = 128, 256
    if window is not None:  # of a tile wider than the window most would be hidden
        key_tile = min(key_tile, max(64, window))
    while n * query_tile * key_tile > _TILE_SCORES and max(query_tile, key_tile) > 64:
        if key_tile > query_tile:
            key_tile //= 2
        else:
            query_tile //= 2
    return query_tile, key_tile
