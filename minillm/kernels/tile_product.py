# mypy: ignore-errors
"""What every matrix product here is made of: the order of the tiles, and the loop over the inner dimension."""

import triton
import triton.language as tl


@triton.jit
def tile_of(program, n_row_tiles, n_column_tiles, ROW_TILES: tl.constexpr):
    """Which tile of the result is ``program``'s: (row of tiles, column of tiles).

    Programs run roughly in the order of their numbers. ROW_TILES rows of tiles are done column by column before the
    next ones are begun: programs that run at the same time then share ROW_TILES tiles of one factor and few of the
    other, and most of what they read is still in the L2 cache.
    """
    programs = ROW_TILES * n_column_tiles
    first = program // programs * ROW_TILES
    high = tl.minimum(n_row_tiles - first, ROW_TILES)
    return first + program % programs % high, program % programs // high


@triton.jit
def tile_product(
    a_ptrs,  # (BLOCK_M, BLOCK_K), at the first BLOCK_K of the inner dimension
    b_ptrs,  # (BLOCK_K, BLOCK_N)
    a_inside,  # (BLOCK_M,): rows of a that exist
    b_inside,  # (BLOCK_N,): columns of b that exist
    depth,  # length of the inner dimension; 0 gives zeros
    a_stride,  # of a along the inner dimension
    b_stride,
    EVEN_K: tl.constexpr,  # BLOCK_K divides depth: nothing to mask along the inner dimension
    UPCAST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a b, (BLOCK_M, BLOCK_N) in float32."""
    inner = tl.arange(0, BLOCK_K)
    a_step = tl.full((), BLOCK_K, tl.int64) * a_stride
    b_step = tl.full((), BLOCK_K, tl.int64) * b_stride
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=a_inside[:, None], other=0.0)
            b = tl.load(b_ptrs, mask=b_inside[None, :], other=0.0)
        else:
            inner_inside = inner < depth - start
            a = tl.load(a_ptrs, mask=a_inside[:, None] & inner_inside[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=inner_inside[:, None] & b_inside[None, :], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        product = tl.dot(a, b, product, input_precision=INPUT_PRECISION)
        a_ptrs += a_step
        b_ptrs += b_step
    return product
