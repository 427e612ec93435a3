# mypy: ignore-errors
"""RoPE: each program turns some places of one head, both halves of a pair at once."""

import triton
import triton.language as tl


@triton.jit
def rope_rotate(
    x_ptr,  # (batch, heads, seq, 2 * half), any strides
    cos_ptr,  # (seq, half) or (batch, seq, half), contiguous
    sin_ptr,  # likewise
    y_ptr,  # (batch, heads, seq, 2 * half), any strides
    x_batch_stride,
    x_head_stride,
    x_seq_stride,
    x_column_stride,
    y_batch_stride,
    y_head_stride,
    y_seq_stride,
    y_column_stride,
    angles_batch_stride,  # seq * half, or 0 where all sequences share the angles
    n_heads,
    seq,
    half,
    INTERLEAVED: tl.constexpr,  # pairs of neighbours instead of halves
    INVERSE: tl.constexpr,  # by the negative angle: the way back, and the gradient
    SEQ: tl.constexpr,
    HALF: tl.constexpr,  # a power of two, at least half
    WIDE: tl.constexpr,  # tl.float32, or tl.float64 for float64
):
    program = tl.program_id(0).to(tl.int64)
    seq_blocks = tl.cdiv(seq, SEQ)
    places = program % seq_blocks * SEQ + tl.arange(0, SEQ)[:, None]  # (SEQ, 1)
    head = program // seq_blocks % n_heads
    batch = program // seq_blocks // n_heads
    pairs = tl.arange(0, HALF)[None, :]  # (1, HALF)
    inside = (places < seq) & (pairs < half)
    if INTERLEAVED:
        first, second = 2 * pairs, 2 * pairs + 1
    else:
        first, second = pairs, pairs + half

    angle_at = batch * angles_batch_stride + places * half + pairs
    cos = tl.load(cos_ptr + angle_at, mask=inside, other=0.0).to(WIDE)  # (SEQ, HALF)
    sin = tl.load(sin_ptr + angle_at, mask=inside, other=0.0).to(WIDE)
    if INVERSE:
        sin = -sin
    x_ptr += batch * x_batch_stride + head * x_head_stride + places * x_seq_stride
    a = tl.load(x_ptr + first * x_column_stride, mask=inside, other=0.0).to(WIDE)  # (SEQ, HALF)
    b = tl.load(x_ptr + second * x_column_stride, mask=inside, other=0.0).to(WIDE)
    y_ptr += batch * y_batch_stride + head * y_head_stride + places * y_seq_stride
    tl.store(y_ptr + first * y_column_stride, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + second * y_column_stride, (a * sin + b * cos).to(y_ptr.dtype.element_ty), mask=inside)
