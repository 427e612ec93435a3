"""The atomic sparse patterns: which pairs of query and key an attention computes.

Lin et al. 2021 ("A Survey of Transformers", section 4.1.1) sort sparse attention by position into five atomic families:
global, band, dilated, random and block-local. Each is one small frozen object here, made by the functions at the end;
the published compounds of them are in ``sparse_compounds``.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from minillm.layers.arguments import at_least
from minillm.layers.block_layout import Extent
from minillm.layers.sparse_algebra import Pattern


@dataclass(frozen=True)
class Band(Pattern):
    """Keys at ``place - k * dilation`` for ``-ahead <= k <= behind``; None is without end."""

    behind: int | None
    ahead: int | None
    dilation: int = 1

    def __post_init__(self) -> None:
        for name, reach in (("behind", self.behind), ("ahead", self.ahead)):
            if reach is not None:
                at_least(name, reach, 0)
        at_least("dilation", self.dilation, 1)

    def allowed(self, place: Tensor, key: Tensor, key_length: int) -> Tensor:
        distance = place - key
        inside = torch.ones_like(distance, dtype=torch.bool) if self.dilation == 1 else distance % self.dilation == 0
        if self.behind is not None:
            inside &= distance <= self.behind * self.dilation
        if self.ahead is not None:
            inside &= distance >= -self.ahead * self.dilation
        return inside

    def bounds(self, place: Extent, key: Extent, key_length: int) -> tuple[Tensor, Tensor]:
        lowest, highest = place.first - key.last, place.last - key.first
        low = lowest if self.ahead is None else lowest.clamp(min=-self.ahead * self.dilation)
        high = highest if self.behind is None else highest.clamp(max=self.behind * self.dilation)
        some = (high // self.dilation) * self.dilation >= low  # the largest multiple of the dilation that is in reach
        every = (low == lowest) & (high == highest) & (self.dilation == 1)
        return some, every


@dataclass(frozen=True)
class BlockLocal(Pattern):
    """Keys in the query's own block of ``block_size`` places, in ``behind`` blocks before it and ``ahead`` after it."""

    block_size: int
    behind: int = 0
    ahead: int = 0

    def __post_init__(self) -> None:
        at_least("block_size", self.block_size, 1)
        at_least("behind", self.behind, 0)
        at_least("ahead", self.ahead, 0)

    def allowed(self, place: Tensor, key: Tensor, key_length: int) -> Tensor:
        distance = place // self.block_size - key // self.block_size
        return (distance <= self.behind) & (distance >= -self.ahead)

    def bounds(self, place: Extent, key: Extent, key_length: int) -> tuple[Tensor, Tensor]:
        row, column = place.in_blocks(self.block_size), key.in_blocks(self.block_size)
        lowest, highest = row.first - column.last, row.last - column.first
        return (lowest <= self.behind) & (highest >= -self.ahead), (lowest >= -self.ahead) & (highest <= self.behind)


