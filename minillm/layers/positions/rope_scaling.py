"""How rotary embeddings trained on short texts are made to fit longer ones: scalings of their frequencies.

All of them slow the pairs of a head by between 1 and ``factor``; they differ in which pairs pay:

=================  ====================  ====================
scaling            the fastest pair      the slowest pair
=================  ====================  ====================
linear             slowed by factor      slowed by factor
NTK-aware          kept                  slowed by factor
YaRN, Llama 3      kept (and its         slowed by factor
                   neighbours)           (and its neighbours)
=================  ====================  ====================

A scaling is called with the frequencies (head_dim / 2,), radians a token, fastest first, and their ``base``; its
``attention_scale`` multiplies cosines and sines, and so enters every score squared.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023, eq. 4): rotations slowed by ``factor``, as if tokens were closer."""

    factor: float
    kind: str = "linear"

    def __post_init__(self) -> None:
        _check_factor(self)
        _check_kind(self, "linear")

    @property
    def attention_scale(self) -> float:
        return 1.0

    def __call__(self, frequencies: Tensor, base: float) -> Tensor:
        return frequencies / self.factor


@dataclass(frozen=True)
class NTKScaling:
    """NTK-aware scaling (bloc97 2023; Peng et al. 2023, section 3.1): a larger base, so that slow pairs slow down more.

    ``base * factor**(d / (d - 2))`` for head_dim ``d`` slows pair ``i`` by ``factor**(2i / (d - 2))``: the fastest not
    at all, the slowest by ``factor`` exactly.

    This is the static form. The dynamic one takes ``factor = max(1, length / original length)``, anew for the length of
    each text, which leaves short texts alone. With a key-value cache that is awkward: the base would move with every
    token, and the keys that are kept were turned by the base of their own day. Either all of them are turned again at
    every step, or queries and keys disagree (transformers' ``rope_type="dynamic"`` lets them). For a text of known
    length, give that text's factor here.
    """

    factor: float
    kind: str = "ntk"

    def __post_init__(self) -> None:
        _check_factor(self)
        _check_kind(self, "ntk")

    @property
    def attention_scale(self) -> float:
        return 1.0

    def scaled_base(self, base: float, head_dim: int) -> float:
        """The base of an unscaled embedding that is the same function; ValueError for a head_dim below 4."""
        if head_dim < 4:
            raise ValueError(
                f"head_dim must be at least 4 for NTKScaling (the formula divides by d - 2), got {head_dim}"
            )
        scaled: float = base * self.factor ** (head_dim / (head_dim - 2))
        return scaled

    def __call__(self, frequencies: Tensor, base: float) -> Tensor:
        n_pairs = frequencies.numel()
        pair = torch.arange(n_pairs, dtype=frequencies.dtype, device=frequencies.device)
        slower = self.scaled_base(base, 2 * n_pairs) / base
        return frequencies / slower ** (pair / n_pairs)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, "NTK-by-parts" and eq. 22): fast pairs stay, slow ones are slowed, a ramp lies between.

    A pair that turns at least ``beta_fast`` times within ``original_context_length`` is kept, one that turns at most
    ``beta_slow`` times is slowed by ``factor``. The paper draws the ramp between them over the number of turns; its
    authors' code, and with it every published YaRN model and transformers, draws it over the index of the pair. So does
    this. The longer softmax is sharpened by the paper's eq. 22: ``attention_scale = 0.1 ln(factor) + 1``.

    Args:
        factor: the new context length over the original one.
        original_context_length: tokens, in training.
        beta_fast, beta_slow: turns at the two ends of the ramp.
        attention_factor: the attention scale, if it is not that of eq. 22.
        truncate: let the ramp begin and end at whole pairs, rounded outwards, as transformers does unless told not to.
    """

    factor: float
    original_context_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    kind: str = "yarn"

    def __post_init__(self) -> None:
        _check_factor(self)
        _check_kind(self, "yarn")
        _check_original_context_length(self)
        if not 0 < _number(self, "beta_slow") < _number(self, "beta_fast") < math.inf:
            raise ValueError(
                f"beta_slow must be positive and below beta_fast, got beta_slow={self.beta_slow}, "
                f"beta_fast={self.beta_fast}"
            )
        if self.attention_factor is not None and not 0 < _number(self, "attention_factor") < math.inf:
            raise ValueError(f"attention_factor must be None or positive, got {self.attention_factor}")
        if not isinstance(self.truncate, bool):
            raise TypeError(f"truncate must be True or False, got {self.truncate!r}")

    @property
    def attention_scale(self) -> float:
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else float(self.attention_factor)

    def __call__(self, frequencies: Tensor, base: float) -> Tensor:
        n_pairs = frequencies.numel()
        first, last = self._ramp(base, n_pairs)
        pair = torch.arange(n_pairs, dtype=frequencies.dtype, device=frequencies.device)
        slowed = ((pair - first) / (last - first)).clamp(0.0, 1.0)
        return (1 - slowed) * frequencies + slowed * frequencies / self.factor

    def _ramp(self, base: float, n_pairs: int) -> tuple[float, float]:
        """The pairs, counted in fractions, that turn beta_fast and beta_slow times: where the ramp begins and ends."""
        if not base > 1:
            raise ValueError(f"base must be above 1 for YarnScaling (pairs must differ in speed), got {base}")
        first, last = (
            n_pairs * math.log(self.original_context_length / (2 * math.pi * turns)) / math.log(base)
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        # The bound of the end is transformers' too: twice as far as there are pairs. A ramp of no width is a step.
        first, last = max(first, 0), min(last, 2 * n_pairs - 1)
        return first, max(last, first + 0.001)


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
        _check_factor(self)
        _check_kind(self, "llama3")
        _check_original_context_length(self)
        if not 0 < _number(self, "low_freq_factor") < _number(self, "high_freq_factor") < math.inf:
            raise ValueError(
                "low_freq_factor must be positive and below high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )

    @property
    def attention_scale(self) -> float:
        return 1.0

    def __call__(self, frequencies: Tensor, base: float) -> Tensor:
        turns = self.original_context_length * frequencies / (2 * math.pi)  # in the original context
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


RopeScaling = LinearScaling | NTKScaling | YarnScaling | Llama3Scaling
ROPE_SCALINGS: dict[str, type[RopeScaling]] = {
    "linear": LinearScaling,
    "ntk": NTKScaling,
    "yarn": YarnScaling,
    "llama3": Llama3Scaling,
}


def rope_scaling_from_dict(fields: dict[str, Any]) -> RopeScaling:
    """Build a scaling from its fields, among them ``kind``; ValueError for another kind, or other or too few fields."""
    kind = fields.get("kind")
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        raise ValueError(f"the kind of a RoPE scaling must be one of {sorted(ROPE_SCALINGS)}, got {kind!r}")
    known = dataclasses.fields(ROPE_SCALINGS[kind])
    unknown = set(fields) - {field.name for field in known}
    missing = {field.name for field in known if field.default is dataclasses.MISSING} - set(fields)
    if unknown or missing:
        raise ValueError(
            f"the fields of the RoPE scaling {kind!r} are {', '.join(field.name for field in known)}: "
            f"missing {sorted(missing)}, unknown {sorted(unknown)}"
        )
    return ROPE_SCALINGS[kind](**fields)


def _number(scaling: RopeScaling, name: str) -> float:
    value = getattr(scaling, name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value


def _check_factor(scaling: RopeScaling) -> None:
    if not 1 <= _number(scaling, "factor") < math.inf:
        raise ValueError(f"factor must be at least 1 and finite, got {scaling.factor}")


def _check_original_context_length(scaling: YarnScaling | Llama3Scaling) -> None:
    length = scaling.original_context_length
    if not isinstance(length, int) or isinstance(length, bool):
        raise TypeError(f"original_context_length must be an integer, got {length!r}")
    if length < 1:
        raise ValueError(f"original_context_length must be at least 1, got {length}")


def _check_kind(scaling: RopeScaling, expected: str) -> None:
    if scaling.kind != expected:
        raise ValueError(f"kind of a {type(scaling).__name__} must be {expected!r}, got {scaling.kind!r}")
