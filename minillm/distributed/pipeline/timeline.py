"""What a schedule comes to in time: who did what and when, how much of it was waiting, and what was kept meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from minillm.distributed.pipeline.actions import Kind
from minillm.distributed.pipeline.schedule import Schedule
from minillm.distributed.simulator import Span


@dataclass(frozen=True)
class Timeline:
    """The result of `simulate`.

    Attributes:
        spans: of each pass and update, on the lane "compute", named like its action; and of each message that takes
            time, on the sender's lane "communication". `minillm.plots.timeline` draws them.
        n_stages: how many ranks there are.
        makespan: seconds from the start to the last end.
        busy: seconds in which each stage computed.
        peak_in_flight: by stage, the most activations that it kept at once, in micro-batches' worth of ``1 / n_stages``
            of the model: from a forward pass to the end of its backward pass, of the weights' half if it is split.
    """

    spans: tuple[Span, ...]
    n_stages: int
    makespan: float
    busy: tuple[float, ...]
    peak_in_flight: tuple[float, ...]

    @property
    def idle(self) -> tuple[float, ...]:
        """Seconds in which each stage did not compute, of the makespan."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def bubble(self) -> float:
        """The idle part of all stages' time, from 0 to 1."""
        return sum(self.idle) / (self.n_stages * self.makespan) if self.makespan else 0.0

    def __iter__(self) -> Iterator[Span]:
        return iter(self.spans)


def peak_in_flight(schedule: Schedule) -> tuple[float, ...]:
    """See `Timeline`: it depends on the order of passes alone, not on how long they take."""
    share = schedule.n_stages / schedule.n_pieces
    peaks = []
    for actions in schedule.actions:
        split = {(a.micro_batch, a.chunk) for a in actions if a.kind is Kind.BACKWARD_WEIGHT}
        kept = peak = 0
        for action in actions:
            if action.kind is Kind.FORWARD:
                kept += 1
                peak = max(peak, kept)
            elif action.kind is Kind.BACKWARD_WEIGHT:
                kept -= 1
            elif action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
                kept -= (action.micro_batch, action.chunk) not in split
        peaks.append(peak * share)
    return tuple(peaks)
