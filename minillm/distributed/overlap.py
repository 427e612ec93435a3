"""How much communication hides behind computing: read off the timeline of a simulation."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from minillm.distributed.simulator import Span


@dataclass(frozen=True)
class Overlap:
    """Seconds of one rank, in which lanes are counted together: two messages at a time are one second a second.

    Attributes:
        rank: whose.
        compute, communication: in which it computes, in which something of its own is under way.
        hidden: in which both are so.
    """

    rank: int
    compute: float
    communication: float
    hidden: float

    @property
    def exposed(self) -> float:
        """Seconds of communication in which the rank does not compute: what communication costs the step at least."""
        return self.communication - self.hidden

    @property
    def fraction(self) -> float:
        """The share of communication that is hidden, 1 where there is none."""
        return self.hidden / self.communication if self.communication else 1.0


def overlap(
    timeline: Iterable[Span],
    *,
    lanes: Collection[str] = ("communication",),
    behind: Collection[str] = ("compute",),
) -> list[Overlap]:
    """Seconds of communication that are hidden behind computing, for each rank that has spans, in order of rank.

    Args:
        timeline: spans in any order; they may overlap one another.
        lanes: what is to be hidden: for ZeRO-Offload ("to host", "to device").
        behind: what it may hide behind.
    """
    spans = list(timeline)
    found = []
    for rank in sorted({span.rank for span in spans}):
        own = [span for span in spans if span.rank == rank]
        sent = _union((span.start, span.end) for span in own if span.lane in lanes)
        computed = _union((span.start, span.end) for span in own if span.lane in behind)
        hidden = sum(
            max(0.0, min(end, other_end) - max(start, other_start))
            for start, end in sent
            for other_start, other_end in computed
        )
        found.append(Overlap(rank, _length(computed), _length(sent), hidden))
    return found


def _union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same points in intervals that do not meet, in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _length(intervals: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)
