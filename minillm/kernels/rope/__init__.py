"""Rotary position embedding in one kernel: queries or keys are read once and written once."""

import torch
from torch import Tensor

from minillm.kernels.rope.launch import triton_rope
from minillm.kernels.rope.reference import rotate
from minillm.kernels.runtime import Backend, choose_backend


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, backend: Backend = "auto") -> Tensor:
    """Turn each pair of every head by the angle of its place (Su et al. 2021, "RoFormer", eq. 34).

    ``(a, b) -> (a cos - b sin, a sin + b cos)``. A pair is (x_i, x_{i + head_dim/2}), or (x_2i, x_{2i+1}) if
    interleaved. The gradient is turned back by the same angles; only they are kept for it, and it has a gradient again.

    Args:
        x: queries or keys (batch, heads, seq, head_dim), floating point, any strides; not changed.
        cos, sin: (seq, head_dim / 2), or (batch, seq, head_dim / 2) where every sequence has its own angles.
        backend: "triton": the kernel, for ``cos`` and ``sin`` that need no gradient. "torch": always refused, PyTorch
            has no such operator. "reference": the formula. See :func:`minillm.kernels.choose_backend`.

    Returns: as ``x``. The kernel calculates in float32 (float64 for float64), the reference in the wider of the dtypes
    of ``x`` and ``cos``.

    Raises TypeError for dtypes and ValueError for shapes that are not these.
    """
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if not isinstance(interleaved, bool):
        raise TypeError(f"interleaved must be True or False, got {interleaved!r}")
    if x.dim() != 4 or x.size(-1) < 2 or x.size(-1) % 2:
        raise ValueError(f"x must be (batch, heads, seq, head_dim) with an even head_dim, got shape {tuple(x.shape)}")
    batch, _, seq, head_dim = x.shape
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.shape not in ((seq, head_dim // 2), (batch, seq, head_dim // 2)) or angles.shape != cos.shape:
            raise ValueError(
                f"{name} must be ({seq}, {head_dim // 2}) or ({batch}, {seq}, {head_dim // 2}) for x "
                f"{tuple(x.shape)}, cos as sin, got {tuple(angles.shape)}"
            )
    learned = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    chosen = choose_backend(
        backend,
        x,
        cos,
        sin,
        triton_refuses="the kernel has no gradient for cos and sin, and one of them requires it" if learned else None,
        torch_refuses="PyTorch has no operator for rotary embeddings",
    )
    if chosen == "triton":
        y: Tensor = triton_rope(x, cos, sin, interleaved, False)
        return y
    return rotate(x, cos.unsqueeze(-3), sin.unsqueeze(-3), interleaved=interleaved)
