"""A pipeline schedule as data: for each stage, what it does, in order.

The picture, the proof that it cannot get stuck, the simulator and the executor all read this one list. A new schedule
is a function that returns one, mostly by `schedule_of`: it says in which order each stage computes, and the sends and
receives are put in here.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from minillm.distributed.pipeline.actions import Action, Kind
from minillm.distributed.pipeline.routes import Place, Route, ScheduleError, check_routes, loop_route


@dataclass(frozen=True)
class Schedule:
    """What each stage of a pipeline does, in order.

    The model is cut into `n_pieces` pieces. A stage is one rank (one device); it holds one or several pieces, its
    chunks. A micro-batch passes the pieces in order along its route.

    Attributes:
        name: what people call it.
        actions: by stage, in order; sends and receives included.
        routes: the ways through the stages. One, mostly; with several (pipelines in two directions) the pieces that
            stand on more than one stage are copies whose gradients must be added up.
        route_of: by micro-batch, which of the routes it takes.
        stashing: whether a backward pass has the weights of its forward pass. False for the schedule that shows what
            happens otherwise.

    Raises:
        ScheduleError: routes that lead to no stage, or two pieces of the model in one place.
    """

    name: str
    actions: tuple[tuple[Action, ...], ...]
    routes: tuple[Route, ...]
    route_of: tuple[int, ...]
    stashing: bool = True

    def __post_init__(self) -> None:
        check_routes(self.name, self.n_stages, self.routes, self.route_of)

    @property
    def n_stages(self) -> int:
        """How many ranks."""
        return len(self.actions)

    @property
    def n_micro_batches(self) -> int:
        """How many micro-batches one run of the lists takes."""
        return len(self.route_of)

    @property
    def n_pieces(self) -> int:
        """How many pieces the model is cut into."""
        return len(self.routes[0])

    @cached_property
    def pieces(self) -> tuple[tuple[int, ...], ...]:
        """By stage and chunk, which piece of the model it is."""
        chunks: list[dict[int, int]] = [{} for _ in self.actions]
        for route in self.routes:
            for piece, (stage, chunk) in enumerate(route):
                chunks[stage][chunk] = piece
        return tuple(tuple(held[chunk] for chunk in sorted(held)) for held in chunks)

    @cached_property
    def synchronous(self) -> bool:
        """Whether all micro-batches see the same weights, and the optimizer's step comes when the lists have ended."""
        return not any(action.kind is Kind.UPDATE for stage in self.actions for action in stage)

    @cached_property
    def splits_backward(self) -> bool:
        """Whether backward passes come in two halves."""
        return any(action.kind is Kind.BACKWARD_INPUT for stage in self.actions for action in stage)

    def computes(self, stage: int) -> tuple[Action, ...]:
        """The passes and updates of a stage, without its messages."""
        return tuple(a for a in self.actions[stage] if a.kind.computes or a.kind is Kind.UPDATE)

    def piece(self, stage: int, chunk: int) -> int:
        """Which piece of the model a stage's chunk is."""
        return self.pieces[stage][chunk]

    def place(self, micro_batch: int, piece: int) -> Place:
        """(stage, chunk) where a micro-batch meets a piece of the model."""
        return self.routes[self.route_of[micro_batch]][piece]

    def neighbour(self, stage: int, action: Action) -> Place | None:
        """Where the other end of a message of this stage is, or, of a pass, where its result goes; None: nowhere.

        What is None: the loss, and the gradient of the model's input.
        """
        forward = action.kind in (Kind.FORWARD, Kind.SEND_FORWARD, Kind.RECV_BACKWARD)
        piece = self.piece(stage, action.chunk) + (1 if forward else -1)
        return self.place(action.micro_batch, piece) if 0 <= piece < self.n_pieces else None

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.n_stages} stages, {self.n_micro_batches} micro-batches"]
        lines += [f"stage {i}: {' '.join(map(str, self.computes(i)))}" for i in range(self.n_stages)]
        return "\n".join(lines)


def schedule_of(
    name: str,
    orders: Sequence[Sequence[Action | str]],
    *,
    n_micro_batches: int,
    routes: Sequence[Route] | None = None,
    route_of: Sequence[int] | None = None,
    stashing: bool = True,
) -> Schedule:
    """The schedule in which each stage computes in the given order, with the messages put in.

    A message is written into both lists where its sender starts to compute what it holds: all lists then follow one
    order of everything, so that no stage waits in a circle even if a send returns only when it is received, and what
    two stages exchange stands in the same order in both (which NCCL wants).

    Args:
        orders: by stage, passes and updates as `Action` or in their notation (``"F0"``).
        n_micro_batches: how many there are.
        routes: see `Schedule`; None is one loop through as many chunks as the orders name.
        route_of: see `Schedule`; None: all take the first.
        stashing: see `Schedule`.

    Raises:
        ScheduleError: the orders name places that are not there, or wait for each other in a circle. Whether the
            schedule is complete is for `validate` to say.
    """
    parsed = [[a if isinstance(a, Action) else Action.parse(a) for a in order] for order in orders]
    if not parsed or n_micro_batches < 1:
        raise ScheduleError(f"{name} needs at least 1 stage and 1 micro-batch, got {len(parsed)} and {n_micro_batches}")
    if route_of is not None and len(route_of) != n_micro_batches:
        raise ScheduleError(f"{name}: route_of is for {len(route_of)} micro-batches, and there are {n_micro_batches}")
    if routes is None:
        routes = [loop_route(len(parsed), 1 + max((a.chunk for order in parsed for a in order), default=0))]
    bare = Schedule(
        name,
        tuple(map(tuple, parsed)),
        tuple(routes),
        tuple(route_of) if route_of is not None else (0,) * n_micro_batches,
        stashing,
    )
    _check_places(bare)
    lists: list[list[Action]] = [[] for _ in parsed]
    for stage, action in _in_one_order(bare):
        lists[stage].append(action)
        if action.kind not in _MESSAGES:
            continue
        other = bare.neighbour(stage, action)
        if other is not None and other[0] != stage:
            send, receive = _MESSAGES[action.kind]
            lists[stage].append(Action(send, action.micro_batch, action.chunk))
            lists[other[0]].append(Action(receive, action.micro_batch, other[1]))
    return Schedule(name, tuple(map(tuple, lists)), bare.routes, bare.route_of, stashing)


