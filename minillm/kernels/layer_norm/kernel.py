# mypy: ignore-errors
"""LayerNorm of a few rows a program, and its gradient: a program walks over rows and sums up weight and bias."""

import triton
import triton.language as tl


@triton.jit
def scale_and_shift(normed, weight_ptr, bias_ptr, columns, n_columns, SHIFT: tl.constexpr, WIDE: tl.constexpr):
    """normed * weight, plus the bias where there is one."""
    inside = columns < n_columns
    y = normed * tl.load(weight_ptr + columns, mask=inside, other=0.0).to(WIDE)
    if SHIFT:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(WIDE)
    return y


@triton.jit
def layer_norm_forward(
    x_ptr,  # (n_rows, n_columns), columns side by side
    weight_ptr,  # (n_columns,)
    bias_ptr,  # (n_columns,); None unless SHIFT
    y_ptr,  # (n_rows, n_columns), contiguous
    mean_ptr,  # (n_rows,)
    rstd_ptr,  # (n_rows,)
    x_stride,
    n_rows,
    n_columns,
    EPS: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # n_columns <= COLUMNS
    WIDE: tl.constexpr,  # tl.float32, or tl.float64 for float64
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    columns = tl.arange(0, COLUMNS)[None, :]  # (1, COLUMNS)
    here = rows < n_rows
    if ONE_BLOCK:
        inside = here & (columns < n_columns)
        x = tl.load(x_ptr + rows * x_stride + columns, mask=inside, other=0.0).to(WIDE)
        mean = tl.sum(x, 1)[:, None] / n_columns  # (ROWS, 1)
        centred = tl.where(inside, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / n_columns + EPS)
        y = scale_and_shift(centred * rstd, weight_ptr, bias_ptr, columns, n_columns, SHIFT, WIDE)
        tl.store(y_ptr + rows * n_columns + columns, y.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        # The mean first and the squares of what is left after it: mean(x**2) - mean**2 would cancel.
        total = tl.zeros((ROWS, COLUMNS), WIDE)
        for start in range(0, n_columns, COLUMNS):
            at = start + columns
            total += tl.load(x_ptr + rows * x_stride + at, mask=here & (at < n_columns), other=0.0).to(WIDE)
        mean = tl.sum(total, 1)[:, None] / n_columns
        squares = tl.zeros((ROWS, COLUMNS), WIDE)
        for start in range(0, n_columns, COLUMNS):
            at = start + columns
            inside = here & (at < n_columns)
            x = tl.load(x_ptr + rows * x_stride + at, mask=inside, other=0.0).to(WIDE)
            centred = tl.where(inside, x - mean, 0.0)
            squares += centred * centred
        rstd = tl.rsqrt(tl.sum(squares, 1)[:, None] / n_columns + EPS)
        for start in range(0, n_columns, COLUMNS):
            at = start + columns
            inside = here & (at < n_columns)
            x = tl.load(x_ptr + rows * x_stride + at, mask=inside, other=0.0).to(WIDE)
            y = scale_and_shift((x - mean) * rstd, weight_ptr, bias_ptr, at, n_columns, SHIFT, WIDE)
            tl.store(y_ptr + rows * n_columns + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + rows, mean, mask=here)
    tl.store(rstd_ptr + rows, rstd, mask=here)


@triton.jit
def layer_norm_row_means(
    dy_ptr,  # (n_rows, n_columns), columns side by side
    x_ptr,  # (n_rows, n_columns), columns side by side
    weight_ptr,  # (n_columns,)
    mean_ptr,  # (n_rows,)
    rstd_ptr,  # (n_rows,)
    means_ptr,  # (2, n_rows): mean(g) and mean(g * n) as below, for rows longer than a block
    dy_stride,
    x_stride,
    n_rows,
    n_columns,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)  # (COLUMNS,)
    mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
    sums = tl.zeros((COLUMNS,), WIDE)
    products = tl.zeros((COLUMNS,), WIDE)
    for start in range(0, n_columns, COLUMNS):
        at = start + columns
        inside = at < n_columns
        dy = tl.load(dy_ptr + row * dy_stride + at, mask=inside, other=0.0).to(WIDE)
        weighted = dy * tl.load(weight_ptr + at, mask=inside, other=0.0).to(WIDE)
        x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0).to(WIDE)
        sums += weighted
        products += weighted * (x - mean) * rstd
    tl.store(means_ptr + row, tl.sum(sums, 0) / n_columns)
    tl.store(means_ptr + n_rows + row, tl.sum(products, 0) / n_columns)


@triton.jit
def layer_norm_backward(
    dy_ptr,  # (n_rows, n_columns), columns side by side
    x_ptr,  # (n_rows, n_columns), columns side by side
    weight_ptr,  # (n_columns,)
    mean_ptr,  # (n_rows,)
    rstd_ptr,  # (n_rows,)
    means_ptr,  # (2, n_rows), from layer_norm_row_means; None if ONE_BLOCK
    dx_ptr,  # (n_rows, n_columns), contiguous
    dweight_ptr,  # (programs, n_columns), contiguous: the sum over the rows of one program
    dbias_ptr,  # (programs, n_columns), contiguous, likewise; None unless SHIFT
    dy_stride,
    x_stride,
    n_rows,
    n_columns,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    # With n = (x - mean) * rstd and g = dy * weight:  dx = rstd * (g - mean(g) - n * mean(g * n)),
    # dweight = sum over rows of dy * n,  dbias = sum over rows of dy.
    program = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]  # (1, COLUMNS)
    weight = tl.load(weight_ptr + columns, mask=columns < n_columns, other=0.0).to(WIDE)
    dweight = tl.zeros((ROWS, COLUMNS), WIDE)
    dbias = tl.zeros((ROWS, COLUMNS), WIDE)
    for first_row in range(program * ROWS, n_rows, tl.num_programs(0) * ROWS):
        rows = first_row + tl.arange(0, ROWS)[:, None].to(tl.int64)  # (ROWS, 1)
        here = rows < n_rows
        inside = here & (columns < n_columns)
        mean = tl.load(mean_ptr + rows, mask=here, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=here, other=0.0)
        dy = tl.load(dy_ptr + rows * dy_stride + columns, mask=inside, other=0.0).to(WIDE)
        x = tl.load(x_ptr + rows * x_stride + columns, mask=inside, other=0.0).to(WIDE)
        normed = (x - mean) * rstd  # not 0 outside of the row, but dy is
        weighted = dy * weight
        if ONE_BLOCK:
            weighted_mean = tl.sum(weighted, 1)[:, None] / n_columns
            product = tl.sum(weighted * normed, 1)[:, None] / n_columns
        else:
            weighted_mean = tl.load(means_ptr + rows, mask=here, other=0.0)
            product = tl.load(means_ptr + n_rows + rows, mask=here, other=0.0)
        dx = rstd * (weighted - weighted_mean - normed * product)
        tl.store(dx_ptr + rows * n_columns + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += dy * normed
        if SHIFT:
            dbias += dy
    at = program.to(tl.int64) * n_columns + columns
    tl.store(dweight_ptr + at, tl.sum(dweight, 0)[None, :], mask=columns < n_columns)
    if SHIFT:
        tl.store(dbias_ptr + at, tl.sum(dbias, 0)[None, :], mask=columns < n_columns)
