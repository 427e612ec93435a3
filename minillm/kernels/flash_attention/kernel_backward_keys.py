# mypy: ignore-errors
# fmt: off
"""FlashAttention-2, backward: P is computed again from the log-sum-exp, tile by tile (Dao 2023, section 3.1.2).

    P = exp(S - lse)    dP = dO V^T    D = rowsum(dO * O) - dlse    dS = P * (dP - D)
    dV = P^T dO         dK = scale * dS^T Q         dQ = scale * dS K

Three kernels: D, one number a query; here dK and dV, by programs that hold a tile of keys and walk the queries that see
it, in all heads of the group; and dQ. Each program writes what it alone holds: nothing is added up
through memory, and the result is the same in every run.
"""

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
def _walk_queries(
    d_key,  # (BLOCK_N, BLOCK_D)
    d_value,  # (BLOCK_N, BLOCK_D)
    key,  # (BLOCK_N, BLOCK_D)
    value,  # (BLOCK_N, BLOCK_D)
    keys,  # (BLOCK_N,)
    query_ptr,  # (group, query_length, HEAD_DIM)
    d_output_ptr,  # (group, query_length, HEAD_DIM)
    lse_ptr, delta_ptr,  # (group, query_length)
    query_stride_h, query_stride, d_output_stride_h, d_output_stride, lse_stride_h, query_length, key_length, group,
    begin, full_begin, full_end, end,  # of the tiles, as live_tiles gives them
    scale,  # in units of log2
    left, right, slopes_ptr,
    tiles_ptr, numbers_ptr, masks_ptr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, ALIBI: tl.constexpr, SPARSE: tl.constexpr,
    UPCAST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, GROUPED: tl.constexpr, MASKED: tl.constexpr,
):
    """dK / scale and dV from the live query tiles with a mask, or from those without, of all heads of the group.

    One loop over heads and tiles: the next head's first tiles are on their way while the last ones are computed.
    """
    inside = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask_offsets = inside[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    first, n_tiles = full_begin, full_end - full_begin
    if MASKED:
        first, n_tiles = begin, end - begin - n_tiles
    for step in range(group * n_tiles):
        member, tile = 0, first + step
        if GROUPED:
            member, tile = (step // n_tiles).to(tl.int64), first + step % n_tiles
        if MASKED:
            tile += tl.where(tile < full_begin, 0, full_end - full_begin)
        head_query_ptr = query_ptr + member * query_stride_h
        head_d_output_ptr = d_output_ptr + member * d_output_stride_h
        head_lse_ptr = lse_ptr + member * lse_stride_h
        head_delta_ptr = delta_ptr + member * lse_stride_h
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes_ptr + member) * LOG2E
        mask_pointers = None
        if SPARSE:
            if MASKED:
                number = tl.load(numbers_ptr + tile).to(tl.int64)
                mask_pointers = masks_ptr + number * BLOCK_M * BLOCK_N + mask_offsets
            tile = tl.load(tiles_ptr + tile)
        rows = (tile.to(tl.int64) * BLOCK_M + inside)[:, None]
        queries = tile * BLOCK_M + inside
        places = queries + (key_length - query_length)
        exist = queries < query_length
        query = load_rows(
            head_query_ptr + rows * query_stride + columns, exist[:, None], columns, HEAD_DIM, BLOCK_D, MASKED, UPCAST
        )
        # Beyond the last query, as for one that sees no key (lse = -inf), exp(S - inf) = 0: no gradient, no NaN.
        if MASKED:
            lse = tl.load(head_lse_ptr + queries, mask=exist, other=float("inf"))
            delta = tl.load(head_delta_ptr + queries, mask=exist, other=0.0)
        else:
            lse = tl.load(head_lse_ptr + queries)
            delta = tl.load(head_delta_ptr + queries)
        lse = tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION, out_dtype=WIDE)  # (BLOCK_N, BLOCK_M)
        scores = biased(
            scores * scale, places[None, :], keys[:, None], key_length, left, right, slope, mask_pointers,
            LEFT, RIGHT, ALIBI, SPARSE, MASKED,
        )
        weights = tl.exp2(scores - lse[None, :])  # P transposed
        d_output = load_rows(
            head_d_output_ptr + rows * d_output_stride + columns, exist[:, None], columns,
            HEAD_DIM, BLOCK_D, MASKED, UPCAST,
        )
        d_value = tl.dot(weights.to(d_output.dtype), d_output, d_value, input_precision=PRECISION, out_dtype=WIDE)
        d_weights = tl.dot(value, tl.trans(d_output), input_precision=PRECISION, out_dtype=WIDE)
        d_scores = weights * (d_weights - delta[None, :])
        d_key = tl.dot(d_scores.to(query.dtype), query, d_key, input_precision=PRECISION, out_dtype=WIDE)
    return d_key, d_value


