# mypy: ignore-errors
# fmt: off
"""FlashAttention-2, backward: D = rowsum(dO * O) - dlse, one number a query that both other kernels need."""

import triton
import triton.language as tl

from minillm.kernels.flash_attention.kernel_tiles import load_rows


@triton.jit
def flash_backward_delta(
    output_ptr,  # (batch, n_heads, query_length, HEAD_DIM); packed: (n_heads, total, HEAD_DIM), batch 1
    d_output_ptr,  # as output
    lse_ptr, d_lse_ptr, delta_ptr,  # (batch, n_heads, query_length), contiguous
    output_stride_b, output_stride_h, output_stride_m,
    d_output_stride_b, d_output_stride_h, d_output_stride_m,
    n_tiles, n_heads, query_length,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, WIDE: tl.constexpr,
):
    """D of a tile of queries; 0 for a query that sees no key."""
    tile = tl.program_id(0) % n_tiles
    batch_head = (tl.program_id(0) // n_tiles).to(tl.int64)
    batch, head = batch_head // n_heads, batch_head % n_heads
    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    columns = tl.arange(0, BLOCK_D)[None, :]  # (1, BLOCK_D)
    rows = queries[:, None].to(tl.int64)
    exist = queries < query_length
    output = load_rows(
        output_ptr + batch * output_stride_b + head * output_stride_h + rows * output_stride_m + columns,
        exist[:, None], columns, HEAD_DIM, BLOCK_D, True, False,
    ).to(WIDE)
    d_output = load_rows(
        d_output_ptr + batch * d_output_stride_b + head * d_output_stride_h + rows * d_output_stride_m + columns,
        exist[:, None], columns, HEAD_DIM, BLOCK_D, True, False,
    ).to(WIDE)
    places = batch_head * query_length + queries
    lse = tl.load(lse_ptr + places, mask=exist, other=0.0)
    d_lse = tl.load(d_lse_ptr + places, mask=exist, other=0.0)
    delta = tl.where(lse == -float("inf"), 0.0, tl.sum(output * d_output, 1) - d_lse)
    tl.store(delta_ptr + places, delta, mask=exist)
