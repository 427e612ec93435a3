"""What a simulation writes down."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """Bytes that went from one rank to another.

    A collective is logged by the ring's total: one message from each rank to its neighbour.

    Attributes:
        source, destination: ranks of the default group.
        n_bytes: how many bytes.
        operation: "send", "all_reduce", "all_gather", ...
        label: what for, from `annotate`.
        start, end: seconds on the virtual clock.
    """

    source: int
    destination: int
    n_bytes: int
    operation: str
    label: str
    start: float
    end: float


@dataclass(frozen=True)
class Span:
    """What one lane of a rank did from `start` to `end`, in seconds on the virtual clock.

    Lanes: "compute", "communication", "wait" (the rank stood still), and those that `start` is given.
    """

    rank: int
    lane: str
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class CallRecord:
    """A collective or a point-to-point call of one rank, as `subscribe` tells of it at the moment of the call.

    Attributes:
        operation: "all_reduce", "send", ...
        group_size, rank_in_group: of the group that it was called on.
        n_bytes: of the whole buffer: what an all-reduce holds, what an all-gather fills, what a send sends.
        bytes_sent: what this rank sends by the ring algorithm.
        label: what for, from `annotate`.
        dtype: as torch prints it.
    """

    operation: str
    group_size: int
    rank_in_group: int
    n_bytes: int
    bytes_sent: int
    label: str
    dtype: str
