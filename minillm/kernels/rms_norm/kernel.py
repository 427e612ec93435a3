# mypy: ignore-errors
"""RMSNorm of a few rows a program, and its gradient: a program walks over rows and sums its share of the weight's."""

import triton
import triton.language as tl


@triton.jit
def load_row(x_ptr, residual_ptr, offsets, residual_offsets, inside, ADD: tl.constexpr, WIDE: tl.constexpr):
    """What is normed: x, or x + residual rounded as it leaves the kernel."""
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(WIDE)
    if ADD:
        x += tl.load(residual_ptr + residual_offsets, mask=inside, other=0.0).to(WIDE)
    return x.to(x_ptr.dtype.element_ty)


@triton.jit
def rms_norm_forward(
    x_ptr,  # (n_rows, n_columns), columns side by side
    residual_ptr,  # (n_rows, n_columns), columns side by side; None unless ADD
    weight_ptr,  # (n_columns,)
    y_ptr,  # (n_rows, n_columns), contiguous
    summed_ptr,  # (n_rows, n_columns), contiguous; None unless ADD
    rstd_ptr,  # (n_rows,)
    x_stride,
    residual_stride,
    n_rows,
    n_columns,
    EPS: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # n_columns <= COLUMNS
    WIDE: tl.constexpr,  # tl.float32, or tl.float64 for float64
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    columns = tl.arange(0, COLUMNS)[None, :]  # (1, COLUMNS)
    here = rows < n_rows
    x_at, residual_at, y_at = rows * x_stride, rows * residual_stride, rows * n_columns
    if ONE_BLOCK:
        inside = here & (columns < n_columns)
        x = load_row(x_ptr, residual_ptr, x_at + columns, residual_at + columns, inside, ADD, WIDE)
        if ADD:
            tl.store(summed_ptr + y_at + columns, x, mask=inside)
        x = x.to(WIDE)
        rstd = tl.rsqrt(tl.sum(x * x, 1)[:, None] / n_columns + EPS)  # (ROWS, 1)
        scaled = (x * rstd).to(x_ptr.dtype.element_ty).to(WIDE)  # rounded before the weight, as in the reference
        weight = tl.load(weight_ptr + columns, mask=columns < n_columns, other=0.0).to(WIDE)
        tl.store(y_ptr + y_at + columns, (scaled * weight).to(y_ptr.dtype.element_ty), mask=inside)
    else:
        squares = tl.zeros((ROWS, COLUMNS), WIDE)
        for start in range(0, n_columns, COLUMNS):
            at = start + columns
            inside = here & (at < n_columns)
            x = load_row(x_ptr, residual_ptr, x_at + at, residual_at + at, inside, ADD, WIDE)
            if ADD:
                tl.store(summed_ptr + y_at + at, x, mask=inside)
            squares += x.to(WIDE) * x.to(WIDE)
        rstd = tl.rsqrt(tl.sum(squares, 1)[:, None] / n_columns + EPS)
        for start in range(0, n_columns, COLUMNS):
            at = start + columns
            inside = here & (at < n_columns)
            x = load_row(x_ptr, residual_ptr, x_at + at, residual_at + at, inside, ADD, WIDE)
            scaled = (x.to(WIDE) * rstd).to(x_ptr.dtype.element_ty).to(WIDE)
            weight = tl.load(weight_ptr + at, mask=at < n_columns, other=0.0).to(WIDE)
            tl.store(y_ptr + y_at + at, (scaled * weight).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + rows, rstd, mask=here)


@triton.jit
def rms_norm_row_products(
    dy_ptr,  # (n_rows, n_columns), columns side by side
    x_ptr,  # (n_rows, n_columns), columns side by side
    weight_ptr,  # (n_columns,)
    rstd_ptr,  # (n_rows,)
    product_ptr,  # (n_rows,): mean(dy * weight * x) * rstd, for rows longer than a block
    dy_stride,
    x_stride,
    n_columns,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)  # (COLUMNS,)
    products = tl.zeros((COLUMNS,), WIDE)
    for start in range(0, n_columns, COLUMNS):
        at = start + columns
        inside = at < n_columns
        dy = tl.load(dy_ptr + row * dy_stride + at, mask=inside, other=0.0).to(WIDE)
        x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0).to(WIDE)
        products += dy * x * tl.load(weight_ptr + at, mask=inside, other=0.0).to(WIDE)
    tl.store(product_ptr + row, tl.sum(products, 0) / n_columns * tl.load(rstd_ptr + row))


@triton.jit
def rms_norm_backward(
    dy_ptr,  # (n_rows, n_columns), columns side by side
    dsummed_ptr,  # (n_rows, n_columns), columns side by side: the gradient that comes past the norm; None unless ADD
    x_ptr,  # (n_rows, n_columns), columns side by side
    weight_ptr,  # (n_columns,)
    rstd_ptr,  # (n_rows,)
    product_ptr,  # (n_rows,), from rms_norm_row_products; None if ONE_BLOCK
    dx_ptr,  # (n_rows, n_columns), contiguous
    dweight_ptr,  # (programs, n_columns), contiguous: the sum over the rows of one program
    dy_stride,
    dsummed_stride,
    x_stride,
    n_rows,
    n_columns,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    # With n = x * rstd and g = dy * weight:  dx = rstd * (g - n * mean(g * n)),  dweight = sum over rows of dy * n.
    program = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]  # (1, COLUMNS)
    weight = tl.load(weight_ptr + columns, mask=columns < n_columns, other=0.0).to(WIDE)
    dweight = tl.zeros((ROWS, COLUMNS), WIDE)
    for first_row in range(program * ROWS, n_rows, tl.num_programs(0) * ROWS):
        rows = first_row + tl.arange(0, ROWS)[:, None].to(tl.int64)  # (ROWS, 1)
        here = rows < n_rows
        inside = here & (columns < n_columns)
        rstd = tl.load(rstd_ptr + rows, mask=here, other=0.0)
        dy = tl.load(dy_ptr + rows * dy_stride + columns, mask=inside, other=0.0).to(WIDE)
        normed = tl.load(x_ptr + rows * x_stride + columns, mask=inside, other=0.0).to(WIDE) * rstd
        weighted = dy * weight
        if ONE_BLOCK:
            product = tl.sum(weighted * normed, 1)[:, None] / n_columns
        else:
            product = tl.load(product_ptr + rows, mask=here, other=0.0)
        dx = rstd * (weighted - normed * product)
        if ADD:
            dx += tl.load(dsummed_ptr + rows * dsummed_stride + columns, mask=inside, other=0.0).to(WIDE)
        tl.store(dx_ptr + rows * n_columns + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += dy * normed
    at = program.to(tl.int64) * n_columns + columns
    tl.store(dweight_ptr + at, tl.sum(dweight, 0)[None, :], mask=columns < n_columns)
