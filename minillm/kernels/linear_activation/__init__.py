"""Linear map, bias and activation in one kernel: the product does not leave the chip in between."""

from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from minillm.kernels.autocast import autocast_dtype
from minillm.kernels.linear_activation.batch_norm import fold_batch_norm
from minillm.kernels.linear_activation.launch import triton_linear_activation
from minillm.kernels.linear_activation.reference import Activation, linear_activation_reference
from minillm.kernels.runtime import Backend, choose_backend

__all__ = ["fold_batch_norm", "linear_activation"]


def linear_activation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """``activation(x weight^T + bias)``.

    Done one after the other, the product writes its result, and the activation (and the bias too, where the product
    does not take it along) reads and writes it once more: for n_rows x d_out numbers of b bytes each such pass moves
    2 * n_rows * d_out * b bytes. The kernel adds the bias and applies the activation to a tile of the result while it
    is still in registers. A batch norm after the linear map disappears altogether, see :func:`fold_batch_norm`.

    For the gradient the kernel keeps, beside x and weight: for "gelu", "gelu_tanh" and "silu" the numbers before the
    activation (n_rows * d_out * b bytes, written in the same pass), for "relu" its output, which the next layer keeps
    anyway, for None nothing. In the backward pass d_out * activation'(before) and the bias's gradient are one kernel;
    the two products that remain are torch's.

    Args:
        x: (..., d_in), floating point, any strides.
        weight: (d_out, d_in), as ``nn.Linear`` has it, any strides (a transposed view too).
        bias: (d_out,) or None.
        activation: "relu", "gelu" (with the error function), "gelu_tanh" (its approximation), "silu", or None.
        backend: "triton": the kernel; not for float64. "torch": ``F.linear`` and then the activation, two kernels.
            "reference": the formula. See :func:`minillm.kernels.choose_backend`.

    Returns: (..., d_out) in the type of x, added up in float32 (float64 for float64); under autocast everything is
    brought to its type first, as ``F.linear`` does. Raises ValueError for shapes that do not fit and unknown names,
    TypeError for types that differ or are not floating point.
    """
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(f"activation must be one of {', '.join(get_args(Activation))} or None, got {activation!r}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be (d_out, d_in), got {tuple(weight.shape)}")
    d_out, d_in = weight.shape
    if x.dim() == 0 or x.size(-1) != d_in:
        raise ValueError(f"x must be (..., d_in={d_in}) for a weight {tuple(weight.shape)}, got {tuple(x.shape)}")
    if bias is not None and bias.shape != (d_out,):
        raise ValueError(f"bias must be (d_out={d_out},), got {tuple(bias.shape)}")
    tensors: tuple[Tensor, ...] = (x, weight) if bias is None else (x, weight, bias)
    dtype = autocast_dtype(*tensors)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        tensors = (x, weight) if bias is None else (x, weight, bias)
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if any(tensor.dtype is not x.dtype for tensor in tensors):
        raise TypeError(f"x, weight and bias must have one type, got {', '.join(str(t.dtype) for t in tensors)}")
    float64 = "the kernel multiplies float32, float16 and bfloat16, got float64" if x.dtype is torch.float64 else None
    chosen = choose_backend(backend, *tensors, triton_refuses=float64)
    if chosen == "triton":
        smooth = activation not in (None, "relu")
        keep_before = smooth and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        out: Tensor = triton_linear_activation(x, weight, bias, activation, keep_before)[0]
        return out
    if chosen == "reference":
        return linear_activation_reference(x, weight, bias, activation)
    out = F.linear(x, weight, bias)
    if activation == "relu":
        return F.relu(out)
    if activation == "silu":
        return F.silu(out)
    if activation is not None:
        return F.gelu(out, approximate="tanh" if activation == "gelu_tanh" else "none")
    return out
