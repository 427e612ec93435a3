"""The proof that a schedule is right before any tensor moves: complete, in order, and never stuck.

Nothing here looks at how a schedule was made: a list that somebody wrote by hand is held to the same rules.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from minillm.distributed.pipeline.actions import Action, Kind
from minillm.distributed.pipeline.routes import ScheduleError
from minillm.distributed.pipeline.schedule import Schedule, dependencies
from minillm.distributed.pipeline.simulate import simulate

_BACKWARDS = (Kind.BACKWARD, Kind.BACKWARD_INPUT)
_SENT_BY = {Kind.SEND_FORWARD: (Kind.FORWARD,), Kind.SEND_BACKWARD: _BACKWARDS}
_RECEIVED_AS = {Kind.SEND_FORWARD: Kind.RECV_FORWARD, Kind.SEND_BACKWARD: Kind.RECV_BACKWARD}


@dataclass(frozen=True)
class Proof:
    """What a valid schedule comes to.

    Attributes:
        peak_in_flight: by stage, see `Timeline`.
        weight_versions: by stage, the most versions of its weights that must be held at once.
        bubble: the idle part of all stages' time if a forward pass of ``1 / n_stages`` of the model takes 1, a backward
            pass 2, and each of its halves 1.
        n_messages: sends of all stages.
    """

    peak_in_flight: tuple[float, ...]
    weight_versions: tuple[int, ...]
    bubble: float
    n_messages: int


def validate(schedule: Schedule) -> Proof:
    """Prove a schedule, or say what is wrong with it.

    - **Complete**: each micro-batch has, at each piece on its route, one forward and one backward pass, whole or in
      two halves; each result that another stage needs is sent once and received once, and nothing else is.
    - **In order**: a pass comes after what it depends on, on its own stage and on others.
    - **Never stuck**: even if a send returns only when the other stage stands at the receive, and two stages exchange
      messages in one order (which NCCL wants).
    - **Versions**: weights are used that have been made; a backward pass has those of its forward pass (unless the
      schedule is not stashing); each gradient goes into one update, if there are updates.

    Raises:
        ScheduleError: it is not so; the message names the stage and the action.
    """
    for stage, actions in enumerate(schedule.actions):
        _complete(schedule, stage, actions)
        _messages(schedule, stage, actions)
        _versions(schedule, stage, actions)
    _rendezvous(schedule)
    timeline = simulate(schedule)
    return Proof(
        timeline.peak_in_flight,
        tuple(weight_versions(schedule, stage) for stage in range(schedule.n_stages)),
        timeline.bubble,
        sum(action.kind.sends for actions in schedule.actions for action in actions),
    )


def _complete(schedule: Schedule, stage: int, actions: tuple[Action, ...]) -> None:
    n_chunks = len(schedule.pieces[stage])
    seen: dict[tuple[Kind, int, int], Action] = {}
    for action in actions:
        if action.chunk >= n_chunks or action.micro_batch >= schedule.n_micro_batches:
            raise ScheduleError(
                f"{action} on stage {stage}: there are {schedule.n_micro_batches} micro-batches and {n_chunks} chunks, "
                "counted from 0"
            )
        if action.kind is Kind.UPDATE:
            continue
        if action.version and not action.kind.computes:
            raise ScheduleError(f"{action} on stage {stage}: messages have no version")
        if (stage, action.chunk) not in schedule.routes[schedule.route_of[action.micro_batch]]:
            raise ScheduleError(f"{action} on stage {stage}: micro-batch {action.micro_batch} does not come there")
        key = (action.kind, action.micro_batch, action.chunk)
        if key in seen:
            raise ScheduleError(f"{action} stands twice on stage {stage}")
        seen[key] = action
    for m, route in enumerate(schedule.route_of):
        for at, chunk in schedule.routes[route]:
            if at != stage:
                continue
            has = {kind for kind in Kind if (kind, m, chunk) in seen}
            if Kind.FORWARD not in has:
                raise ScheduleError(f"{Action(Kind.FORWARD, m, chunk)} is missing on stage {stage}")
            halves = has & {Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT}
            if Kind.BACKWARD in has and halves:
                half = Action(min(halves), m, chunk)
                raise ScheduleError(f"{Action(Kind.BACKWARD, m, chunk)} and {half} on stage {stage}: it is one pass")
            if Kind.BACKWARD not in has and len(halves) < 2:
                lacks = {Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT} - has if halves else {Kind.BACKWARD}
                raise ScheduleError(f"{Action(min(lacks), m, chunk)} is missing on stage {stage}")
    done: set[tuple[Kind, int, int]] = set()
    for action in actions:
        if action.kind.computes:
            for kind, m, piece in dependencies(schedule, stage, action):
                at, chunk = schedule.place(m, piece)
                if at == stage and not {(kind, m, chunk)} & done:
                    raise ScheduleError(
                        f"{action} on stage {stage} comes before {Action(kind, m, chunk)}, whose result it needs"
                    )
            kind = Kind.BACKWARD if action.kind in _BACKWARDS else action.kind
            done.add((kind, action.micro_batch, action.chunk))


def _messages(schedule: Schedule, stage: int, actions: tuple[Action, ...]) -> None:
    """Each stage's own messages: none too many or too few, sends after the pass, receives before it."""
    place = {(a.kind, a.micro_batch, a.chunk): i for i, a in enumerate(actions)}

    def at(kinds: tuple[Kind, ...], action: Action) -> int | None:
        return next(
            (i for kind in kinds if (i := place.get((kind, action.micro_batch, action.chunk))) is not None), None
        )

    for send, passes in _SENT_BY.items():
        for action in actions:
            if action.kind in passes:
                other = schedule.neighbour(stage, action)
                wanted = other is not None and other[0] != stage
                sent = at((send,), action)
                message = Action(send, action.micro_batch, action.chunk)
                if wanted and sent is None:
                    assert other is not None
                    raise ScheduleError(f"{message} is missing on stage {stage}: stage {other[0]} needs it")
                if not wanted and sent is not None:
                    raise ScheduleError(f"{message} on stage {stage}: there is nobody to send it to")
                if sent is not None and sent < place[action.kind, action.micro_batch, action.chunk]:
                    raise ScheduleError(f"{message} on stage {stage} comes before {action}, whose result it sends")
    for send, passes in _SENT_BY.items():
        receive = _RECEIVED_AS[send]
        for action in actions:
            if action.kind in passes:
                message = Action(receive, action.micro_batch, action.chunk)
                other = schedule.neighbour(stage, message)
                wanted = other is not None and other[0] != stage
                received = at((receive,), action)
                if wanted and received is None:
                    assert other is not None
                    raise ScheduleError(f"{message} is missing on stage {stage}, which needs it of stage {other[0]}")
                if not wanted and received is not None:
                    raise ScheduleError(f"{message} on stage {stage}: there is nobody who sends it")
                if received is not None and received > place[action.kind, action.micro_batch, action.chunk]:
                    raise ScheduleError(f"{message} on stage {stage} comes after {action}, which needs it")


