# mypy: ignore-errors
"""The tiles of act(x weight^T + bias), and of the gradient before the activation."""

import triton
import triton.language as tl

from minillm.kernels.tile_product import tile_of, tile_product


@triton.jit
def sigmoid(x):
    small = tl.exp(-tl.abs(x))  # at most 1, where exp(-x) would overflow
    return tl.where(x < 0, small, 1.0) / (1.0 + small)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)  # NaN stays NaN, as in torch
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 1 + tanh(u) = 2 sigmoid(2 u)
        return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        return x * sigmoid(x)
    else:
        return x


@triton.jit
def activation_slope(x, ACTIVATION: tl.constexpr):
    """The activation's derivative at x. ReLU's depends on the sign only: its output may stand for x."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "gelu_tanh":
        s = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        s = sigmoid(x)
        return s * (1.0 + x * (1.0 - s))


@triton.jit
def bias_of(columns, bias_ptr, bias_stride, d_out, HAS_BIAS: tl.constexpr):
    """(1, n) float32."""
    bias = tl.zeros(columns.shape, tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns * bias_stride, mask=columns < d_out, other=0.0).to(tl.float32)
    return bias[None, :]


@triton.jit
def store_activated(
    before,  # (BLOCK_M, n): x weight^T + bias
    columns,  # (n,)
    rows,  # (BLOCK_M,)
    out_ptr,
    before_ptr,
    n_rows,
    d_out,
    ACTIVATION: tl.constexpr,
    KEEP_BEFORE: tl.constexpr,
):
    places = (rows * d_out)[:, None] + columns[None, :]
    inside = (rows < n_rows)[:, None] & (columns < d_out)[None, :]
    if KEEP_BEFORE:
        tl.store(before_ptr + places, before.to(before_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + places, activate(before, ACTIVATION).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def linear_activation_forward(
    x_ptr,  # (n_rows, d_in)
    weight_ptr,  # (d_out, d_in)
    bias_ptr,  # (d_out,), read with HAS_BIAS only
    out_ptr,  # (n_rows, d_out), contiguous
    before_ptr,  # (n_rows, d_out), contiguous: x weight^T + bias; written with KEEP_BEFORE only
    n_rows,
    d_out,
    d_in,
    x_row_stride,
    x_stride,
    weight_row_stride,
    weight_stride,
    bias_stride,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_BEFORE: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW_TILES: tl.constexpr,
):
    """One tile (BLOCK_M, BLOCK_N) of the result; bias and activation are applied while it is still in registers."""
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.cdiv(d_out, BLOCK_N), ROW_TILES)
    rows = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K).to(tl.int64)
    row_inside, column_inside = rows < n_rows, columns < d_out
    before = tile_product(
        x_ptr + rows[:, None] * x_row_stride + inner[None, :] * x_stride,
        weight_ptr + columns[None, :] * weight_row_stride + inner[:, None] * weight_stride,
        row_inside,
        column_inside,
        d_in,
        x_stride,
        weight_stride,
        EVEN_K,
        UPCAST,
        INPUT_PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if BLOCK_N <= 128:
        before += bias_of(columns, bias_ptr, bias_stride, d_out, HAS_BIAS)
        store_activated(before, columns, rows, out_ptr, before_ptr, n_rows, d_out, ACTIVATION, KEEP_BEFORE)
    else:  # half after half: for all columns at once there are not registers enough
        left, right = tl.split(tl.permute(tl.reshape(before, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        columns = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        left += bias_of(columns, bias_ptr, bias_stride, d_out, HAS_BIAS)
        store_activated(left, columns, rows, out_ptr, before_ptr, n_rows, d_out, ACTIVATION, KEEP_BEFORE)
        columns += BLOCK_N // 2
        right += bias_of(columns, bias_ptr, bias_stride, d_out, HAS_BIAS)
        store_activated(right, columns, rows, out_ptr, before_ptr, n_rows, d_out, ACTIVATION, KEEP_BEFORE)


@triton.jit
def activation_backward(
    d_out_ptr,  # (n_rows, d_out)
    kept_ptr,  # (n_rows, d_out), contiguous: the numbers before the activation, for ReLU those after it
    d_before_ptr,  # (n_rows, d_out), contiguous
    partial_ptr,  # (programs along the rows, d_out) float32: sums for the bias; written with HAS_BIAS only
    n_rows,
    d_out,
    rows_per_program,
    d_out_row_stride,
    d_out_stride,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """d_before = d_out * act'(before) for ``rows_per_program`` rows of BLOCK_N columns, and the sum over these rows."""
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_inside = columns < d_out
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, rows_per_program, BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        inside = (rows < n_rows)[:, None] & column_inside[None, :]
        places = rows[:, None] * d_out + columns[None, :]
        gradient_ptrs = d_out_ptr + rows[:, None] * d_out_row_stride + columns[None, :] * d_out_stride
        gradient = tl.load(gradient_ptrs, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
        kept = tl.load(kept_ptr + places, mask=inside, other=0.0).to(tl.float32)
        d_before = gradient * activation_slope(kept, ACTIVATION)
        tl.store(d_before_ptr + places, d_before.to(d_before_ptr.dtype.element_ty), mask=inside)
        if HAS_BIAS:
            total += tl.sum(d_before, axis=0)
    if HAS_BIAS:
        partial_ptrs = partial_ptr + tl.program_id(0).to(tl.int64) * d_out + columns
        tl.store(partial_ptrs, total, mask=column_inside)