@dataclass(frozen=True)
class GlobalTokens(Pattern):
    """Everyone sees the keys in the blocks numbered ``places``; if ``symmetric``, the queries there see every key.

    Negative numbers count from the last block. With ``every``, token ``j`` is global if token ``j % every`` is.
    """

    places: tuple[int, ...]
    symmetric: bool = True
    block_size: int = 1
    every: int | None = None

    def __post_init__(self) -> None:
        at_least("block_size", self.block_size, 1)
        for place in self.places:
            at_least("places", place, -(2**31))
        if self.every is not None:
            at_least("every", self.every, 1)
            outside = [place for place in self.places if not 0 <= place * self.block_size < self.every]
            if outside:
                raise ValueError(f"places must lie in [0, every), got {outside} with every={self.every}")

    def _is_global(self, key_length: int, device: torch.device) -> Tensor:
        """Boolean (key_length,): memory linear in the length."""
        flags = torch.zeros(key_length if self.every is None else self.every, dtype=torch.bool, device=device)
        n_blocks = -(-key_length // self.block_size)
        for place in self.places:
            start = (place + n_blocks if place < 0 else place) * self.block_size
            if start >= 0:  # counted from the end, a place may lie before a short text
                flags[start : start + self.block_size] = True
        return flags if self.every is None else flags.repeat(-(-key_length // self.every))[:key_length]

    def allowed(self, place: Tensor, key: Tensor, key_length: int) -> Tensor:
        flags = self._is_global(key_length, key.device)
        row = flags[place.clamp(min=0)] & (place >= 0) if self.symmetric else torch.zeros_like(place, dtype=torch.bool)
        return row | flags[key]

    def bounds(self, place: Extent, key: Extent, key_length: int) -> tuple[Tensor, Tensor]:
        before = F.pad(self._is_global(key_length, key.first.device).long().cumsum(0), (1, 0))
        some = every = torch.zeros_like(place.first + key.first, dtype=torch.bool)
        for extent in (key, place) if self.symmetric else (key,):
            count = before[extent.last.clamp(min=-1) + 1] - before[extent.first.clamp(min=0)]
            some = some | (count > 0)
            every = every | (count == extent.last - extent.first + 1)
        return some, every


@dataclass(frozen=True)
class RandomBlocks(Pattern):
    """For each block of queries, ``n_blocks`` blocks of keys drawn by ``seed``.

    A pair of blocks is given a pseudo-random rank by its two numbers, and the lowest ``n_blocks`` ranks of a row of
    blocks are live. No state and no table: any tile can be asked for by itself, and with ``causal`` a row stays as it
    is while the text grows.
    """

    n_blocks: int
    block_size: int = 64
    seed: int = 0
    causal: bool = False

    def __post_init__(self) -> None:
        at_least("n_blocks", self.n_blocks, 0)
        at_least("block_size", self.block_size, 1)
        at_least("seed", self.seed, 0)
        if self.seed >= 2**31:
            raise ValueError(f"seed must be below 2**31, got {self.seed}")

    def _rank(self, row: Tensor, column: Tensor) -> Tensor:
        return _mix(_mix(row + _mix(torch.tensor(self.seed, device=row.device))) + column) << 31 | column

    def _drawn(self, row: Tensor, column: Tensor, key_length: int) -> Tensor:
        """Boolean, for numbers of blocks that broadcast."""
        n_columns = -(-key_length // self.block_size)
        wanted = min(self.n_blocks, n_columns)
        if wanted == 0:
            return torch.zeros_like(row + column, dtype=torch.bool)
        rows, place_in_rows = torch.unique(row, return_inverse=True)
        every_column = torch.arange(n_columns, device=row.device)
        ranks = self._rank(rows[:, None], every_column)
        if self.causal:
            ranks = ranks.masked_fill(every_column > rows[:, None], torch.iinfo(torch.int64).max)
        highest = ranks.kthvalue(wanted, dim=1).values[place_in_rows]
        drawn = self._rank(row, column) <= highest
        return drawn & (column <= row) if self.causal else drawn

    def allowed(self, place: Tensor, key: Tensor, key_length: int) -> Tensor:
        return self._drawn(place // self.block_size, key // self.block_size, key_length)

    def bounds(self, place: Extent, key: Extent, key_length: int) -> tuple[Tensor, Tensor]:
        row, column = place.in_blocks(self.block_size), key.in_blocks(self.block_size)
        heights, widths = (int((extent.last - extent.first).max()) + 1 for extent in (row, column))
        some = torch.zeros_like(row.first + column.first, dtype=torch.bool)
        if heights * widths > 16:  # blocks much smaller than the tiles: looking into the tile is as fast
            return ~some, some
        every = ~some
        for down in range(heights):
            for across in range(widths):
                corner = ((row.first + down).minimum(row.last), (column.first + across).minimum(column.last))
                drawn = self._drawn(*corner, key_length)
                some, every = some | drawn, every & drawn
        return some, every


def causal() -> Pattern:
    """No query looks at keys after its own place: ``key <= place``."""
    return Band(None, 0)


def band(behind: int, ahead: int | None = None) -> Pattern:
    """Band: ``place - behind <= key <= place + ahead``; ahead None is as many as behind (Longformer's two sides)."""
    return Band(behind, behind if ahead is None else ahead)


def sliding_window(window: int) -> Pattern:
    """The last ``window`` keys, the query's own place included (Mistral's meaning, as in ``causal_mask``)."""
    at_least("window", window, 1)
    return Band(window - 1, 0)


def dilated(behind: int | None, ahead: int | None, dilation: int) -> Pattern:
    """A band with gaps: keys at ``place - k * dilation`` for ``-ahead <= k <= behind``; None is without end."""
    return Band(behind, ahead, dilation)


def block_local(block_size: int, *, behind: int = 0, ahead: int = 0) -> Pattern:
    """The text in pieces of ``block_size`` tokens; a piece sees itself and so many pieces before and after it."""
    return BlockLocal(block_size, behind, ahead)


def global_tokens(
    places: int | Iterable[int], *, symmetric: bool = True, block_size: int = 1, every: int | None = None
) -> Pattern:
    """Tokens that everyone sees and, if ``symmetric``, that see everyone.

    places: the first so many, or which (negative: from the end). block_size: they are blocks of so many tokens.
    every: the same places again in each ``every`` tokens.
    """
    if isinstance(places, int):
        at_least("places", places, 0)
        places = range(places)
    elif not isinstance(places, Iterable):
        raise TypeError(f"places must be a number of tokens or their places, got {places!r}")
    return GlobalTokens(tuple(places), symmetric, block_size, every)


def random_blocks(n_blocks: int, *, block_size: int = 64, seed: int = 0, causal: bool = False) -> Pattern:
    """For each block of queries ``n_blocks`` blocks of keys, drawn by ``seed`` from all or, if ``causal``, from those
    up to its own (then all of them where there are fewer). ``block_size=1`` draws single keys."""
    return RandomBlocks(n_blocks, block_size, seed, causal)


def _mix(x: Tensor) -> Tensor:
    """A 31-bit integer hash: every bit of ``x`` reaches every bit of the result, and no product leaves 63 bits."""
    x = x & 0x7FFFFFFF
    for factor in (0x45D9F3B, 0x119DE1F3):
        x = ((x ^ (x >> 16)) * factor) & 0x7FFFFFFF
    return x ^ (x >> 15)
