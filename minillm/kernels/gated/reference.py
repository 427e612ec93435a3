"""SwiGLU and GeGLU in plain PyTorch: what the kernels must equal."""

import math
from typing import Literal

import torch
from torch import Tensor


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` with ``silu(x) = x sigmoid(x)``, in float32 (float64 for float64), rounded once."""
    wide = _wide(gate)
    return (wide * torch.sigmoid(wide) * _wide(up)).to(gate.dtype)


def geglu_reference(gate: Tensor, up: Tensor, *, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """``gelu(gate) * up``, in float32 (float64 for float64), rounded once.

    ``gelu(x) = x Phi(x)``, with "none" through the error function, ``Phi(x) = (1 + erf(x / sqrt(2))) / 2``, and with
    "tanh" ``Phi(x) = (1 + tanh(sqrt(2 / pi) (x + 0.044715 x**3))) / 2`` (Hendrycks and Gimpel 2016, section 2).
    """
    wide = _wide(gate)
    if approximate == "none":
        odds = torch.erf(wide / math.sqrt(2.0))
    else:
        odds = torch.tanh(math.sqrt(2.0 / math.pi) * (wide + 0.044715 * wide**3))
    return (0.5 * wide * (1.0 + odds) * _wide(up)).to(gate.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()
