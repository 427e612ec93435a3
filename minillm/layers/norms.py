"""Norms of the residual stream: LayerNorm (Ba et al. 2016, eq. 4) and RMSNorm (Zhang and Sennrich 2019, eq. 4)."""

import torch
from torch import Tensor, nn

from minillm.kernels.rms_norm.reference import rms_norm_reference

LayerNorm = nn.LayerNorm


class RMSNorm(nn.Module):
    """Divide by the root of the mean square, then scale: ``y = x / sqrt(mean(x**2) + eps) * weight``.

    Against LayerNorm it leaves out the mean and the shift: fewer operations, and no worse in practice
    (Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4; used by Llama).

    Args:
        d_model: size of the last dimension.
        eps: added under the root.

    Shape: (..., d_model) to (..., d_model), same dtype. The statistics are taken in float32 whatever the input's dtype
    (float64 stays float64): squares of bfloat16 values lose too much.
    """

    def __init__(self, d_model: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model must be at least 1, got {d_model}")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        if x.size(-1) != self.weight.size(0):
            raise ValueError(f"x must end in d_model={self.weight.size(0)}, got shape {tuple(x.shape)}")
        return rms_norm_reference(x, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.size(0)}, eps={self.eps}"
