"""LayerNorm in one kernel: each number is read once and written once."""

from torch import Tensor
from torch.nn import functional as F

from minillm.kernels.layer_norm.launch import triton_layer_norm
from minillm.kernels.layer_norm.reference import layer_norm_reference
from minillm.kernels.rows import check_eps, check_row_parameter
from minillm.kernels.runtime import Backend, choose_backend


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5, backend: Backend = "auto"
) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` over the last dimension (Ba et al. 2016, eq. 4).

    The kernel reads and writes each number once (rows of more than 16,384 are read three times) and keeps two numbers a
    row for the backward pass, which reads each number once again (twice above 8,192) and gives the same gradients bit
    for bit every time. These gradients have none of their own.

    Args:
        x: (..., n), floating point, any strides.
        weight: (n,); may be of another dtype, such as float32 beside a bfloat16 ``x``.
        bias: (n,), likewise; None adds nothing.
        eps: added under the root, at least 0.
        backend: "triton": the kernels. "torch": ``F.layer_norm``, for a weight and a bias of the dtype of ``x``.
            "reference": the formula. See :func:`minillm.kernels.choose_backend`.

    Returns: of the shape and dtype of ``x``; calculated in float32 (float64 for float64) and rounded once.

    Raises TypeError for dtypes and ValueError for shapes and an ``eps`` that are not these.
    """
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    torch_refuses = None
    for name, parameter in parameters.items():
        check_row_parameter(name, parameter, x)
        if parameter.dtype != x.dtype:
            torch_refuses = f"F.layer_norm needs a {name} of the dtype of x, got {parameter.dtype} and {x.dtype}"
    check_eps(eps)
    chosen = choose_backend(backend, x, *parameters.values(), torch_refuses=torch_refuses)
    if chosen == "triton":
        y: Tensor = triton_layer_norm(x, weight, bias, eps)[0]
        return y
    if chosen == "torch":
        return F.layer_norm(x, weight.shape, weight, bias, eps).to(x.dtype)  # under autocast on a GPU it is float32
    return layer_norm_reference(x, weight, bias, eps=eps)
