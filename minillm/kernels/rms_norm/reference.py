"""RMSNorm in plain PyTorch: what the kernel must equal."""

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last dimension (Zhang and Sennrich 2019, eq. 4).

    The statistics are taken in float32 (float64 for float64); the scaled row is rounded to the dtype of ``x`` and only
    then multiplied by the weight, as published models do it. The product has the wider of the two dtypes.
    """
    wide = x if x.dtype is torch.float64 else x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)
