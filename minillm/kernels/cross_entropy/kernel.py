# mypy: ignore-errors
"""Cross-entropy of one row a program: forward by the online softmax, one reading; backward from the kept lse."""

import triton
import triton.language as tl


@triton.jit
def soft_cap(z, SOFTCAP: tl.constexpr):
    # SOFTCAP * tanh(z / SOFTCAP): exact at both ends, where exp gives infinity or zero
    return SOFTCAP * (1.0 - 2.0 / (tl.exp(z * (2.0 / SOFTCAP)) + 1.0))


@triton.jit
def cross_entropy_forward(
    logits_ptr,  # (n_rows, n_classes), classes side by side
    targets_ptr,  # (n_rows,), int64
    losses_ptr,  # (n_rows,), WIDE
    lse_ptr,  # (n_rows,), WIDE
    row_stride,
    target_stride,
    n_classes,
    ignore_index,
    BLOCK: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,  # 0.0: none
    WIDE: tl.constexpr,  # tl.float32, or tl.float64 for float64
):
    row = tl.program_id(0).to(tl.int64)  # a row times its stride leaves int32 in a large matrix
    target = tl.load(targets_ptr + row * target_stride)
    if target == ignore_index:  # its logits need not be read
        tl.store(losses_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
    else:
        logits_ptr += row * row_stride
        columns = tl.arange(0, BLOCK)  # (BLOCK,)
        top = tl.full((), -float("inf"), WIDE)
        # One maximum for the row, but a sum for each lane: they are added once, after the loop.
        totals = tl.zeros((BLOCK,), WIDE)
        sums = tl.zeros((BLOCK,), WIDE)
        for start in range(0, n_classes, BLOCK):
            inside = start + columns < n_classes
            z = tl.load(logits_ptr + start + columns, mask=inside, other=-float("inf")).to(WIDE)
            if SOFTCAP != 0.0:
                z = tl.where(inside, soft_cap(z, SOFTCAP), -float("inf"))
            if LABEL_SMOOTHING != 0.0:
                sums += tl.where(inside, z, 0.0)
            new_top = tl.maximum(top, tl.max(z, 0))
            base = tl.where(new_top == -float("inf"), 0.0, new_top)  # only -inf so far: -inf - (-inf) would be NaN
            totals = totals * tl.exp(top - base) + tl.exp(z - base)
            top = new_top
        base = tl.where(top == -float("inf"), 0.0, top)
        lse = base + tl.log(tl.sum(totals, 0))

        is_class = (target >= 0) & (target < n_classes)
        picked = tl.load(logits_ptr + target, mask=is_class, other=float("nan")).to(WIDE)
        if SOFTCAP != 0.0:
            picked = soft_cap(picked, SOFTCAP)
        loss = lse - (1.0 - LABEL_SMOOTHING) * picked
        if LABEL_SMOOTHING != 0.0:
            loss -= LABEL_SMOOTHING * tl.sum(sums, 0) / n_classes
        if Z_LOSS != 0.0:
            loss += Z_LOSS * lse * lse
        tl.store(losses_ptr + row, tl.where(is_class, loss, float("nan")))
        tl.store(lse_ptr + row, lse)


@triton.jit
def logit_gradient(
    z,  # logits, after SOFTCAP
    lse,  # of their rows; broadcasts to z
    is_target,  # boolean, as z
    n_classes,
    LABEL_SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Of one row's loss: p (1 + 2 z_loss lse) - smoothing / n_classes - (1 - smoothing) [class = target]."""
    dz = tl.exp(z - lse)
    if Z_LOSS != 0.0:
        dz *= 1.0 + 2.0 * Z_LOSS * lse
    if LABEL_SMOOTHING != 0.0:
        dz -= tl.full((), LABEL_SMOOTHING, WIDE) / n_classes
    dz = tl.where(is_target, dz - (1.0 - LABEL_SMOOTHING), dz)
    if SOFTCAP != 0.0:
        dz *= 1.0 - (z / SOFTCAP) * (z / SOFTCAP)
    return dz


@triton.jit
def cross_entropy_backward(
    dlosses_ptr,  # (n_rows,), WIDE
    logits_ptr,  # (n_rows, n_classes), classes side by side
    targets_ptr,  # (n_rows,), int64
    lse_ptr,  # (n_rows,), WIDE
    dlogits_ptr,  # (n_rows, n_classes), contiguous
    dloss_stride,  # 0 under a mean: one number for all rows
    row_stride,
    target_stride,
    n_classes,
    ignore_index,
    BLOCK: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = columns < n_classes
    dlogits_ptr += row * n_classes
    target = tl.load(targets_ptr + row * target_stride)
    if target == ignore_index:
        tl.store(dlogits_ptr + columns, tl.zeros((BLOCK,), dlogits_ptr.dtype.element_ty), mask=inside)
    else:
        lse = tl.load(lse_ptr + row)
        dloss = tl.load(dlosses_ptr + row * dloss_stride)
        dloss = tl.where((target >= 0) & (target < n_classes), dloss, float("nan"))
        z = tl.load(logits_ptr + row * row_stride + columns, mask=inside, other=0.0).to(WIDE)
        if SOFTCAP != 0.0:
            z = soft_cap(z, SOFTCAP)
        dz = logit_gradient(z, lse, columns == target, n_classes, LABEL_SMOOTHING, Z_LOSS, SOFTCAP, WIDE)
        tl.store(dlogits_ptr + columns, (dz * dloss).to(dlogits_ptr.dtype.element_ty), mask=inside)
