"""A schedule on a clock: when each pass starts and ends, given how long passes and messages take.

Each stage goes through its list and waits for nothing but the message that a pass needs. The clock is that of
`simulate_ranks`: a schedule comes to the same times here, and there by the executor.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from minillm.distributed.pipeline.actions import Action, Kind
from minillm.distributed.pipeline.durations import Durations
from minillm.distributed.pipeline.routes import ScheduleError
from minillm.distributed.pipeline.schedule import Schedule
from minillm.distributed.pipeline.timeline import Timeline, peak_in_flight
from minillm.distributed.simulator import Span


def simulate(
    schedule: Schedule,
    *,
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] = 2.0,
    backward_input: float | Sequence[float] | None = None,
    backward_weight: float | Sequence[float] | None = None,
    update: float = 0.0,
    latency: float = 0.0,
    bandwidth: float = math.inf,
    message_bytes: float = 0.0,
) -> Timeline:
    """Run a schedule on a clock.

    Args:
        forward, backward, backward_input, backward_weight, update: seconds, see `Durations.of`: a number is what
            ``1 / n_stages`` of the model takes, a sequence what each piece takes; halves are half of `backward` each.
        latency, bandwidth, message_bytes: a message takes ``latency + message_bytes / bandwidth`` seconds (bytes per
            second). It starts when both ends have posted it, and the sender's and the receiver's port are free: each
            stage sends one message and receives one at a time, beside what it computes.

    Raises:
        ValueError: a time or a size that is negative or not a number.
        ScheduleError: the schedule gets stuck (`validate` says more).
    """
    for name, value in (("latency", latency), ("message_bytes", message_bytes)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be above 0, got {bandwidth}")
    durations = Durations.of(
        schedule,
        forward=forward,
        backward=backward,
        backward_input=backward_input,
        backward_weight=backward_weight,
        update=update,
    )
    run = _Run(schedule, durations, latency + message_bytes / bandwidth)
    run.go()
    return Timeline(
        tuple(sorted(run.spans, key=lambda span: (span.start, span.rank, span.lane))),
        schedule.n_stages,
        max((span.end for span in run.spans), default=0.0),
        tuple(
            math.fsum(span.end - span.start for span in run.spans if span.rank == stage and span.lane == "compute")
            for stage in range(schedule.n_stages)
        ),
        peak_in_flight(schedule),
    )


class _Run:
    """The stages in the order of their clocks, as `simulate_ranks` hands on the turn."""

    def __init__(self, schedule: Schedule, durations: Durations, message_seconds: float) -> None:
        self._schedule, self._durations, self._seconds = schedule, durations, message_seconds
        self._position = [0] * schedule.n_stages
        self._posted: dict[tuple[int, Action], float] = {}  # (receiving stage, receive) -> when one end posted it
        self._arrival: dict[tuple[int, Action], float] = {}
        self._blocked: dict[tuple[int, Action], float] = {}  # a pass waits for it since
        self._port: dict[tuple[str, int], float] = {}
        self._turns = [(0.0, stage) for stage in range(schedule.n_stages)]
        self.spans: list[Span] = []

    def go(self) -> None:
        while self._turns:
            clock, stage = heapq.heappop(self._turns)
            if self._position[stage] < len(self._schedule.actions[stage]):
                self._turn(stage, clock, self._schedule.actions[stage][self._position[stage]])
        stuck = [
            f"stage {i} at {self._schedule.actions[i][position]}"
            for i, position in enumerate(self._position)
            if position < len(self._schedule.actions[i])
        ]
        if stuck:
            raise ScheduleError(f"{self._schedule.name} gets stuck: {', '.join(stuck)}")

    def _turn(self, stage: int, clock: float, action: Action) -> None:
        if action.kind.sends or action.kind.receives:
            self._post(stage, clock, action)
        elif (message := self._needs(stage, action)) is not None and message not in self._arrival:
            self._blocked[message] = clock
            return
        elif message is not None and self._arrival[message] > clock:
            heapq.heappush(self._turns, (self._arrival[message], stage))
            return
        else:
            start, clock = clock, clock + self._durations.seconds(stage, action)
            self.spans.append(Span(stage, "compute", str(action), start, clock))
        self._position[stage] += 1
        heapq.heappush(self._turns, (clock, stage))

    def _needs(self, stage: int, action: Action) -> tuple[int, Action] | None:
        """The message that a pass waits for; None: what it works on was made here, or is the batch."""
        if action.kind is Kind.FORWARD:
            receive = Action(Kind.RECV_FORWARD, action.micro_batch, action.chunk)
        elif action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
            receive = Action(Kind.RECV_BACKWARD, action.micro_batch, action.chunk)
        else:
            return None
        source = self._schedule.neighbour(stage, receive)
        return None if source is None or source[0] == stage else (stage, receive)

    def _post(self, stage: int, clock: float, action: Action) -> None:
        other = self._schedule.neighbour(stage, action)
        if other is None:
            raise ScheduleError(f"{action} on stage {stage}: there is nobody at the other end")
        if action.kind.sends:
            kind = Kind.RECV_FORWARD if action.kind is Kind.SEND_FORWARD else Kind.RECV_BACKWARD
            sender, receiver, receive = stage, other[0], Action(kind, action.micro_batch, other[1])
        else:
            sender, receiver, receive = other[0], stage, action
        message = receiver, receive
        if message not in self._posted:
            self._posted[message] = clock
            return
        ports = ("send", sender), ("receive", receiver)
        start = max(clock, self._posted[message], *(self._port.get(port, 0.0) for port in ports))
        end = self._arrival[message] = start + self._seconds
        self._port |= dict.fromkeys(ports, end)
        if self._seconds:
            self.spans.append(Span(sender, "communication", str(receive), start, end))
        if message in self._blocked:
            heapq.heappush(self._turns, (max(self._blocked.pop(message), end), receiver))
