# mypy: ignore-errors
"""Attention of a few queries to a long cache: every piece of the cache is a program's, and a second kernel merges."""

import triton
import triton.language as tl


@triton.jit
def decode_splits(
    query_ptr,  # (batch, n_heads, n_new, HEAD_DIM)
    key_ptr,  # (batch, n_kv_heads, capacity, HEAD_DIM)
    value_ptr,  # (batch, n_kv_heads, capacity, HEAD_DIM)
    lengths_ptr,  # (batch,), with HAS_LENGTHS
    slopes_ptr,  # (n_heads,), float32, with HAS_SLOPES
    output_ptr,  # (n_splits, batch, n_heads, n_new, HEAD_DIM), contiguous: attention to this piece alone
    lse_ptr,  # (n_splits, batch, n_heads, n_new), contiguous, float32: logarithms to base 2
    query_stride_b,
    query_stride_h,
    query_stride_n,
    query_stride_d,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    key_stride_d,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    value_stride_d,
    lengths_stride,
    batch,
    n_kv_heads,
    group,  # query heads that share a key head
    n_new,
    capacity,
    window,  # with HAS_WINDOW
    scale,  # times log2(e): exponentials are powers of 2
    HAS_LENGTHS: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    LOG2_E: tl.constexpr = 1.4426950408889634
    # The queries of a whole group of heads read one key head: they are the rows of one product, at least 16 of them.
    sequence = tl.program_id(0) // n_kv_heads
    kv_head = tl.program_id(0) % n_kv_heads
    split = tl.program_id(2)
    n_splits = tl.num_programs(2)
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # (BLOCK_ROWS,)
    row_exists = rows < group * n_new
    heads = kv_head * group + rows // n_new
    new = rows % n_new
    dims = tl.arange(0, HEAD_DIM)

    length = capacity
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + sequence * lengths_stride).to(tl.int32)
        length = tl.minimum(tl.maximum(length, 0), capacity)
    places = length - n_new + new
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - n_new - window + 1, 0)  # no query sees a key before it
    # Pieces of whole blocks, as equal as can be, of what this very sequence has filled.
    piece = tl.cdiv(tl.cdiv(length - first, BLOCK_KEYS), n_splits) * BLOCK_KEYS
    start = first + split * piece
    end = tl.minimum(start + piece, length)

    query_ptrs = query_ptr + sequence.to(tl.int64) * query_stride_b
    query_ptrs += heads[:, None].to(tl.int64) * query_stride_h + new[:, None].to(tl.int64) * query_stride_n
    query = tl.load(query_ptrs + dims[None, :] * query_stride_d, mask=row_exists[:, None], other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    key_ptr += sequence.to(tl.int64) * key_stride_b + kv_head.to(tl.int64) * key_stride_h
    value_ptr += sequence.to(tl.int64) * value_stride_b + kv_head.to(tl.int64) * value_stride_h
    if HAS_SLOPES:
        slopes = tl.load(slopes_ptr + heads, mask=row_exists, other=0.0) * LOG2_E

    top = tl.full((BLOCK_ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    output = tl.zeros((BLOCK_ROWS, HEAD_DIM), tl.float32)
    for block in range(start, end, BLOCK_KEYS):
        keys = block + tl.arange(0, BLOCK_KEYS)  # (BLOCK_KEYS,)
        inside = keys < end
        key = tl.load(  # (BLOCK_KEYS, HEAD_DIM)
            key_ptr + keys[:, None].to(tl.int64) * key_stride_n + dims[None, :] * key_stride_d,
            mask=inside[:, None],
            other=0.0,
        )
        value = tl.load(  # (BLOCK_KEYS, HEAD_DIM)
            value_ptr + keys[:, None].to(tl.int64) * value_stride_n + dims[None, :] * value_stride_d,
            mask=inside[:, None],
            other=0.0,
        )
        if UPCAST:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale  # (BLOCK_ROWS, BLOCK_KEYS)
        distance = places[:, None] - keys[None, :]
        if HAS_SLOPES:
            scores -= slopes[:, None] * distance
        seen = inside[None, :] & (distance >= 0)
        if HAS_WINDOW:
            seen = seen & (distance < window)
        scores = tl.where(seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing seen so far: -inf - (-inf) would be NaN
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        output = tl.dot(weights.to(value.dtype), value, output * shrink[:, None], input_precision="ieee")
        top = new_top

    some = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, -float("inf"), top + tl.log2(some))
    row = ((split.to(tl.int64) * batch + sequence) * n_kv_heads * group + heads) * n_new + new  # (BLOCK_ROWS,)
    output_ptrs = output_ptr + row[:, None] * HEAD_DIM + dims[None, :]
    tl.store(output_ptrs, (output / some[:, None]).to(output_ptr.dtype.element_ty), mask=row_exists[:, None])
    tl.store(lse_ptr + row, lse, mask=row_exists)


@triton.jit
def merge_splits(
    partial_ptr,  # (n_splits, n_rows, HEAD_DIM), contiguous, float32
    lse_ptr,  # (n_splits, n_rows), contiguous, float32, base 2
    output_ptr,  # (n_rows, HEAD_DIM), contiguous
    n_rows,
    n_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,  # a power of two, n_splits or more
    SPLITS_AT_ONCE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, HEAD_DIM)
    splits = tl.arange(0, BLOCK_SPLITS)  # (BLOCK_SPLITS,)
    lses = tl.load(lse_ptr + splits.to(tl.int64) * n_rows + row, mask=splits < n_splits, other=-float("inf"))
    top = tl.max(lses, 0)
    top = tl.where(top == -float("inf"), 0.0, top)  # no piece has seen a key
    total = tl.sum(tl.exp2(lses - top), 0)
    output = tl.zeros((HEAD_DIM,), tl.float32)
    for start in range(0, n_splits, SPLITS_AT_ONCE):
        some = start + tl.arange(0, SPLITS_AT_ONCE)
        exists = some < n_splits
        at = some.to(tl.int64) * n_rows + row
        weights = tl.exp2(tl.load(lse_ptr + at, mask=exists, other=-float("inf")) - top)
        partial = tl.load(partial_ptr + at[:, None] * HEAD_DIM + dims[None, :], mask=exists[:, None], other=0.0)
        output += tl.sum(weights[:, None] * partial, 0)
    output /= tl.where(total == 0.0, 1.0, total)
    tl.store(output_ptr + row * HEAD_DIM + dims, output.to(output_ptr.dtype.element_ty))
