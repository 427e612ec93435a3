"""What the numbers of a schedule may be: refused with the reason and the nearest that will do."""

from __future__ import annotations


def check_sizes(name: str, **sizes: int) -> None:
    """Refuse what is not a number of things, of which there must be at least one.

    Args:
        name: of the schedule.
        sizes: argument -> what came for it.

    Raises:
        TypeError: a size that is no int.
        ValueError: one below 1.
    """
    for argument, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{argument} of {name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{argument} of {name} must be at least 1, got {value}; the nearest that will do is 1")


def check_multiple(name: str, argument: str, value: int, factor: int, reason: str) -> None:
    """Refuse a size that `factor` does not divide.

    Args:
        name: of the schedule.
        argument: which size it is.
        value: what came for it, at least 1.
        factor: what must divide it.
        reason: why, after "because".

    Raises:
        ValueError: `factor` does not divide `value`.
    """
    if value % factor:
        below = value // factor * factor
        nearest = " or ".join(str(size) for size in (below, below + factor) if size)
        raise ValueError(
            f"{argument} of {name} must be a multiple of {factor}, because {reason}; "
            f"got {value}, the nearest that will do: {nearest}"
        )