def _versions(schedule: Schedule, stage: int, actions: tuple[Action, ...]) -> None:
    made: Counter[int] = Counter()  # updates, by chunk
    used: dict[tuple[int, int], int] = {}
    waiting: dict[int, list[int]] = defaultdict(list)  # chunk -> micro-batches with gradients that no update has
    for action in actions:
        key = action.micro_batch, action.chunk
        if action.kind is Kind.UPDATE:
            made[action.chunk] += 1
            if action.version != made[action.chunk]:
                raise ScheduleError(
                    f"{action} on stage {stage} is update {made[action.chunk]} of its weights, and makes that version"
                )
            if action.micro_batch not in waiting[action.chunk]:
                raise ScheduleError(f"{action} on stage {stage}: there is no gradient of micro-batch {key[0]} to use")
            if action.micro_batch != waiting[action.chunk][-1]:
                raise ScheduleError(
                    f"{action} on stage {stage} names micro-batch {key[0]}, and the last gradient that goes into it is "
                    f"that of {waiting[action.chunk][-1]}"
                )
            waiting[action.chunk].clear()
        elif action.kind.computes:
            if action.version > made[action.chunk]:
                raise ScheduleError(
                    f"{action} on stage {stage} uses version {action.version} of the weights, and only "
                    f"{made[action.chunk]} updates have been made"
                )
            if action.kind is Kind.FORWARD:
                used[key] = action.version
            elif schedule.stashing and action.version != used[key]:
                raise ScheduleError(
                    f"{action} on stage {stage} goes back through version {action.version} of the weights, its forward "
                    f"pass went through version {used[key]}"
                )
            if action.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT):
                waiting[action.chunk].append(action.micro_batch)
    for chunk, left in waiting.items():
        if left and not schedule.synchronous:
            raise ScheduleError(f"the gradient of micro-batch {min(left)} goes into no update of stage {stage}.{chunk}")


def _rendezvous(schedule: Schedule) -> None:
    """Run the lists with sends that return only when they are received."""
    position = [0] * schedule.n_stages

    def here(stage: int) -> Action | None:
        actions = schedule.actions[stage]
        return actions[position[stage]] if position[stage] < len(actions) else None

    def other_end(stage: int, action: Action) -> tuple[int, Action]:
        place = schedule.neighbour(stage, action)
        assert place is not None
        kinds = _RECEIVED_AS if action.kind.sends else {receive: send for send, receive in _RECEIVED_AS.items()}
        return place[0], Action(kinds[action.kind], action.micro_batch, place[1])

    moved = True
    while moved:
        moved = False
        for stage in range(schedule.n_stages):
            while (action := here(stage)) is not None:
                if action.kind.sends or action.kind.receives:
                    peer, wanted = other_end(stage, action)
                    if here(peer) != wanted:
                        break
                    position[peer] += 1
                position[stage] += 1
                moved = True
    waits = [(stage, action) for stage in range(schedule.n_stages) if (action := here(stage)) is not None]
    if waits:
        said = "; ".join(f"stage {stage} waits at {a} for {_end(*other_end(stage, a))}" for stage, a in waits)
        raise ScheduleError(f"{schedule.name} gets stuck if sends wait for their receiver: {said}")


def _end(stage: int, action: Action) -> str:
    return f"{action} of stage {stage}"


def weight_versions(schedule: Schedule, stage: int) -> int:
    """The most versions of a stage's weights that must be held at once: the newest, and older ones from when they are
    made until the last pass with them has ended."""
    if not schedule.stashing:
        return 1
    actions = schedule.actions[stage]
    last = {(a.chunk, a.version): i for i, a in enumerate(actions) if a.kind.computes}
    most, newest = 1, Counter(dict.fromkeys(range(len(schedule.pieces[stage])), 0))
    for i, action in enumerate(actions):
        if action.kind is Kind.UPDATE:
            newest[action.chunk] = action.version
            needed = {v for (chunk, v), end in last.items() if chunk == action.chunk and end > i and v < action.version}
            most = max(most, len(needed) + 1)
    return most
