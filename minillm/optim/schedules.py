"""Learning-rate schedules: plain functions from the number of an update to a learning rate."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int, peak: float, minimum: float = 0.0) -> float:
    """Linear warm-up to `peak`, then half a cosine down to `minimum`.

        step <= warmup_steps:   peak * step / warmup_steps
        afterwards:             minimum + (peak - minimum) * (1 + cos(pi * progress)) / 2,
                                progress = (step - warmup_steps) / (total_steps - warmup_steps)

    Counting updates from 1, as `minillm.training.Trainer` does, the first one already moves the parameters, update
    `warmup_steps` is the first at the peak and update `total_steps` is made at the minimum, which also holds after it.

    Args:
        step: number of the update, at least 0 (where the rate is 0 if there is a warm-up).
        warmup_steps: from 0 (no warm-up) to `total_steps`.
        total_steps: at least 1.
        peak: the highest rate, above 0.
        minimum: the last rate, from 0 to `peak`.

    Raises:
        ValueError: an argument outside its range.

    Source: Loshchilov and Hutter 2016, "SGDR", equation 5 (the cosine, without restarts); Goyal et al. 2017,
    "Accurate, Large Minibatch SGD", section 2.2 (gradual warm-up).
    """
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step!r}")
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps!r}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps must be from 0 to total_steps ({total_steps}), got {warmup_steps!r}")
    if not (math.isfinite(peak) and peak > 0):
        raise ValueError(f"peak must be a finite number above 0, got {peak!r}")
    if not 0 <= minimum <= peak:
        raise ValueError(f"minimum must be from 0 to peak ({peak}), got {minimum!r}")
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
