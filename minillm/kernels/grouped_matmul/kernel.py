# mypy: ignore-errors
"""The tiles of a product of rows in groups, each with a matrix of its own. The sizes are read on the device."""

import triton
import triton.language as tl

from minillm.kernels.tile_product import tile_of, tile_product


@triton.jit
def clamped_counts(counts_ptr, groups, n_groups, n_rows):
    """(GROUPS,) int64: rows of each group, and as group ``n_groups`` those of nobody; no number can lead outside."""
    counts = tl.load(counts_ptr + groups, mask=groups < n_groups, other=0)
    counts = tl.maximum(tl.minimum(counts, n_rows), 0)
    return tl.where(groups == n_groups, tl.maximum(n_rows - tl.sum(counts, axis=0), 0), counts)


@triton.jit
def grouped_matmul_forward(
    rows_ptr,  # (n_rows, d_in), group by group
    weights_ptr,  # (n_groups, d_out, d_in)
    counts_ptr,  # (n_groups,) int64, contiguous
    out_ptr,  # (n_rows, d_out), contiguous
    n_rows,
    n_groups,
    d_out,
    d_in,
    rows_row_stride,
    rows_stride,
    weights_group_stride,
    weights_row_stride,
    weights_stride,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW_TILES: tl.constexpr,
    GROUPS: tl.constexpr,  # a power of two above n_groups
):
    """One tile (BLOCK_M, BLOCK_N) of rows of one group times its matrix.

    A group of c rows has ceil(c / BLOCK_M) rows of tiles, so all groups together, with the rows of nobody, have at most
    ceil(n_rows / BLOCK_M) + n_groups: that many are launched, whatever the counts. Each program finds its group from
    the running sum of the groups' tiles; the last few find none and stop.
    """
    n_row_tiles = tl.cdiv(n_rows, BLOCK_M) + n_groups
    row_tile, column_tile = tile_of(tl.program_id(0), n_row_tiles, tl.cdiv(d_out, BLOCK_N), ROW_TILES)
    groups = tl.arange(0, GROUPS)
    counts = clamped_counts(counts_ptr, groups, n_groups, n_rows)
    tile_ends = tl.cumsum(tl.cdiv(counts, BLOCK_M), axis=0)  # (GROUPS,)
    group = tl.sum((tile_ends <= row_tile).to(tl.int32), axis=0)
    if group > n_groups:
        return
    earlier = groups < group
    first = tl.sum(tl.where(earlier, counts, 0), axis=0)
    end = tl.minimum(first + tl.sum(tl.where(groups == group, counts, 0), axis=0), n_rows)
    first_tile = tl.sum(tl.where(earlier, tl.cdiv(counts, BLOCK_M), 0), axis=0)
    rows = first + (row_tile - first_tile) * BLOCK_M + tl.arange(0, BLOCK_M)  # int64, as the counts are
    columns = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K).to(tl.int64)
    row_inside, column_inside = rows < end, columns < d_out
    weight_ptr = weights_ptr + group.to(tl.int64) * weights_group_stride
    product = tile_product(
        rows_ptr + rows[:, None] * rows_row_stride + inner[None, :] * rows_stride,
        weight_ptr + columns[None, :] * weights_row_stride + inner[:, None] * weights_stride,
        row_inside,
        column_inside,
        tl.where(group < n_groups, d_in, 0),  # rows of nobody: zeros
        rows_stride,
        weights_stride,
        EVEN_K,
        UPCAST,
        INPUT_PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    out_ptrs = out_ptr + rows[:, None] * d_out + columns[None, :]
    tl.store(out_ptrs, product.to(out_ptr.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


@triton.jit
def grouped_outer_products(
    d_out_ptr,  # (n_rows, d_out), group by group
    rows_ptr,  # (n_rows, d_in)
    counts_ptr,  # (n_groups,) int64, contiguous
    d_weights_ptr,  # (n_groups, d_out, d_in), contiguous
    n_rows,
    n_groups,
    d_out,
    d_in,
    d_out_row_stride,
    d_out_stride,
    rows_row_stride,
    rows_stride,
    UPCAST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW_TILES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One tile (BLOCK_M, BLOCK_N) of d_out_e^T rows_e: the inner dimension is the group's rows. No rows give zeros."""
    tiles = tl.cdiv(d_out, BLOCK_M) * tl.cdiv(d_in, BLOCK_N)
    group = tl.program_id(0) // tiles
    row_tile, column_tile = tile_of(
        tl.program_id(0) % tiles, tl.cdiv(d_out, BLOCK_M), tl.cdiv(d_in, BLOCK_N), ROW_TILES
    )
    groups = tl.arange(0, GROUPS)
    counts = clamped_counts(counts_ptr, groups, n_groups, n_rows)
    first = tl.sum(tl.where(groups < group, counts, 0), axis=0)
    end = tl.minimum(first + tl.sum(tl.where(groups == group, counts, 0), axis=0), n_rows)
    rows = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = first + tl.arange(0, BLOCK_K)
    row_inside, column_inside = rows < d_out, columns < d_in
    product = tile_product(
        d_out_ptr + rows[:, None] * d_out_stride + inner[None, :] * d_out_row_stride,
        rows_ptr + inner[:, None] * rows_row_stride + columns[None, :] * rows_stride,
        row_inside,
        column_inside,
        end - first,
        d_out_row_stride,
        rows_row_stride,
        False,
        UPCAST,
        INPUT_PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    places = group.to(tl.int64) * d_out * d_in + rows[:, None] * d_in + columns[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    tl.store(d_weights_ptr + places, product.to(d_weights_ptr.dtype.element_ty), mask=inside)
