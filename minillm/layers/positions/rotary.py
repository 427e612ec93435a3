"""Rotary position embeddings (RoPE): queries and keys turned by an angle that grows with their position."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minillm.layers.positions.rope_scaling import RopeScaling


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn each pair of ``x`` (..., head_dim) by its angle; ``cos`` and ``sin`` broadcast to (..., head_dim / 2).

    ``(a, b) -> (a cos - b sin, a sin + b cos)``. A pair is (x_i, x_{i + head_dim/2}), or (x_2i, x_{2i+1}) if
    interleaved. Computed in the wider of the dtypes of ``x`` and ``cos``, returned in that of ``x``.
    """
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al. 2021, "RoFormer", eq. 34): queries and keys turned by position.

    Pair ``i`` of a head at position ``p`` is turned by ``p * base**(-2i / head_dim)``; the product of a turned query
    and a turned key then depends on their distance only.

    Args:
        head_dim: size of a head, even.
        base: sets the longest wavelength, ``2 pi base``.
        interleaved: pair neighbours (the paper; GPT-J) instead of the two halves of a head (GPT-NeoX, Llama in
        transformers).
        scaling: None, :class:`LinearScaling` or :class:`Llama3Scaling`.
    """

    inverse_frequency: Tensor

    def __init__(
        self, head_dim: int, *, base: float = 10000.0, interleaved: bool = False, scaling: RopeScaling | None = None
    ) -> None:
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be an even number of at least 2 for rotary embeddings, got {head_dim}")
        if not base > 0:
            raise ValueError(f"base must be positive, got {base}")
        if scaling is not None and not isinstance(scaling, RopeScaling):
            raise TypeError(f"scaling must be None, LinearScaling or Llama3Scaling, got {scaling!r}")
        self.head_dim, self.base, self.interleaved, self.scaling = head_dim, float(base), interleaved, scaling
        self.register_buffer("inverse_frequency", self._frequencies(None), persistent=False)

    def _frequencies(self, device: torch.device | None) -> Tensor:
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device=device).float() / self.head_dim
        frequencies = 1.0 / self.base**exponent
        return frequencies if self.scaling is None else self.scaling(frequencies)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        # module.to(bfloat16) would round the angles of far positions to nonsense, and to_empty() would leave rubbish:
        # so the frequencies follow the module to its device, but are always these float32 numbers.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.inverse_frequency = self._frequencies(self.inverse_frequency.device)
        return self

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles, float32: positions (...) to twice (..., head_dim / 2)."""
        angles = positions.to(torch.float32).unsqueeze(-1) * self.inverse_frequency
        return angles.cos(), angles.sin()

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn ``x`` (batch, heads, seq, head_dim) at integer ``positions`` (seq,) or (batch, seq)."""
        if x.dim() != 4 or x.size(-1) != self.head_dim:
            raise ValueError(f"x must be (batch, heads, seq, head_dim={self.head_dim}), got shape {tuple(x.shape)}")
        if positions.shape not in ((x.size(2),), (x.size(0), x.size(2))):
            raise ValueError(
                f"positions must be (seq,) or (batch, seq) of x {tuple(x.shape)}, got shape {tuple(positions.shape)}"
            )
        cos, sin = self.cos_sin(positions)
        if positions.dim() == 2:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return rotate(x, cos, sin, interleaved=self.interleaved)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base}, interleaved={self.interleaved}, scaling={self.scaling}"
