# mypy: ignore-errors
"""What the flash attention kernels share: which tiles a band leaves alive, loads of rows, and the scores of one tile.

Places are counted in the keys' coordinates: query i stands at place i + key_length - query_length, so that the last
query stands at the last key. A band lets the query at place t look at the keys t - left ... t + right; without LEFT or
RIGHT it is open on that side (causal is right = 0). Scores are in units of log2: exp2 is what the hardware has.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def live_tiles(first, last, length, below, above, BELOW: tl.constexpr, ABOVE: tl.constexpr, BLOCK: tl.constexpr):
    """The tiles of [0, length) that the places first ... last look at: begin, full_begin, full_end, end.

    Each place t looks at t - below ... t + above. Tiles in [full_begin, full_end) are seen whole by every place and
    need no mask; those in [begin, full_begin) and [full_end, end) need one; all others are dead.
    """
    low, full_low, high, full_high = 0, 0, length, length
    if BELOW:
        low = tl.maximum(first - below, 0)
        full_low = tl.maximum(last - below, 0)
    if ABOVE:
        high = tl.maximum(tl.minimum(last + above + 1, length), 0)
        full_high = tl.maximum(tl.minimum(first + above + 1, length), 0)
    end = tl.cdiv(high, BLOCK)
    begin = tl.minimum(low // BLOCK, end)
    full_begin = tl.minimum(tl.cdiv(full_low, BLOCK), end)
    full_end = tl.minimum(tl.maximum(full_high // BLOCK, full_begin), end)
    return begin, full_begin, full_end, end


@triton.jit
def listed_tiles(bounds_ptr, row):
    """The same four numbers in a list of live tiles: those without a mask stand first. bounds_ptr: (rows, 3)."""
    begin = tl.load(bounds_ptr + 3 * row)
    full_end = tl.load(bounds_ptr + 3 * row + 1)
    end = tl.load(bounds_ptr + 3 * row + 2)
    return begin, begin, full_end, end


@triton.jit
def sequence(offsets_ptr, batch, length, VARLEN: tl.constexpr):
    """Where a sequence starts in its tensor, int64, and its length. offsets_ptr: (n_sequences + 1,), where packed."""
    start = batch * 0
    if VARLEN:
        start = tl.load(offsets_ptr + batch).to(tl.int64)
        length = (tl.load(offsets_ptr + batch + 1).to(tl.int64) - start).to(tl.int32)
    return start, length


@triton.jit
def load_rows(
    pointers,  # (rows, BLOCK_D)
    exist,  # (rows, 1) boolean
    columns,  # (1, BLOCK_D)
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Rows of a matrix, zeros for those that do not exist; without MASKED all are known to."""
    if MASKED and BLOCK_D != HEAD_DIM:
        tile = tl.load(pointers, mask=exist & (columns < HEAD_DIM), other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=exist, other=0.0)
    elif BLOCK_D != HEAD_DIM:
        tile = tl.load(pointers, mask=columns < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(pointers)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def biased(
    scores,  # one tile, queries by keys or keys by queries, in units of log2
    places,  # of the queries: (BLOCK_M, 1) or (1, BLOCK_M)
    keys,  # (1, BLOCK_N) or (BLOCK_N, 1)
    key_length,
    left,
    right,
    slope,  # in units of log2
    mask_pointers,  # shaped as scores: this tile's mask, one byte a pair
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ALIBI: tl.constexpr,
    SPARSE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """ALiBi's bias added; with MASKED, -inf beyond the last key, outside the band and outside the tile's mask."""
    if ALIBI:
        scores -= slope * tl.abs(places - keys).to(tl.float32)
    if MASKED:
        seen = keys < key_length
        if LEFT:
            seen = seen & (keys >= places - left)
        if RIGHT:
            seen = seen & (keys <= places + right)
        if SPARSE:
            seen = seen & (tl.load(mask_pointers) != 0)
        scores = tl.where(seen, scores, -float("inf"))
    return scores
