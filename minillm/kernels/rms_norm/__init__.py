"""RMSNorm in one kernel, with the addition of the residual stream before it where there is one."""

from typing import overload

from torch import Tensor
from torch.nn import functional as F

from minillm.kernels.rms_norm.launch import triton_add_rms_norm, triton_rms_norm
from minillm.kernels.rms_norm.reference import rms_norm_reference
from minillm.kernels.rows import check_eps, check_row_parameter
from minillm.kernels.runtime import Backend, choose_backend


@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = ..., residual: None = ..., backend: Backend = ...
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = ..., residual: Tensor, backend: Backend = ...
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-5, residual: Tensor | None = None, backend: Backend = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """``y = x / sqrt(mean(x**2) + eps) * weight`` over the last dimension (Zhang and Sennrich 2019, eq. 4).

    With ``residual``, what is normed is ``x + residual``, as before every block of a transformer whose norms come
    first; the sum, which the residual stream carries on, is returned too. The kernel reads and writes each number once
    (rows of more than 16,384 are read twice) and keeps one number a row for the backward pass, which reads each number
    once again (twice above 8,192) and gives the same gradients bit for bit every time. The kernel's gradients have none
    of their own.

    Args:
        x: (..., n), floating point, any strides.
        weight: (n,); may be of another dtype, such as float32 beside a bfloat16 ``x``.
        eps: added under the root, at least 0.
        residual: of the shape and dtype of ``x``.
        backend: "triton": the kernels. "torch": ``F.rms_norm``, for a weight of the dtype of ``x``; in half precision
            it rounds only after the weight, so that the last bit may differ. "reference": the formula. See
            :func:`minillm.kernels.choose_backend`.

    Returns: ``y``, or ``(y, x + residual)``. The statistics are taken in float32 (float64 for float64), the scaled row
    is rounded to the dtype of ``x``, and ``y`` has the wider dtype of ``x`` and ``weight``.

    Raises TypeError for dtypes and ValueError for shapes and an ``eps`` that are not these.
    """
    check_row_parameter("weight", weight, x)
    check_eps(eps)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be of the shape and dtype of x, {tuple(x.shape)} {x.dtype}, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )
    tensors = (x, weight) if residual is None else (x, weight, residual)
    mixed = None
    if weight.dtype != x.dtype:
        mixed = f"F.rms_norm needs a weight of the dtype of x, got {weight.dtype} and {x.dtype}"
    chosen = choose_backend(backend, *tensors, torch_refuses=mixed)
    if chosen == "triton":
        if residual is None:
            y: Tensor = triton_rms_norm(x, weight, eps)[0]
            return y
        y, summed, _ = triton_add_rms_norm(x, residual, weight, eps)
        return y, summed
    summed = x if residual is None else x + residual
    if chosen == "torch":
        y = F.rms_norm(summed, weight.shape, weight, eps).to(x.dtype)  # under autocast on a GPU it is float32
    else:
        y = rms_norm_reference(summed, weight, eps=eps)
    return y if residual is None else (y, summed)
