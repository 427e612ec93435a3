"""The virtual clock of a simulated rank. Outside of a simulation these functions do nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minillm.distributed.simulator.records import CallRecord
from minillm.distributed.simulator.scheduler import Event, Rank, current_rank


class Pending:
    """Work on another lane that may still be under way."""

    def __init__(self, rank: Rank | None, event: Event | None) -> None:
        self._rank, self._event = rank, event

    def wait(self) -> None:
        """Stand still until it is done."""
        if self._rank is not None and self._event is not None:
            self._rank.scheduler.wait(self._rank, self._event)


def start(seconds: float, *, name: str, lane: str) -> Pending:
    """Begin work that runs beside this rank's own: on a copy engine, on the host's cores.

    It begins when the lane has done what it was given before, and not before now.

    Args:
        seconds: how long it takes, at least 0.
        name: what the timeline calls it.
        lane: which lane of this rank's.

    Returns:
        A handle: `wait()` stands still until it is done.

    Raises:
        ValueError: a time that is negative or not finite.
    """
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"seconds must be a finite number of at least 0, got {seconds}")
    rank = current_rank()
    if rank is None:
        return Pending(None, None)
    begin = max(rank.clock, rank.lanes.get(lane, 0.0))
    event = Event(name, lambda: name)
    event.end = rank.lanes[lane] = begin + seconds
    rank.scheduler.span(rank, lane, name, begin, event.end)
    return Pending(rank, event)


def compute(seconds: float | None = None, *, flops: float | None = None, name: str = "compute") -> None:
    """Let this rank work for a time, given in seconds or in floating-point operations.

    Args:
        seconds: at least 0; or
        flops: counted at the `flops_per_second` of `simulate_ranks`.
        name: what the timeline calls it.

    Raises:
        ValueError: both or neither are given, a negative one, or FLOPs where no speed is known.
    """
    if (seconds is None) == (flops is None):
        raise ValueError(f"compute takes either seconds or flops, got seconds={seconds} and flops={flops}")
    rank = current_rank()
    if rank is None:
        return
    if seconds is None:
        assert flops is not None
        if rank.flops_per_second is None:
            raise ValueError("compute(flops=...) needs simulate_ranks(..., flops_per_second=...)")
        seconds = flops / rank.flops_per_second
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"the work of compute must be finite and at least 0, got {seconds} seconds")
    rank.scheduler.span(rank, "compute", name, rank.clock, rank.clock + seconds)
    rank.clock += seconds


def now() -> float:
    """Seconds on this rank's virtual clock; outside of a simulation those of `time.perf_counter`."""
    rank = current_rank()
    return time.perf_counter() if rank is None else rank.clock


def is_simulated() -> bool:
    """Whether the calling thread is a simulated rank."""
    return current_rank() is not None


@contextmanager
def subscribe(listener: Callable[[CallRecord], None]) -> Iterator[None]:
    """While this is open, call `listener` at each collective, send and receive of this simulated rank.

    Raises:
        RuntimeError: the calling thread is no simulated rank.
    """
    rank = current_rank()
    if rank is None:
        raise RuntimeError("subscribe works on simulated ranks only: call it within minillm.distributed.simulate_ranks")
    rank.listeners.append(listener)
    try:
        yield
    finally:
        rank.listeners.remove(listener)
