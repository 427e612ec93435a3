"""What attention moves between slow and fast memory: written out, as FlashAttention-1, as FlashAttention-2.

Slow memory is a GPU's HBM, fast memory the SRAM of its multiprocessors. The counts are exact for given tiles, as
``minillm.layers.flash_loops`` visits them. For N tokens of d numbers and M numbers in fast memory the leading terms are

    written out         4 N d + 4 N^2         Theta(N d + N^2)     (Dao et al. 2022, Algorithm 0, Theorem 2)
    FlashAttention-1    12 N^2 d^2 / M        Theta(N^2 d^2 / M)   with the tiles of its Algorithm 1
    FlashAttention-2    2 N^2 d / query_tile                       8 N^2 d^2 / M for tiles of M / (4 d) queries

Elements are counted, of all sequences and heads; bytes follow from the width of each.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from minillm.costs.arguments import at_least

_STATISTICS = frozenset({"highest", "total", "log_sum", "delta"})  # one number a query, float32


@dataclass(frozen=True)
class AttentionSize:
    """One call of attention; the last query stands at the last key.

    value_dim, n_kv_heads: None is head_dim and n_heads; ``width`` and ``kv_heads`` are what holds then.
    causal, window: hide pairs, and a tile without a pair is skipped. With ``causal`` a query sees the last ``window``
    keys, its own included, without it the keys that are nearer than ``window``.
    """

    query_length: int
    key_length: int
    head_dim: int
    value_dim: int | None = None
    n_heads: int = 1
    n_kv_heads: int | None = None
    batch_size: int = 1
    causal: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        at_least(0, query_length=self.query_length, key_length=self.key_length, batch_size=self.batch_size)
        at_least(1, head_dim=self.head_dim, value_dim=self.width, n_heads=self.n_heads, n_kv_heads=self.kv_heads)
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_kv_heads must divide n_heads, got {self.kv_heads} and {self.n_heads}")
        if self.window is not None:
            at_least(1, window=self.window)

    @property
    def width(self) -> int:
        """Numbers in a value."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads


@dataclass(frozen=True)
class Traffic:
    """Elements moved, by tensor: loaded from slow memory, and stored to it."""

    loaded: Mapping[str, int]
    stored: Mapping[str, int]

    @property
    def elements(self) -> int:
        return sum(self.loaded.values()) + sum(self.stored.values())

    def bytes(self, bytes_per_value: float = 2) -> float:
        """2 for bfloat16 and float16, 4 for float32; maxima, sums and their logarithms are float32 always."""
        if not bytes_per_value > 0:
            raise ValueError(f"bytes_per_value must be positive, got {bytes_per_value}")
        return sum(
            count * (4 if name in _STATISTICS else bytes_per_value)
            for moved in (self.loaded, self.stored)
            for name, count in moved.items()
        )


@dataclass(frozen=True)
class LiveTiles:
    """The tiles of one head that are computed: how many, and summed over them their queries, keys and pairs."""

    count: int
    queries: int
    keys: int
    pairs: int


def live_tiles(size: AttentionSize, query_tile: int, key_tile: int) -> LiveTiles:
    """Tiles of ``query_tile`` by ``key_tile``, narrower at the ends, in which there is a pair to look at."""
    at_least(1, query_tile=query_tile, key_tile=key_tile)
    offset = size.key_length - size.query_length
    window = size.key_length + size.query_length if size.window is None else size.window
    count = queries = keys = pairs = 0
    for start in range(0, size.query_length, query_tile):
        stop = min(start + query_tile, size.query_length)
        # Together the rows first .. last see one range of keys.
        first, last = start + offset, stop - 1 + offset
        low = max(0, first - window + 1)
        high = min(size.key_length - 1, last if size.causal else last + window - 1)
        if low > high:
            continue
        low_tile, high_tile = low // key_tile, high // key_tile
        width = min((high_tile + 1) * key_tile, size.key_length) - low_tile * key_tile
        n_tiles = high_tile - low_tile + 1
        count, keys = count + n_tiles, keys + width
        queries, pairs = queries + (stop - start) * n_tiles, pairs + (stop - start) * width
    return LiveTiles(count, queries, keys, pairs)


def standard_attention_traffic(size: AttentionSize) -> Traffic:
    """Attention written out (Dao et al. 2022, Algorithm 0): scores and weights go to slow memory and come back.

    Every pair is computed and moved, hidden or not.
    """
    queries, keys, pairs = _counts(size)
    return Traffic(
        {
            "query": queries * size.head_dim,
            "key": keys * size.head_dim,
            "scores": pairs,
            "weights": pairs,
            "value": keys * size.width,
        },
        {"scores": pairs, "weights": pairs, "output": queries * size.width},
    )


