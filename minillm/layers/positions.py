"""Where a token stands: learned absolute positions and rotary embeddings (RoPE) with their length scalings."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class LearnedPositions(nn.Module):
    """One trained vector for each position, added to the token embedding (Gehring et al. 2017; GPT-2, BERT).

    Args:
        context_length: number of positions.
        d_model: size of each vector.
    """

    def __init__(self, context_length: int, d_model: int) -> None:
        super().__init__()
        if context_length < 1 or d_model < 1:
            raise ValueError(f"context_length and d_model must be at least 1, got {context_length} and {d_model}")
        self.weight = nn.Parameter(torch.empty(context_length, d_model))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, positions: Tensor) -> Tensor:
        """Vectors for int64 ``positions`` of any shape: (...) to (..., d_model)."""
        try:
            return nn.functional.embedding(positions, self.weight)
        except IndexError:
            low, high = int(positions.min()), int(positions.max())
            raise ValueError(
                f"positions must be in [0, {self.weight.size(0)}) (context_length), got values from {low} to {high}"
            ) from None

    def span(self, start: int, length: int) -> Tensor:
        """Vectors of positions ``start .. start + length - 1``, (length, d_model): a slice, not a look-up."""
        if start < 0 or start + length > self.weight.size(0):
            raise ValueError(
                f"positions {start} to {start + length - 1} asked for, of {self.weight.size(0)} (context_length)"
            )
        return self.weight[start : start + length]

    def extra_repr(self) -> str:
        return f"context_length={self.weight.size(0)}, d_model={self.weight.size(1)}"


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023, eq. 4): rotations slowed by ``factor``, as if tokens were closer."""

    factor: float
    kind: str = "linear"

    def __post_init__(self) -> None:
        _at_least_one(self.factor, "factor")
        _kind(self, "linear")

    def __call__(self, frequencies: Tensor) -> Tensor:
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling (Grattafiori et al. 2024): slow rotations are slowed further, fast ones stay.

    A pair whose wavelength is below ``original_context_length / high_freq_factor`` turned often enough in training to
    be kept; above ``original_context_length / low_freq_factor`` it never went round once, and is interpolated.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192
    kind: str = "llama3"

    def __post_init__(self) -> None:
        _at_least_one(self.factor, "factor")
        _kind(self, "llama3")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "low_freq_factor must be positive and below high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )
        if self.original_context_length < 1:
            raise ValueError(f"original_context_length must be at least 1, got {self.original_context_length}")

    def __call__(self, frequencies: Tensor) -> Tensor:
        turns = self.original_context_length * frequencies / (2 * math.pi)  # in the original context
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


RopeScaling = LinearScaling | Llama3Scaling
ROPE_SCALINGS: dict[str, type[LinearScaling] | type[Llama3Scaling]] = {"linear": LinearScaling, "llama3": Llama3Scaling}


def rope_scaling_from_dict(fields: dict[str, Any]) -> RopeScaling:
    """Build a scaling from its fields, among them ``kind``: "linear" or "llama3"; ValueError for any other."""
    kind = fields.get("kind")
    if kind not in ROPE_SCALINGS:
        raise ValueError(f"the kind of a RoPE scaling must be one of {sorted(ROPE_SCALINGS)}, got {kind!r}")
    return ROPE_SCALINGS[kind](**fields)


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


def _at_least_one(value: float, name: str) -> None:
    if not value >= 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _kind(scaling: RopeScaling, expected: str) -> None:
    if scaling.kind != expected:
        raise ValueError(f"kind of a {type(scaling).__name__} must be {expected!r}, got {scaling.kind!r}")
