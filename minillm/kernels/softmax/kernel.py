# mypy: ignore-errors
"""Softmax of one row a program. A row that fits is read once; a longer one twice, in blocks, by the online softmax."""

import triton
import triton.language as tl


@triton.jit
def softmax_forward(
    x_ptr,  # (n_rows, n_columns), columns side by side
    y_ptr,  # (n_rows, n_columns), contiguous
    x_stride,
    n_columns,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # n_columns <= BLOCK
    WIDE: tl.constexpr,  # tl.float32, or tl.float64 for float64
):
    row = tl.program_id(0).to(tl.int64)  # a row times its stride leaves int32 in a large matrix
    x_ptr += row * x_stride
    y_ptr += row * n_columns
    columns = tl.arange(0, BLOCK)  # (BLOCK,)
    if ONE_BLOCK:
        inside = columns < n_columns
        x = tl.load(x_ptr + columns, mask=inside, other=-float("inf")).to(WIDE)
        top = tl.max(x, 0)
        top = tl.where(top == -float("inf"), 0.0, top)  # a row of -inf: every exponential is 0, and no NaN
        exponentials = tl.exp(x - top)
        total = tl.sum(exponentials, 0)
        y = exponentials / tl.where(total == 0.0, 1.0, total)
        tl.store(y_ptr + columns, y.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        # Each lane keeps a maximum and a sum of its own; they are brought together once, after the loop.
        tops = tl.full((BLOCK,), -float("inf"), WIDE)
        totals = tl.zeros((BLOCK,), WIDE)
        for start in range(0, n_columns, BLOCK):
            x = tl.load(x_ptr + start + columns, mask=start + columns < n_columns, other=-float("inf")).to(WIDE)
            new_tops = tl.maximum(tops, x)
            base = tl.where(new_tops == -float("inf"), 0.0, new_tops)
            totals = totals * tl.exp(tops - base) + tl.exp(x - base)
            tops = new_tops
        top = tl.max(tops, 0)
        top = tl.where(top == -float("inf"), 0.0, top)
        total = tl.sum(totals * tl.exp(tops - top), 0)
        total = tl.where(total == 0.0, 1.0, total)
        for start in range(0, n_columns, BLOCK):
            inside = start + columns < n_columns
            x = tl.load(x_ptr + start + columns, mask=inside, other=-float("inf")).to(WIDE)
            tl.store(y_ptr + start + columns, (tl.exp(x - top) / total).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def softmax_backward(
    dy_ptr,  # (n_rows, n_columns), columns side by side
    y_ptr,  # (n_rows, n_columns), contiguous
    dx_ptr,  # (n_rows, n_columns), contiguous
    dy_stride,
    n_columns,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    # dx = y * (dy - sum(dy * y))
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * dy_stride
    y_ptr += row * n_columns
    dx_ptr += row * n_columns
    columns = tl.arange(0, BLOCK)  # (BLOCK,)
    if ONE_BLOCK:
        inside = columns < n_columns
        dy = tl.load(dy_ptr + columns, mask=inside, other=0.0).to(WIDE)
        y = tl.load(y_ptr + columns, mask=inside, other=0.0).to(WIDE)
        dx = y * (dy - tl.sum(dy * y, 0))
        tl.store(dx_ptr + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    else:
        products = tl.zeros((BLOCK,), WIDE)
        for start in range(0, n_columns, BLOCK):
            inside = start + columns < n_columns
            dy = tl.load(dy_ptr + start + columns, mask=inside, other=0.0).to(WIDE)
            products += dy * tl.load(y_ptr + start + columns, mask=inside, other=0.0).to(WIDE)
        product = tl.sum(products, 0)
        for start in range(0, n_columns, BLOCK):
            inside = start + columns < n_columns
            dy = tl.load(dy_ptr + start + columns, mask=inside, other=0.0).to(WIDE)
            y = tl.load(y_ptr + start + columns, mask=inside, other=0.0).to(WIDE)
            tl.store(dx_ptr + start + columns, (y * (dy - product)).to(dx_ptr.dtype.element_ty), mask=inside)
