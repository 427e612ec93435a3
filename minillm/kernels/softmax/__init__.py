"""Softmax in one kernel: each number is read once and written once."""

from torch import Tensor

from minillm.kernels.runtime import Backend, choose_backend
from minillm.kernels.softmax.launch import triton_softmax
from minillm.kernels.softmax.reference import softmax_reference


def softmax(x: Tensor, *, backend: Backend = "auto") -> Tensor:
    """``exp(x - max) / sum(exp(x - max))`` over the last dimension; a row of -inf only gives zeros, not NaN.

    Written out in torch it goes through memory five times; the kernel reads and writes each number once (rows of more
    than 16,384 are read twice, by the online softmax of Milakov and Gimelshein 2018, section 3).

    Args:
        x: (..., n), floating point, any strides.
        backend: "triton": the kernels. "torch": ``torch.softmax``, with two more passes for rows of -inf. "reference":
            the formula. See :func:`minillm.kernels.choose_backend`.

    Returns: as ``x``; calculated in float32 (float64 for float64). Raises TypeError for integers, ValueError for a
    tensor without dimensions.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a single number")
    chosen = choose_backend(backend, x)
    if chosen == "triton":
        y: Tensor = triton_softmax(x)
        return y
    if chosen == "torch":
        empty = (x.detach() == -float("inf")).all(-1, keepdim=True)
        y = x.masked_fill(empty, 0.0).softmax(-1).to(x.dtype)  # under autocast on a GPU it is float32
        return y.masked_fill(empty, 0.0)
    return softmax_reference(x)
