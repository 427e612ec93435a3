# mypy: ignore-errors
# fmt: off
"""FlashAttention-2, forward: one program holds a tile of queries and walks the live tiles of keys.

With S the scaled scores of a tile and m, l the running maximum and sum of each row (Dao 2023, algorithm 1):

    m' = max(m, rowmax S)      P = exp(S - m')      l = exp(m - m') l + rowsum P      O = exp(m - m') O + P V

and at the end O / l is the output, m + log l the log-sum-exp from which the backward pass computes P again.
"""

import triton
import triton.language as tl

from minillm.kernels.flash_attention.kernel_tiles import (
    LN2,
    LOG2E,
    biased,
    listed_tiles,
    live_tiles,
    load_rows,
    sequence,
)


@triton.jit
def _walk(
    weighted,  # (BLOCK_M, BLOCK_D): O so far, not yet divided by l
    maximum,  # (BLOCK_M,)
    total,  # (BLOCK_M,)
    query,  # (BLOCK_M, BLOCK_D)
    places,  # (BLOCK_M,)
    key_ptr,  # (key_length, HEAD_DIM)
    value_ptr,  # (key_length, HEAD_DIM)
    key_stride, value_stride, key_length,
    begin, full_begin, full_end, end,  # of the tiles, as live_tiles gives them
    scale,  # in units of log2
    left, right, slope,
    tiles_ptr, numbers_ptr, masks_ptr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, ALIBI: tl.constexpr, SPARSE: tl.constexpr,
    UPCAST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):
    """The online softmax over the live key tiles with a mask, or over those without."""
    inside = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask_offsets = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + inside[None, :]
    first, n_tiles = full_begin, full_end - full_begin
    if MASKED:
        first, n_tiles = begin, end - begin - n_tiles
    for step in range(first, first + n_tiles):
        tile = step
        if MASKED:
            tile += tl.where(step < full_begin, 0, full_end - full_begin)
        mask_pointers = None
        if SPARSE:
            if MASKED:
                number = tl.load(numbers_ptr + tile).to(tl.int64)
                mask_pointers = masks_ptr + number * BLOCK_M * BLOCK_N + mask_offsets
            tile = tl.load(tiles_ptr + tile)
        rows = (tile.to(tl.int64) * BLOCK_N + inside)[:, None]
        keys = tile * BLOCK_N + inside
        exist = (keys < key_length)[:, None]
        key = load_rows(
            key_ptr + rows * key_stride + columns, exist, columns, HEAD_DIM, BLOCK_D, MASKED, UPCAST
        )
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION, out_dtype=WIDE)  # (BLOCK_M, BLOCK_N)
        if MASKED or ALIBI:
            scores = biased(
                scores * scale, places[:, None], keys[None, :], key_length, left, right, slope, mask_pointers,
                LEFT, RIGHT, ALIBI, SPARSE, MASKED,
            )
            larger = tl.maximum(maximum, tl.max(scores, 1))
            base = larger
            if MASKED:
                base = tl.where(larger == -float("inf"), 0.0, larger)  # nothing seen yet: -inf - -inf would be NaN
            weights = tl.exp2(scores - base[:, None])
        else:
            larger = tl.maximum(maximum, tl.max(scores, 1) * scale)
            base = larger
            weights = tl.exp2(scores * scale - base[:, None])  # one fused multiply-add before the exponential
        shrink = tl.exp2(maximum - base)
        maximum = larger
        total = total * shrink + tl.sum(weights, 1)
        value = load_rows(
            value_ptr + rows * value_stride + columns, exist, columns, HEAD_DIM, BLOCK_D, MASKED, UPCAST
        )
        weighted = tl.dot(
            weights.to(value.dtype), value, weighted * shrink[:, None], input_precision=PRECISION, out_dtype=WIDE
        )
    return weighted, maximum, total


