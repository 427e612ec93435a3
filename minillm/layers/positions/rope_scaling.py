"""How rotary embeddings trained on short texts are made to fit longer ones: scalings of their frequencies."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor


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


def _at_least_one(value: float, name: str) -> None:
    if not value >= 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _kind(scaling: RopeScaling, expected: str) -> None:
    if scaling.kind != expected:
        raise ValueError(f"kind of a {type(scaling).__name__} must be {expected!r}, got {scaling.kind!r}")
