# mypy: ignore-errors
"""One step of AdamW: what takes a dozen operators is one pass over the four tensors."""

import triton
import triton.language as tl


@triton.jit
def adamw_update(
    parameter_ptr,  # (n,), changed
    gradient_ptr,  # (n,)
    exp_avg_ptr,  # (n,), changed
    exp_avg_sq_ptr,  # (n,), changed
    n,
    kept,  # 1 - lr * weight_decay
    new_share,  # 1 - beta1: calculated where numbers have 53 bits, not from a beta1 rounded to 24
    beta2,
    new_share_sq,  # 1 - beta2
    root_correction,  # 1 / sqrt(1 - beta2^step)
    step_size,  # lr / (1 - beta1^step)
    eps,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = at < n
    parameter = tl.load(parameter_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + at, mask=inside, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0).to(tl.float32)

    exp_avg += new_share * (gradient - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + new_share_sq * gradient * gradient
    root = tl.sqrt(exp_avg_sq) * root_correction + eps
    parameter = kept * parameter - step_size * exp_avg / tl.where(inside, root, 1.0)  # with eps = 0, not 0 / 0 beyond n

    tl.store(parameter_ptr + at, parameter.to(parameter_ptr.dtype.element_ty), mask=inside)
    tl.store(exp_avg_ptr + at, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask=inside)
