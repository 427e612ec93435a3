"""Rotary position embedding in plain PyTorch: what the kernel must equal."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn each pair of ``x`` (..., head_dim) by its angle; ``cos`` and ``sin`` broadcast to (..., head_dim / 2).

    ``(a, b) -> (a cos - b sin, a sin + b cos)``. A pair is (x_i, x_{i + head_dim/2}), or (x_2i, x_{2i+1}) if
    interleaved. Computed in the wider of the dtypes of ``x`` and ``cos``, returned in that of ``x``.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.to(x.dtype)
