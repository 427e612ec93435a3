"""What a training run came to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrainingResult:
    """Losses are in nats per token.

    Attributes:
        history: the lines of metrics, from step 1 on, those of earlier sittings included.
        step: updates made.
        interrupted: whether Ctrl-C ended the run before its last step.
        loss: mean training loss of the last line of metrics.
        validation_loss: of the last evaluation; None where there was none.
        bits_per_byte: the validation loss over the text's UTF-8 bytes, which does not depend on the tokenizer.
        unigram_entropy: the validation loss of a model that knows how often each token comes in the training text and
            nothing else: what a model that has learned anything is well below.
        entropy_floor: the exact entropy of the text's source, where it is known (the synthetic corpus).
        tokens, seconds: trained on, and spent on updates (without evaluation and writing).
        checkpoint: the newest one; None without a folder.
    """

    history: list[dict[str, Any]]
    step: int
    interrupted: bool
    loss: float | None
    validation_loss: float | None
    bits_per_byte: float | None
    tokens: int
    seconds: float
    checkpoint: Path | None = None
    unigram_entropy: float | None = None
    entropy_floor: float | None = None


def bits_per_byte(nats_per_token: float, n_tokens: int, n_bytes: int) -> float:
    """nats per token -> bits per byte of a text of `n_bytes` bytes that is cut into `n_tokens` tokens."""
    return nats_per_token * n_tokens / n_bytes / math.log(2)