_MESSAGES = {
    Kind.FORWARD: (Kind.SEND_FORWARD, Kind.RECV_FORWARD),
    Kind.BACKWARD: (Kind.SEND_BACKWARD, Kind.RECV_BACKWARD),
    Kind.BACKWARD_INPUT: (Kind.SEND_BACKWARD, Kind.RECV_BACKWARD),
}
_BACKWARDS = (Kind.BACKWARD, Kind.BACKWARD_INPUT)
_DURATIONS = {Kind.BACKWARD: 2, Kind.UPDATE: 0}  # in forward passes; what is not named takes one


def _check_places(schedule: Schedule) -> None:
    for stage, actions in enumerate(schedule.actions):
        for action in actions:
            if action.kind.sends or action.kind.receives:
                raise ScheduleError(f"{action} on stage {stage}: messages are put in here, orders hold none")
            if action.micro_batch >= schedule.n_micro_batches:
                raise ScheduleError(
                    f"{action} on stage {stage}: there are {schedule.n_micro_batches} micro-batches, counted from 0"
                )
            route = schedule.routes[schedule.route_of[action.micro_batch]]
            if (stage, action.chunk) not in route:
                raise ScheduleError(
                    f"{action} on stage {stage}: micro-batch {action.micro_batch} does not come to its chunk "
                    f"{action.chunk}; its route is {' '.join(f'{s}.{c}' for s, c in route)} (stage.chunk)"
                )


def dependencies(schedule: Schedule, stage: int, action: Action) -> list[tuple[Kind, int, int]]:
    """What must have ended before a pass of a stage: (kind, micro-batch, piece) of other passes.

    A kind BACKWARD stands for either way: whole, or the half for the input.
    """
    piece, m = schedule.piece(stage, action.chunk), action.micro_batch
    if action.kind is Kind.FORWARD:
        return [(Kind.FORWARD, m, piece - 1)] if piece else []
    if action.kind in _BACKWARDS:
        after = [(Kind.BACKWARD, m, piece + 1)] if piece + 1 < schedule.n_pieces else []
        return [(Kind.FORWARD, m, piece), *after]
    return [(Kind.BACKWARD, m, piece)] if action.kind is Kind.BACKWARD_WEIGHT else []


def _in_one_order(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    """The passes and updates of all stages by the time at which they start, if each starts as soon as it can."""
    ends: dict[tuple[Kind, int, int], int] = {}
    waiting: dict[tuple[Kind, int, int], list[int]] = defaultdict(list)
    position, clock = [0] * schedule.n_stages, [0] * schedule.n_stages
    ready: list[tuple[int, int]] = []  # (time at which its next action can start, stage)

    def look(stage: int) -> None:
        if position[stage] == len(schedule.actions[stage]):
            return
        needed = dependencies(schedule, stage, schedule.actions[stage][position[stage]])
        missing = [key for key in needed if key not in ends]
        if missing:
            waiting[missing[0]].append(stage)
        else:
            heapq.heappush(ready, (max([clock[stage], *(ends[key] for key in needed)]), stage))

    for stage in range(schedule.n_stages):
        look(stage)
    while ready:
        start, stage = heapq.heappop(ready)
        action = schedule.actions[stage][position[stage]]
        yield stage, action
        position[stage] += 1
        clock[stage] = start + _DURATIONS.get(action.kind, 1)
        kind = Kind.BACKWARD if action.kind in _BACKWARDS else action.kind
        done = (kind, action.micro_batch, schedule.piece(stage, action.chunk))
        ends[done] = clock[stage]
        for other in [stage, *waiting.pop(done, [])]:
            look(other)
    stuck = [i for i in range(schedule.n_stages) if position[i] < len(schedule.actions[i])]
    if stuck:
        where = []
        for i in stuck:
            action = schedule.actions[i][position[i]]
            kind, m, piece = next(key for key in dependencies(schedule, i, action) if key not in ends)
            at, chunk = schedule.place(m, piece)
            where.append(f"stage {i} waits at {action} for {Action(kind, m, chunk)} of stage {at}")
        raise ScheduleError(f"{schedule.name} gets stuck: {'; '.join(where)}")