@triton.jit
def flash_backward_keys(
    query_ptr, key_ptr, value_ptr, d_output_ptr,  # as in flash_forward
    lse_ptr, delta_ptr,  # (batch, n_heads, query_length)
    d_key_ptr, d_value_ptr,  # as key
    slopes_ptr, query_offsets_ptr, key_offsets_ptr,
    bounds_ptr, tiles_ptr, numbers_ptr, masks_ptr,  # as in flash_forward, for each tile of keys the queries that see it
    query_stride_b, query_stride_h, query_stride_m,
    key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n,
    d_output_stride_b, d_output_stride_h, d_output_stride_m,
    lse_stride_b, lse_stride_h,
    d_key_stride_b, d_key_stride_h, d_key_stride_n,
    d_value_stride_b, d_value_stride_h, d_value_stride_n,
    n_tiles, n_key_heads, group, query_length, key_length, scale, left, right,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, ALIBI: tl.constexpr, VARLEN: tl.constexpr, SPARSE: tl.constexpr,
    UPCAST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, GROUPED: tl.constexpr,
):
    tile = tl.program_id(0) % n_tiles
    key_head = (tl.program_id(0) // n_tiles % n_key_heads).to(tl.int64)
    batch = (tl.program_id(0) // n_tiles // n_key_heads).to(tl.int64)
    query_start, query_length = sequence(query_offsets_ptr, batch, query_length, VARLEN)
    key_start, key_length = sequence(key_offsets_ptr, batch, key_length, VARLEN)
    if tile * BLOCK_N >= key_length:
        return
    start = key_start + tile.to(tl.int64) * BLOCK_N
    key_ptr += batch * key_stride_b + key_head * key_stride_h + start * key_stride_n
    value_ptr += batch * value_stride_b + key_head * value_stride_h + start * value_stride_n
    head = key_head * group  # the first of its group
    query_ptr += batch * query_stride_b + head * query_stride_h + query_start * query_stride_m
    d_output_ptr += batch * d_output_stride_b + head * d_output_stride_h + query_start * d_output_stride_m
    lse_ptr += batch * lse_stride_b + head * lse_stride_h + query_start
    delta_ptr += batch * lse_stride_b + head * lse_stride_h + query_start
    if ALIBI:
        slopes_ptr += head
    d_key_ptr += batch * d_key_stride_b + key_head * d_key_stride_h + start * d_key_stride_n
    d_value_ptr += batch * d_value_stride_b + key_head * d_value_stride_h + start * d_value_stride_n

    inside = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    columns = tl.arange(0, BLOCK_D)[None, :]  # (1, BLOCK_D)
    keys = tile * BLOCK_N + inside
    exist = (keys < key_length)[:, None]
    key_pointers = key_ptr + inside[:, None].to(tl.int64) * key_stride_n + columns
    key = load_rows(key_pointers, exist, columns, HEAD_DIM, BLOCK_D, True, UPCAST)
    value_pointers = value_ptr + inside[:, None].to(tl.int64) * value_stride_n + columns
    value = load_rows(value_pointers, exist, columns, HEAD_DIM, BLOCK_D, True, UPCAST)
    if SPARSE:
        begin, full_begin, full_end, end = listed_tiles(bounds_ptr, tile)
    else:  # key j is looked at by the places j - right ... j + left; query i stands at place i + offset
        first = tile * BLOCK_N - (key_length - query_length)
        last = tl.minimum(tile * BLOCK_N + BLOCK_N, key_length) - 1 - (key_length - query_length)
        begin, full_begin, full_end, end = live_tiles(first, last, query_length, right, left, RIGHT, LEFT, BLOCK_M)
    d_key = tl.zeros((BLOCK_N, BLOCK_D), WIDE)
    d_value = tl.zeros((BLOCK_N, BLOCK_D), WIDE)
    d_key, d_value = _walk_queries(
        d_key, d_value, key, value, keys, query_ptr, d_output_ptr, lse_ptr, delta_ptr,
        query_stride_h, query_stride_m, d_output_stride_h, d_output_stride_m, lse_stride_h, query_length, key_length,
        group, begin, full_begin, full_end, end, scale * LOG2E, left, right, slopes_ptr, tiles_ptr, numbers_ptr,
        masks_ptr, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, LEFT, RIGHT, ALIBI, SPARSE, UPCAST, WIDE, PRECISION,
        GROUPED, MASKED=False,
    )
    d_key, d_value = _walk_queries(
        d_key, d_value, key, value, keys, query_ptr, d_output_ptr, lse_ptr, delta_ptr,
        query_stride_h, query_stride_m, d_output_stride_h, d_output_stride_m, lse_stride_h, query_length, key_length,
        group, begin, full_begin, full_end, end, scale * LOG2E, left, right, slopes_ptr, tiles_ptr, numbers_ptr,
        masks_ptr, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, LEFT, RIGHT, ALIBI, SPARSE, UPCAST, WIDE, PRECISION,
        GROUPED, MASKED=True,
    )
    exist &= columns < HEAD_DIM
    d_key_pointers = d_key_ptr + inside[:, None].to(tl.int64) * d_key_stride_n + columns
    tl.store(d_key_pointers, (d_key * scale).to(d_key_ptr.dtype.element_ty), mask=exist)
    d_value_pointers = d_value_ptr + inside[:, None].to(tl.int64) * d_value_stride_n + columns
    tl.store(d_value_pointers, d_value.to(d_value_ptr.dtype.element_ty), mask=exist)
