# mypy: ignore-errors
"""Gated units, y = gate * p(gate) * up: p, between nothing and all, is how much of the gate is let through."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)) without an exponential that overflows."""
    small = tl.exp(-tl.abs(z))  # in (0, 1]
    return tl.where(z >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def let_through(x, ACTIVATION: tl.constexpr):
    """p(x), and its derivative."""
    if ACTIVATION == "silu":
        p = sigmoid(x)
        slope = p * (1.0 - p)
    elif ACTIVATION == "gelu":
        p = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)  # the normal distribution: x / sqrt(2) ...
        slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)  # ... and its density, over sqrt(2 pi)
    else:
        # (1 + tanh(u)) / 2 is sigmoid(2 u), here with u = sqrt(2 / pi) (x + 0.044715 x^3).
        p = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = p * (1.0 - p) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return p, slope


@triton.jit
def gated_forward(
    gate_ptr,  # (n_rows, n_columns), columns side by side
    up_ptr,  # (n_rows, n_columns), columns side by side
    y_ptr,  # (n_rows, n_columns), contiguous
    gate_stride,
    up_stride,
    n_columns,
    ACTIVATION: tl.constexpr,  # "silu", "gelu" or "gelu_tanh"
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,  # tl.float32, or tl.float64 for float64
):
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(n_columns, BLOCK)
    row = program // blocks
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = columns < n_columns
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(WIDE)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(WIDE)
    p, _ = let_through(gate, ACTIVATION)
    tl.store(y_ptr + row * n_columns + columns, (gate * p * up).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward(
    dy_ptr,  # (n_rows, n_columns), columns side by side
    gate_ptr,  # (n_rows, n_columns), columns side by side
    up_ptr,  # (n_rows, n_columns), columns side by side
    dgate_ptr,  # (n_rows, n_columns), contiguous
    dup_ptr,  # (n_rows, n_columns), contiguous
    dy_stride,
    gate_stride,
    up_stride,
    n_columns,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    # dup = dy * gate * p,  dgate = dy * up * (p + gate * p'): p is calculated again, which is cheaper than to keep it.
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(n_columns, BLOCK)
    row = program // blocks
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = columns < n_columns
    dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(WIDE)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(WIDE)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(WIDE)
    p, slope = let_through(gate, ACTIVATION)
    at = row * n_columns + columns
    tl.store(dup_ptr + at, (dy * gate * p).to(dup_ptr.dtype.element_ty), mask=inside)
    tl.store(dgate_ptr + at, (dy * up * (p + gate * slope)).to(dgate_ptr.dtype.element_ty), mask=inside)
