# mypy: ignore-errors
"""Tiles of logits that live in registers only: their log-sum-exp forward, their gradient backward."""

import triton
import triton.language as tl

from minillm.kernels.cross_entropy.kernel import logit_gradient, soft_cap
from minillm.kernels.tile_product import tile_of, tile_product


@triton.jit
def logits_tile(
    x_ptr,  # (n_rows, d_model), d_model side by side
    weight_ptr,  # (n_classes, d_model), d_model side by side
    bias_ptr,  # (n_classes,), with HAS_BIAS
    rows,  # (BLOCK_M,)
    columns,  # (BLOCK_N,)
    n_rows,
    n_classes,
    d_model,
    x_stride,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N), float32; of no meaning outside of the matrix."""
    inner = tl.arange(0, BLOCK_K)
    z = tile_product(
        x_ptr + rows[:, None].to(tl.int64) * x_stride + inner[None, :],
        weight_ptr + columns[None, :].to(tl.int64) * weight_stride + inner[:, None],
        rows < n_rows,
        columns < n_classes,
        d_model,
        1,
        1,
        EVEN_K,
        UPCAST,
        "ieee",
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=columns < n_classes, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP != 0.0:
        z = soft_cap(z, SOFTCAP)
    return z


@triton.jit
def linear_lse(
    x_ptr,  # (n_rows, d_model)
    weight_ptr,  # (n_classes, d_model)
    bias_ptr,  # (n_classes,)
    targets_ptr,  # (n_rows,), int64
    lse_ptr,  # (n_splits, n_rows), float32: of this program's part of the classes
    picked_ptr,  # (n_splits, n_rows), float32: the target's logit, where it is in this part, otherwise 0
    sum_ptr,  # (n_splits, n_rows), float32: sum of this part's logits, with SUM
    n_rows,
    n_classes,
    d_model,
    x_stride,
    weight_stride,
    targets_stride,
    n_splits,
    SUM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs with neighbouring numbers run at the same time: they take other rows and the same classes, so that the
    # large matrix, the weight, is read from memory about once.
    n_row_tiles = tl.cdiv(n_rows, BLOCK_M)
    rows = tl.program_id(0) % n_row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    split = tl.program_id(0) // n_row_tiles
    part = tl.cdiv(tl.cdiv(n_classes, BLOCK_N), n_splits) * BLOCK_N
    end = tl.minimum(split * part + part, n_classes)
    targets = tl.load(targets_ptr + rows.to(tl.int64) * targets_stride, mask=rows < n_rows, other=-1)

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    picked = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(split * part, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        z = logits_tile(
            x_ptr,
            weight_ptr,
            bias_ptr,
            rows,
            columns,
            n_rows,
            n_classes,
            d_model,
            x_stride,
            weight_stride,
            HAS_BIAS,
            SOFTCAP,
            EVEN_K,
            UPCAST,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        picked += tl.sum(tl.where(columns[None, :] == targets[:, None], z, 0.0), 1)
        inside = (columns < n_classes)[None, :]
        if SUM:
            sums += tl.sum(tl.where(inside, z, 0.0), 1)
        z = tl.where(inside, z, -float("inf"))
        new_top = tl.maximum(top, tl.max(z, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # only -inf so far: -inf - (-inf) would be NaN
        total = total * tl.exp(top - base) + tl.sum(tl.exp(z - base[:, None]), 1)
        top = new_top

    at = split.to(tl.int64) * n_rows + rows
    tl.store(lse_ptr + at, tl.where(top == -float("inf"), top, top + tl.log(total)), mask=rows < n_rows)
    tl.store(picked_ptr + at, picked, mask=rows < n_rows)
    if SUM:
        tl.store(sum_ptr + at, sums, mask=rows < n_rows)


@triton.jit
def linear_dlogits(
    dlosses_ptr,  # (n_rows,), float32
    x_ptr,  # (n_rows, d_model)
    weight_ptr,  # (n_classes, d_model)
    bias_ptr,  # (n_classes,)
    targets_ptr,  # (n_rows,), int64
    lse_ptr,  # (n_rows,), float32
    dlogits_ptr,  # (n_rows, n_classes), contiguous
    n_rows,
    n_classes,
    d_model,
    dlosses_stride,  # 0 under a mean: one number for all rows
    x_stride,
    weight_stride,
    targets_stride,
    ignore_index,
    LABEL_SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW_TILES: tl.constexpr,
):
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_classes, BLOCK_N), ROW_TILES)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    z = logits_tile(
        x_ptr,
        weight_ptr,
        bias_ptr,
        rows,
        columns,
        n_rows,
        n_classes,
        d_model,
        x_stride,
        weight_stride,
        HAS_BIAS,
        SOFTCAP,
        EVEN_K,
        UPCAST,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    row_exists = rows < n_rows
    targets = tl.load(targets_ptr + rows.to(tl.int64) * targets_stride, mask=row_exists, other=0)
    lse = tl.load(lse_ptr + rows, mask=row_exists, other=0.0)
    dlosses = tl.load(dlosses_ptr + rows.to(tl.int64) * dlosses_stride, mask=row_exists, other=0.0)
    ignored = targets == ignore_index
    dlosses = tl.where((targets >= 0) & (targets < n_classes) | ignored, dlosses, float("nan"))
    is_target = columns[None, :] == targets[:, None]
    dz = logit_gradient(z, lse[:, None], is_target, n_classes, LABEL_SMOOTHING, Z_LOSS, SOFTCAP, tl.float32)
    dz = tl.where(ignored[:, None], 0.0, dz * dlosses[:, None])
    tl.store(
        dlogits_ptr + rows[:, None].to(tl.int64) * n_classes + columns[None, :],
        dz.to(dlogits_ptr.dtype.element_ty),
        mask=row_exists[:, None] & (columns < n_classes)[None, :],
    )
