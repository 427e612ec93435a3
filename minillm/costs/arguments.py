"""Checks of the numbers that closed forms are given."""

import math
from collections.abc import Collection


def at_least(least: int, **values: float) -> None:
    """Raise ValueError, naming the argument, unless every one of ``values`` is ``least`` or more."""
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def positive(**values: float) -> None:
    """Raise ValueError, naming the argument, unless every one of ``values`` is above 0 and finite."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def one_of(allowed: Collection[object], **values: object) -> None:
    """Raise ValueError, naming the argument, unless every one of ``values`` is among ``allowed``."""
    for name, value in values.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
