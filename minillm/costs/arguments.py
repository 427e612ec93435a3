"""Checks of the numbers that closed forms are given."""


def at_least(least: int, **values: int) -> None:
    """Raise ValueError, naming the argument, unless every one of ``values`` is ``least`` or more."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
