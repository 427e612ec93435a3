"""Checks of single numbers and switches, which many layers share; each error names the argument."""

import math


def at_least(name: str, value: int, minimum: int) -> None:
    """Raise TypeError unless ``value`` is an integer, ValueError unless it lies between ``minimum`` and 2**31."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if value > 2**31:  # so that no product of two leaves int64
        raise ValueError(f"{name} must be at most 2**31, got {value}")


def non_negative(name: str, value: float) -> None:
    """Raise TypeError unless ``value`` is a number, ValueError unless it is at least 0 and finite."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")


def true_or_false(name: str, value: bool) -> None:
    """Raise TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
