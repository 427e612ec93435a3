"""Softmax over the last dimension, in plain torch."""

import torch
from torch import Tensor


def softmax_reference(x: Tensor) -> Tensor:
    """The formula, in float32 at least; what the kernels must equal."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    top = wide.detach().amax(-1, keepdim=True) if x.size(-1) else wide.new_zeros(*x.shape[:-1], 1)
    top = top.masked_fill(top == -torch.inf, 0.0)  # -inf - (-inf) would be NaN
    exponentials = (wide - top).exp()
    total = exponentials.sum(-1, keepdim=True)
    return (exponentials / total.masked_fill(total == 0, 1.0)).to(x.dtype)