@triton.jit
def flash_forward(
    query_ptr,  # (batch, n_heads, query_length, HEAD_DIM); packed: (n_heads, total, HEAD_DIM)
    key_ptr,  # (batch, n_heads / group, key_length, HEAD_DIM)
    value_ptr,  # as key
    output_ptr,  # as query
    lse_ptr,  # (batch, n_heads, query_length) float32
    slopes_ptr,  # (n_heads,) float32
    query_offsets_ptr, key_offsets_ptr,  # (n_sequences + 1,)
    bounds_ptr,  # (query tiles, 3): where a row's live tiles begin in the list, where those without a mask end, the end
    tiles_ptr, numbers_ptr,  # (live tiles,): key tile, number of its mask
    masks_ptr,  # (n, BLOCK_M, BLOCK_N), one byte a pair
    query_stride_b, query_stride_h, query_stride_m,
    key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n,
    output_stride_b, output_stride_h, output_stride_m,
    lse_stride_b, lse_stride_h,
    n_tiles, n_heads, group, query_length, key_length, scale, left, right,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, ALIBI: tl.constexpr, VARLEN: tl.constexpr, SPARSE: tl.constexpr,
    UPCAST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):
    tile = tl.program_id(0) % n_tiles
    if RIGHT:
        tile = n_tiles - 1 - tile  # the last queries see most keys: started first, they do not finish last
    head = tl.program_id(0) // n_tiles % n_heads
    batch = (tl.program_id(0) // n_tiles // n_heads).to(tl.int64)
    query_start, query_length = sequence(query_offsets_ptr, batch, query_length, VARLEN)
    key_start, key_length = sequence(key_offsets_ptr, batch, key_length, VARLEN)
    if tile * BLOCK_M >= query_length:
        return
    key_head = (head // group).to(tl.int64)
    head = head.to(tl.int64)
    start = query_start + tile.to(tl.int64) * BLOCK_M
    query_ptr += batch * query_stride_b + head * query_stride_h + start * query_stride_m
    key_ptr += batch * key_stride_b + key_head * key_stride_h + key_start * key_stride_n
    value_ptr += batch * value_stride_b + key_head * value_stride_h + key_start * value_stride_n
    output_ptr += batch * output_stride_b + head * output_stride_h + start * output_stride_m
    lse_ptr += batch * lse_stride_b + head * lse_stride_h + start

    inside = tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    columns = tl.arange(0, BLOCK_D)[None, :]  # (1, BLOCK_D)
    exist = (tile * BLOCK_M + inside < query_length)[:, None]
    places = tile * BLOCK_M + inside + (key_length - query_length)
    query_pointers = query_ptr + inside[:, None].to(tl.int64) * query_stride_m + columns
    query = load_rows(query_pointers, exist, columns, HEAD_DIM, BLOCK_D, True, UPCAST)
    scale *= LOG2E
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + head) * LOG2E
    if SPARSE:
        begin, full_begin, full_end, end = listed_tiles(bounds_ptr, tile)
    else:
        first = tile * BLOCK_M + key_length - query_length
        last = tl.minimum(first + BLOCK_M, key_length) - 1
        begin, full_begin, full_end, end = live_tiles(first, last, key_length, left, right, LEFT, RIGHT, BLOCK_N)

    weighted = tl.zeros((BLOCK_M, BLOCK_D), WIDE)
    maximum = tl.full((BLOCK_M,), -float("inf"), WIDE)
    total = tl.zeros((BLOCK_M,), WIDE)
    weighted, maximum, total = _walk(
        weighted, maximum, total, query, places, key_ptr, value_ptr, key_stride_n, value_stride_n, key_length,
        begin, full_begin, full_end, end, scale, left, right, slope, tiles_ptr, numbers_ptr, masks_ptr,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, LEFT, RIGHT, ALIBI, SPARSE, UPCAST, WIDE, PRECISION, MASKED=False,
    )
    weighted, maximum, total = _walk(
        weighted, maximum, total, query, places, key_ptr, value_ptr, key_stride_n, value_stride_n, key_length,
        begin, full_begin, full_end, end, scale, left, right, slope, tiles_ptr, numbers_ptr, masks_ptr,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, LEFT, RIGHT, ALIBI, SPARSE, UPCAST, WIDE, PRECISION, MASKED=True,
    )

    empty = total == 0.0  # queries that see no key: zeros, and -inf
    total = tl.where(empty, 1.0, total)
    output = weighted / total[:, None]
    lse = tl.where(empty, -float("inf"), (maximum + tl.log2(total)) * LN2)
    output_pointers = output_ptr + inside[:, None].to(tl.int64) * output_stride_m + columns
    tl.store(output_pointers, output.to(output_ptr.dtype.element_ty), mask=exist & (columns < HEAD_DIM))
    tl.store(lse_ptr + inside, lse, mask=tile * BLOCK_M + inside < query_length)
