"""act(x weight^T + bias) in plain torch."""

import math
from typing import Literal

import torch
from torch import Tensor

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]


def activate(x: Tensor, activation: Activation | None) -> Tensor:
    """The activation's formula, element by element."""
    if activation == "relu":
        return x.clamp(min=0)
    if activation == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if activation == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if activation == "silu":
        return x * torch.sigmoid(x)
    return x


def linear_activation_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None
) -> Tensor:
    """The formula, in float32 at least; what the kernels must equal."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    before = x.to(dtype) @ weight.to(dtype).mT
    if bias is not None:
        before = before + bias.to(dtype)
    return activate(before, activation).to(x.dtype)
