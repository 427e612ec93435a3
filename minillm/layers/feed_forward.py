"""The position-wise feed-forward layer: the classic two matrices around a GELU, and SwiGLU's three."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """``down(gelu(up(x)))`` (Vaswani et al. 2017, eq. 2, with the GELU of Hendrycks and Gimpel 2016).

    Args:
        d_model: width of the residual stream.
        d_ff: width of the hidden layer.
        approximate: "none" for ``x * Phi(x)`` through the error function; "tanh" for the approximation that GPT-2 was
            trained with, ``0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x**3)))``.
        bias: whether the two linear maps have one.

    Shape: (..., d_model) to (..., d_model).
    """

    def __init__(
        self, d_model: int, d_ff: int, *, approximate: Literal["none", "tanh"] = "none", bias: bool = True
    ) -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
        self.approximate = approximate
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x), approximate=self.approximate))
        return out


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020, "GLU Variants Improve Transformer", eq. 6; used by Llama).

    Three matrices instead of two, so ``d_ff`` is usually 2/3 of what a :class:`FeedForward` would have. ``gate`` and
    ``up``
    stay two matrices: each is then column-parallel as it stands, which a fused one is not.

    Shape: (..., d_model) to (..., d_model).
    """

    def __init__(self, d_model: int, d_ff: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias=bias)
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


def feed_forward(d_model: int, d_ff: int, *, activation: str, bias: bool) -> FeedForward | SwiGLU:
    """The layer with that activation: "gelu", "gelu_tanh" or "swiglu"; ValueError naming these for another."""
    if activation == "swiglu":
        return SwiGLU(d_model, d_ff, bias=bias)
    if activation not in ("gelu", "gelu_tanh"):
        raise ValueError(f"activation must be one of gelu, gelu_tanh, swiglu, got {activation!r}")
    return FeedForward(d_model, d_ff, approximate="tanh" if activation == "gelu_tanh" else "none", bias=bias)
