# mypy: ignore-errors
# fmt: off
"""FlashAttention-2, backward: dQ. One program holds a tile of queries and walks its keys, as in the forward pass."""

import triton
import triton.language as tl

from minillm.kernels.flash_attention.kernel_tiles import (
    LOG2E,
    biased,
    listed_tiles,
    live_tiles,
    load_rows,
    sequence,
)


@triton.jit
def _walk_keys(
    d_query,  # (BLOCK_M, BLOCK_D)
    query,  # (BLOCK_M, BLOCK_D)
    d_output,  # (BLOCK_M, BLOCK_D)
    lse,  # (BLOCK_M,), in units of log2
    delta,  # (BLOCK_M,)
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
    """dQ / scale from the live key tiles with a mask, or from those without."""
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
        value = load_rows(
            value_ptr + rows * value_stride + columns, exist, columns, HEAD_DIM, BLOCK_D, MASKED, UPCAST
        )
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION, out_dtype=WIDE)  # (BLOCK_M, BLOCK_N)
        scores = biased(
            scores * scale, places[:, None], keys[None, :], key_length, left, right, slope, mask_pointers,
            LEFT, RIGHT, ALIBI, SPARSE, MASKED,
        )
        weights = tl.exp2(scores - lse[:, None])
        d_weights = tl.dot(d_output, tl.trans(value), input_precision=PRECISION, out_dtype=WIDE)
        d_scores = weights * (d_weights - delta[:, None])
        d_query = tl.dot(d_scores.to(key.dtype), key, d_query, input_precision=PRECISION, out_dtype=WIDE)
    return d_query


@triton.jit
def flash_backward_queries(
    query_ptr, key_ptr, value_ptr, d_output_ptr,  # as in flash_forward
    lse_ptr, delta_ptr,  # (batch, n_heads, query_length)
    d_query_ptr,  # as query
    slopes_ptr, query_offsets_ptr, key_offsets_ptr, bounds_ptr, tiles_ptr, numbers_ptr, masks_ptr,
    query_stride_b, query_stride_h, query_stride_m,
    key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n,
    d_output_stride_b, d_output_stride_h, d_output_stride_m,
    lse_stride_b, lse_stride_h,
    d_query_stride_b, d_query_stride_h, d_query_stride_m,
    n_tiles, n_heads, group, query_length, key_length, scale, left, right,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, ALIBI: tl.constexpr, VARLEN: tl.constexpr, SPARSE: tl.constexpr,
    UPCAST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):
    tile = tl.program_id(0) % n_tiles
    if RIGHT:
        tile = n_tiles - 1 - tile  # as in flash_forward
    head = (tl.program_id(0) // n_tiles % n_heads).to(tl.int64)
    key_head = head // group
    batch = (tl.program_id(0) // n_tiles // n_heads).to(tl.int64)
    query_start, query_length = sequence(query_offsets_ptr, batch, query_length, VARLEN)
    key_start, key_length = sequence(key_offsets_ptr, batch, key_length, VARLEN)
    if tile * BLOCK_M >= query_length:
        return
    start = query_start + tile.to(tl.int64) * BLOCK_M
    query_ptr += batch * query_stride_b + head * query_stride_h + start * query_stride_m
    key_ptr += batch * key_stride_b + key_head * key_stride_h + key_start * key_stride_n
    value_ptr += batch * value_stride_b + key_head * value_stride_h + key_start * value_stride_n
    d_output_ptr += batch * d_output_stride_b + head * d_output_stride_h + start * d_output_stride_m
    d_query_ptr += batch * d_query_stride_b + head * d_query_stride_h + start * d_query_stride_m
    lse_ptr += batch * lse_stride_b + head * lse_stride_h + start
    delta_ptr += batch * lse_stride_b + head * lse_stride_h + start

    inside = tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    columns = tl.arange(0, BLOCK_D)[None, :]  # (1, BLOCK_D)
    exist = tile * BLOCK_M + inside < query_length
    places = tile * BLOCK_M + inside + (key_length - query_length)
    query_pointers = query_ptr + inside[:, None].to(tl.int64) * query_stride_m + columns
    query = load_rows(query_pointers, exist[:, None], columns, HEAD_DIM, BLOCK_D, True, UPCAST)
    d_output_pointers = d_output_ptr + inside[:, None].to(tl.int64) * d_output_stride_m + columns
    d_output = load_rows(d_output_pointers, exist[:, None], columns, HEAD_DIM, BLOCK_D, True, UPCAST)
    lse = tl.load(lse_ptr + inside, mask=exist, other=float("inf"))
    lse = tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)  # exp(S - inf) = 0 where no key is seen
    delta = tl.load(delta_ptr + inside, mask=exist, other=0.0)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + head) * LOG2E
    if SPARSE:
        begin, full_begin, full_end, end = listed_tiles(bounds_ptr, tile)
    else:
        first = tile * BLOCK_M + key_length - query_length
        last = tl.minimum(first + BLOCK_M, key_length) - 1
        begin, full_begin, full_end, end = live_tiles(first, last, key_length, left, right, LEFT, RIGHT, BLOCK_N)

    d_query = tl.zeros((BLOCK_M, BLOCK_D), WIDE)
    d_query = _walk_keys(
        d_query, query, d_output, lse, delta, places, key_ptr, value_ptr, key_stride_n, value_stride_n, key_length,
        begin, full_begin, full_end, end, scale * LOG2E, left, right, slope, tiles_ptr, numbers_ptr, masks_ptr,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, LEFT, RIGHT, ALIBI, SPARSE, UPCAST, WIDE, PRECISION, MASKED=False,
    )
    d_query = _walk_keys(
        d_query, query, d_output, lse, delta, places, key_ptr, value_ptr, key_stride_n, value_stride_n, key_length,
        begin, full_begin, full_end, end, scale * LOG2E, left, right, slope, tiles_ptr, numbers_ptr, masks_ptr,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, LEFT, RIGHT, ALIBI, SPARSE, UPCAST, WIDE, PRECISION, MASKED=True,
    )
    d_query = (d_query * scale).to(d_query_ptr.dtype.element_ty)
    d_query_pointers = d_query_ptr + inside[:, None].to(tl.int64) * d_query_stride_m + columns
    tl.store(d_query_pointers, d_query, mask=exist[:, None] & (columns < HEAD_DIM))