def standard_attention_backward_traffic(size: AttentionSize) -> Traffic:
    """The backward pass of attention written out (Dao et al. 2022, Algorithm 3), with the weights kept from forward."""
    queries, keys, pairs = _counts(size)
    return Traffic(
        {
            "weights": 2 * pairs,
            "d_output": 2 * queries * size.width,
            "value": keys * size.width,
            "d_weights": pairs,
            "d_scores": 2 * pairs,
            "query": queries * size.head_dim,
            "key": keys * size.head_dim,
        },
        {
            "d_value": keys * size.width,
            "d_weights": pairs,
            "d_scores": pairs,
            "d_query": queries * size.head_dim,
            "d_key": keys * size.head_dim,
        },
    )


def flash_1_tiles(fast_memory: int, head_dim: int) -> tuple[int, int]:
    """Queries and keys in a tile of FlashAttention-1: a quarter of M for each of Q, K, V and O (Algorithm 1, line 1).

    ``key_tile = ceil(M / (4 d))`` and ``query_tile = min(key_tile, d)`` for ``fast_memory`` M in elements. Raises
    ValueError for an M that does not hold one key.
    """
    at_least(1, head_dim=head_dim)
    at_least(head_dim, fast_memory=fast_memory)
    key_tile = math.ceil(fast_memory / (4 * head_dim))
    return min(key_tile, head_dim), key_tile


def flash_1_traffic(size: AttentionSize, query_tile: int, key_tile: int) -> Traffic:
    """FlashAttention-1, forward: with each tile the unfinished output and its two sums come and go."""
    queries, keys, _ = _counts(size)
    visited = live_tiles(size, query_tile, key_tile).queries * size.batch_size * size.n_heads
    return Traffic(
        {
            "key": keys * size.head_dim,
            "value": keys * size.width,
            "query": visited * size.head_dim,
            "output": visited * size.width,
            "total": visited,
            "highest": visited,
        },
        {
            "output": (queries + visited) * size.width,  # zeros at first
            "total": queries + visited,
            "highest": queries + visited,
        },
    )


def flash_2_traffic(size: AttentionSize, query_tile: int, key_tile: int) -> Traffic:
    """FlashAttention-2, forward: queries once, keys and values with each tile, the output once."""
    queries, _, _ = _counts(size)
    visited = live_tiles(size, query_tile, key_tile).keys * size.batch_size * size.kv_heads
    return Traffic(
        {"query": queries * size.head_dim, "key": visited * size.head_dim, "value": visited * size.width},
        {"output": queries * size.width, "log_sum": queries},
    )


def flash_backward_traffic(size: AttentionSize, query_tile: int, key_tile: int) -> Traffic:
    """The backward pass by recomputation: what belongs to the queries comes with each tile, and their gradient goes."""
    queries, keys, _ = _counts(size)
    visited = live_tiles(size, query_tile, key_tile).queries * size.batch_size * size.n_heads
    return Traffic(
        {
            "output": queries * size.width,  # for D, one number a query
            "d_output": (queries + visited) * size.width,
            "key": keys * size.head_dim,
            "value": keys * size.width,
            "query": visited * size.head_dim,
            "log_sum": visited,
            "delta": visited,
            "d_query": visited * size.head_dim,
        },
        {
            "delta": queries,
            "d_query": (queries + visited) * size.head_dim,  # zeros at first
            "d_key": keys * size.head_dim,
            "d_value": keys * size.width,
        },
    )


def flash_flops(size: AttentionSize, query_tile: int, key_tile: int, *, backward: bool = False) -> int:
    """Operations of the matrix products on the live tiles: two forward; five backward, as P is computed again."""
    pairs = live_tiles(size, query_tile, key_tile).pairs * size.batch_size * size.n_heads
    products = 3 * size.head_dim + 2 * size.width if backward else size.head_dim + size.width
    return 2 * pairs * products


def arithmetic_intensity(flops: float, traffic: Traffic, *, bytes_per_value: float = 2) -> float:
    """Operations for each byte moved; a machine's own FLOP/s over its bytes/s is where memory stops being the limit."""
    return flops / traffic.bytes(bytes_per_value)


def flash_extra_elements(size: AttentionSize, query_tile: int, key_tile: int, *, backward: bool = False) -> int:
    """Elements that exist beyond inputs, output and gradients, at most: linear in the length for given tiles.

    Forward: the log-sum-exp of each query and a tile of scores of all heads, with the tile's unfinished output.
    Backward: log-sum-exp, D, and two tiles. Attention written out has ``2 N^2`` a head forward, and as many once more
    backward.
    """
    at_least(1, query_tile=query_tile, key_tile=key_tile)
    rows, columns = min(query_tile, size.query_length), min(key_tile, size.key_length)
    heads = size.batch_size * size.n_heads
    if not backward:
        return heads * (size.query_length + rows * (columns + size.width + 2))
    held = rows * size.head_dim * size.n_heads + columns * (size.head_dim + size.width) * size.kv_heads
    return heads * (2 * size.query_length + 2 * rows * columns) + size.batch_size * held


def _counts(size: AttentionSize) -> tuple[int, int, int]:
    """Queries, keys and pairs of all sequences and heads."""
    queries = size.batch_size * size.n_heads * size.query_length
    return queries, size.batch_size * size.kv_heads * size.key_length, queries * size.key_length
