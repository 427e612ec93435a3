"""Integers and flags that a caller, or a file, gives: refused at the door, by name, if they are something else."""

from __future__ import annotations

from operator import index


def checked_integer(name: str, value: object, least: int = 0, most: int | None = None) -> int:
    """`value` as an int; it may be of any integer type, such as numpy's.

    Raises:
        TypeError: It is no integer, or a bool.
        ValueError: It is not from `least` to `most`.
    """
    try:
        number = index(value)  # type: ignore[arg-type]  # what is no integer is what it finds
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if number < least or (most is not None and number > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {allowed}, got {number}")
    return number


def checked_flag(name: str, value: object) -> bool:
    """`value`; TypeError unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value
