"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

PRECISIONS = ("auto", "fp32", "bf16")
_SETTINGS_OF_AN_UPDATE = (
    "learning_rate",
    "min_learning_rate",
    "warmup_steps",
    "weight_decay",
    "betas",
    "grad_clip",
    "gradient_accumulation_steps",
    "precision",
)


@dataclass(frozen=True)
class TrainingConfig:
    """How a `Trainer` trains. Steps are updates of the parameters.

    Args:
        max_steps: updates in all, at least 1.
        learning_rate: the peak of the schedule (`minillm.optim.warmup_cosine`), above 0.
        min_learning_rate: where the cosine ends; None takes a tenth of the peak, as Hoffmann et al. 2022 do.
        warmup_steps: updates of linear warm-up; None takes 2 % of `max_steps`.
        weight_decay: AdamW's, for matrices only (`minillm.optim.parameter_groups`).
        betas: AdamW's. (0.9, 0.95) is what Brown et al. 2020, appendix B, train GPT-3 with.
        grad_clip: the largest norm of the whole gradient (Pascanu et al. 2012, section 3.2); None does not clip.
        gradient_accumulation_steps: batches whose gradients make up one update.
        eval_every: steps between evaluations on the validation data; None evaluates at the end only.
        eval_batches: validation batches in an evaluation; None takes the whole split.
        checkpoint_every: steps between checkpoints; None writes one at the end only.
        keep_checkpoints: how many of the newest checkpoints stay.
        log_every: steps between lines of metrics.
        precision: "fp32", "bf16" (autocast: matrix products in bfloat16, parameters and sums in float32), or "auto",
            which is bf16 where the device computes it faster (see `minillm.training.precision`).
        compile: put the model through `torch.compile`; its first step takes a minute and the later ones less time.
        device: "auto" (CUDA if there is one, else Apple's MPS, else the CPU), or a PyTorch device such as "cuda:1".
        seed: of dropout.

    Raises:
        ValueError, TypeError: a value outside its range or of another type, by name.
    """

    max_steps: int = 1000
    learning_rate: float = 1e-3
    min_learning_rate: float | None = None
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float | None = 1.0
    gradient_accumulation_steps: int = 1
    eval_every: int | None = 200
    eval_batches: int | None = 20
    checkpoint_every: int | None = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    precision: str = "auto"
    compile: bool = False
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "gradient_accumulation_steps", "keep_checkpoints", "log_every"):
            self._check_integer(name, 1)
        for name in ("eval_every", "eval_batches", "checkpoint_every"):
            self._check_integer(name, 1, optional=True)
        self._check_integer("seed", 0, 2**64 - 1)
        self._check_integer("warmup_steps", 0, self.max_steps, optional=True)
        self._check_number("learning_rate", above=0.0)
        self._check_number("min_learning_rate", at_least=0.0, at_most=self.learning_rate, optional=True)
        self._check_number("weight_decay", at_least=0.0)
        self._check_number("grad_clip", above=0.0, optional=True)
        betas = tuple(self.betas) if isinstance(self.betas, (list, tuple)) else ()
        if len(betas) != 2 or not all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        object.__setattr__(self, "betas", betas)
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if not isinstance(self.compile, bool):
            raise TypeError(f"compile must be true or false, got {self.compile!r}")
        if not isinstance(self.device, str):
            raise TypeError(f"device must be a string such as 'auto', 'cpu' or 'cuda', got {self.device!r}")

    @property
    def warmup(self) -> int:
        """The updates of warm-up, with the default worked out."""
        return self.max_steps // 50 if self.warmup_steps is None else self.warmup_steps

    @property
    def final_learning_rate(self) -> float:
        """Where the cosine ends, with the default worked out."""
        return self.learning_rate / 10 if self.min_learning_rate is None else self.min_learning_rate

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingConfig:
        """The other way round; ValueError for a name that is not a setting."""
        allowed = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(allowed))
        if unknown:
            raise ValueError(f"unknown training settings {', '.join(unknown)}; allowed: {', '.join(allowed)}")
        return cls(**values)

    def changed_updates(self, before: dict[str, Any]) -> list[str]:
        """What makes an update another one than under the settings `before` (a `to_dict`): "betas [..] -> [..]"."""
        now = self.to_dict()
        return [
            f"{name} {before[name]!r} -> {now[name]!r}" for name in _SETTINGS_OF_AN_UPDATE if before[name] != now[name]
        ]

    def _check_integer(self, name: str, low: int, high: int | None = None, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        wanted = f"at least {low}" if high is None else f"from {low} to {high}"
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer {wanted}{' or None' if optional else ''}, got {value!r}")
        if value < low or (high is not None and value > high):
            raise ValueError(f"{name} must be {wanted}, got {value!r}")

    def _check_number(
        self,
        name: str,
        *,
        above: float = -math.inf,
        at_least: float = -math.inf,
        at_most: float = math.inf,
        optional: bool = False,
    ) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number{' or None' if optional else ''}, got {value!r}")
        wanted = [
            text
            for bound, text in (
                (above, f"above {above}"),
                (at_least, f"at least {at_least}"),
                (at_most, f"at most {at_most}"),
            )
            if math.isfinite(bound)
        ]
        if not (math.isfinite(value) and above < value and at_least <= value <= at_most):
            raise ValueError(f"{name} must be a finite number {' and '.join(wanted)}, got {value!r}")
