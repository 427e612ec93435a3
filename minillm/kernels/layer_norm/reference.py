"""LayerNorm in plain PyTorch: what the kernel must equal."""

import torch
from torch import Tensor


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` over the last dimension (Ba et al. 2016, eq. 4).

    Computed in float32 (float64 for float64), rounded once to the dtype of ``x``.
    """
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    centred = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    return (normed if bias is None else normed + bias.to(wide)).to(x.dtype)
