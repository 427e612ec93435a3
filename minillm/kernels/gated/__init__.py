"""SwiGLU and GeGLU in one kernel each: an activation of one half of a feed-forward layer gates the other."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from minillm.kernels.gated.launch import triton_gated
from minillm.kernels.gated.reference import geglu_reference, swiglu_reference
from minillm.kernels.runtime import Backend, choose_backend


def swiglu(gate: Tensor, up: Tensor, *, backend: Backend = "auto") -> Tensor:
    """``silu(gate) * up``, with ``silu(x) = x sigmoid(x)`` (Shazeer 2020, "GLU Variants Improve Transformer", eq. 6).

    In two steps ``silu(gate)`` is written, read again, and kept for the backward pass, beside ``gate`` and ``up``. The
    kernel reads two numbers and writes one, keeps ``gate`` and ``up`` only, and calculates the rest again on the way
    back. Its gradients have none of their own.

    Args:
        gate, up: of one shape and one floating-point dtype, any strides, such as the two halves of one projection.
        backend: "triton": the kernels. "torch": ``F.silu(gate) * up``, which rounds twice in half precision.
            "reference": the formula. See :func:`minillm.kernels.choose_backend`.

    Returns: as ``gate``, calculated in float32 (float64 for float64). Raises TypeError for dtypes and ValueError for
    shapes that are not these.
    """
    _check(gate, up)
    chosen = choose_backend(backend, gate, up)
    if chosen == "triton":
        y: Tensor = triton_gated(gate, up, "silu")
        return y
    return F.silu(gate) * up if chosen == "torch" else swiglu_reference(gate, up)


def geglu(
    gate: Tensor, up: Tensor, *, approximate: Literal["none", "tanh"] = "none", backend: Backend = "auto"
) -> Tensor:
    """``gelu(gate) * up`` (Shazeer 2020, eq. 6), kept and calculated as in :func:`swiglu`.

    Args:
        gate, up, backend: as in :func:`swiglu`; "torch" is ``F.gelu(gate) * up``.
        approximate: "none" for ``x Phi(x)`` through the error function; "tanh" for the approximation
            ``0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x**3)))`` (Hendrycks and Gimpel 2016, section 2).
    """
    _check(gate, up)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    chosen = choose_backend(backend, gate, up)
    if chosen == "triton":
        y: Tensor = triton_gated(gate, up, "gelu" if approximate == "none" else "gelu_tanh")
        return y
    if chosen == "torch":
        return F.gelu(gate, approximate=approximate) * up
    return geglu_reference(gate, up, approximate=approximate)


def _check(gate: Tensor, up: Tensor) -> None:
    if not gate.is_floating_point():
        raise TypeError(f"gate must be floating point, got {gate.dtype}")
    if up.dtype != gate.dtype:
        raise TypeError(f"up must be of the dtype of gate, {gate.dtype}, got {up.dtype}")
    if up.shape != gate.shape:
        raise ValueError(f"up must be of the shape of gate, {tuple(gate.shape)}, got {tuple(up.shape)}")
