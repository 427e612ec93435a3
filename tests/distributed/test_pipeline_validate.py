"""The proof of a schedule: whatever is wrong with one is found, and said with the stage and the action."""

import dataclasses
import re
from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minillm.distributed.pipeline import (
    SCHEDULES,
    Action,
    Kind,
    Schedule,
    ScheduleError,
    loop_route,
    make_schedule,
    one_f_one_b,
    pipedream,
    pipedream_2bw,
    schedule_of,
    validate,
    zero_bubble,
)

SMALL = [
    make_schedule(name, 4 if name in ("chimera", "dualpipe") else 3, 8 if name == "dualpipe" else 6)
    for name in SCHEDULES
    if not SCHEDULES[name].takes_chunks
]
SMALL += [make_schedule("interleaved", 3, 6, 2), make_schedule("breadth-first", 3, 4, 2)]
ASYNCHRONOUS = [pipedream(3, 6), pipedream(3, 6, vertical_sync=True), pipedream_2bw(3, 6)]
EVERY = [*SMALL, *ASYNCHRONOUS, pipedream(3, 6, stashing=False)]


def by_name(schedule: Schedule) -> str:
    return schedule.name


every = pytest.mark.parametrize("schedule", EVERY, ids=by_name)


def written(
    *lists: str, n_micro_batches: int = 1, routes: Sequence[tuple[tuple[int, int], ...]] | None = None
) -> Schedule:
    """A schedule by hand, messages and all."""
    return Schedule(
        "mine",
        tuple(tuple(map(Action.parse, line.split())) for line in lists),
        tuple(routes or [loop_route(len(lists))]),
        (0,) * n_micro_batches,
    )


def with_list(schedule: Schedule, stage: int, actions: Sequence[Action]) -> Schedule:
    lists = [*schedule.actions[:stage], tuple(actions), *schedule.actions[stage + 1 :]]
    return dataclasses.replace(schedule, actions=tuple(lists))


def refusal(schedule: Schedule) -> str:
    with pytest.raises(ScheduleError) as caught:
        validate(schedule)
    said = str(caught.value)
    assert re.search(r"stage \d", said), said
    return said


@every
def test_a_list_without_one_of_its_actions_is_refused(schedule: Schedule) -> None:
    for stage, actions in enumerate(schedule.actions):
        for i, action in enumerate(actions):
            said = refusal(with_list(schedule, stage, actions[:i] + actions[i + 1 :]))
            if action.kind is not Kind.UPDATE:
                name = str(dataclasses.replace(action, version=0))
                half = re.sub("^[IW]", "B", name)  # without its other half a half may be meant as a whole pass
                assert re.search(rf"(^|\W)({re.escape(name)}|{re.escape(half)})(\W|$)", said), (name, said)


@every
def test_an_action_that_stands_twice_is_refused(schedule: Schedule) -> None:
    for stage, actions in enumerate(schedule.actions):
        for i, action in enumerate(actions):
            for again in {i, len(actions)}:
                said = refusal(with_list(schedule, stage, [*actions[:again], action, *actions[again:]]))
                if action.kind is not Kind.UPDATE:
                    assert said == f"{action} stands twice on stage {stage}"


@every
def test_another_micro_batch_chunk_or_version_is_refused(schedule: Schedule) -> None:
    m = schedule.n_micro_batches
    for stage, actions in enumerate(schedule.actions):
        for i, action in enumerate(actions):
            n_chunks = len(schedule.pieces[stage])
            others = [dataclasses.replace(action, micro_batch=k) for k in ((action.micro_batch + 1) % m, m)]
            others += [dataclasses.replace(action, chunk=k) for k in ((action.chunk + 1) % n_chunks, n_chunks)]
            if schedule.stashing or not action.kind.computes:
                others.append(dataclasses.replace(action, version=action.version + 1))
            for other in others:
                if other != action:
                    refusal(with_list(schedule, stage, [*actions[:i], other, *actions[i + 1 :]]))


@every
def test_no_pass_comes_before_what_it_needs(schedule: Schedule) -> None:
    """Each pass moved to the front of its list, and each message to the wrong side of its pass."""
    for stage, actions in enumerate(schedule.actions):
        for i, action in enumerate(actions):
            rest = [*actions[:i], *actions[i + 1 :]]
            if action.kind is Kind.UPDATE or action.kind.sends:
                refusal(with_list(schedule, stage, [action, *rest]))
            elif action.kind.receives:
                said = refusal(with_list(schedule, stage, [*rest, action]))
                assert "comes after" in said, said
            elif action.kind is not Kind.FORWARD:
                assert "comes before" in refusal(with_list(schedule, stage, [action, *rest]))


@given(st.sampled_from(EVERY), st.data())
@settings(max_examples=150, deadline=None)
def test_two_messages_to_and_from_one_stage_in_the_other_order_are_refused(
    schedule: Schedule, data: st.DataObject
) -> None:
    """What two stages exchange stands in one order in both lists, so that one list alone cannot change it."""
    stage = data.draw(st.integers(0, schedule.n_stages - 1))
    actions = list(schedule.actions[stage])
    messages = [i for i, a in enumerate(actions) if a.kind.sends or a.kind.receives]
    assume(len(messages) > 1)
    i, j = sorted(data.draw(st.lists(st.sampled_from(messages), min_size=2, max_size=2, unique=True)))
    first, second = actions[i], actions[j]
    between = [schedule.neighbour(stage, first), schedule.neighbour(stage, second)]
    assume(between[0] is not None and between[1] is not None and between[0][0] == between[1][0])
    actions[i], actions[j] = second, first
    refusal(with_list(schedule, stage, actions))


def circle(n_stages: int) -> Schedule:
    """Two pieces a stage, so that the last stage has something to send to the first; n micro-batches, one GPipe."""
    route = loop_route(n_stages, 2)
    orders = [[f"F{m}.{c}" for c in range(2) for m in range(n_stages)] for _ in range(n_stages)]
    orders = [[*order, *(f"B{m}.{c}" for c in (1, 0) for m in range(n_stages))] for order in orders]
    return schedule_of("circle", orders, n_micro_batches=n_stages, routes=[route])


def test_stages_that_send_to_each_other_at_once_are_stuck_and_it_is_said_who_waits_for_whom() -> None:
    good = written("F0 SF0 F1 RB0 SF1 B0 RB1 B1", "RF0 F0 B0 SB0 RF1 F1 B1 SB1", n_micro_batches=2)
    validate(good)
    bad = written("F0 SF0 F1 SF1 RB0 B0 RB1 B1", "RF0 F0 B0 SB0 RF1 F1 B1 SB1", n_micro_batches=2)
    assert refusal(bad) == (
        "mine gets stuck if sends wait for their receiver: "
        "stage 0 waits at SF1 for RF1 of stage 1; stage 1 waits at SB0 for RB0 of stage 0"
    )


@pytest.mark.parametrize("n_stages", [2, 3, 5])
def test_a_circle_of_sends_is_found_however_long(n_stages: int) -> None:
    """Every stage receives a message just before it needs it, and sends first: fine with buffers, stuck without."""
    schedule = circle(n_stages)
    validate(schedule)
    lists = []
    for actions in schedule.actions:
        late = [a for a in actions if a.kind is Kind.RECV_FORWARD]
        passes = [a for a in actions if a not in late]
        order: list[Action] = []
        for action in passes:
            if action.kind is Kind.FORWARD:
                order += [a for a in late if (a.micro_batch, a.chunk) == (action.micro_batch, action.chunk)]
            order.append(action)
        lists.append(tuple(order))
    said = refusal(dataclasses.replace(schedule, actions=tuple(lists)))
    assert set(map(int, re.findall(r"stage (\d+) waits at", said))) == set(range(n_stages)), said


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (written("F0 I0"), r"W0 is missing on stage 0"),
        (written("F0 W0"), r"I0 is missing on stage 0"),
        (written("F0 B0 W0"), r"B0 and W0 on stage 0: it is one pass"),
        (written("F0 W0 I0"), r"W0 on stage 0 comes before B0, whose result it needs"),
        (written("F0 SF0 B0"), r"SF0 on stage 0: there is nobody to send it to"),
        (written("RF0 F0 B0"), r"RF0 on stage 0: there is nobody who sends it"),
        (written("F0 B0 SB0"), r"SB0 on stage 0: there is nobody to send it to"),
        (written("F0 SF0 RB0 B0", "F0 B0 SB0"), r"RF0 is missing on stage 1, which needs it of stage 0"),
        (written("F0 RB0 B0", "RF0 F0 B0 SB0"), r"SF0 is missing on stage 0: stage 1 needs it"),
        (written("F0 SF0 RB0@1 B0", "RF0 F0 B0 SB0"), r"RB0@1 on stage 0: messages have no version"),
        (written("F0 F0.1 B0.1 B0"), r"F0\.1 on stage 0: .* 1 micro-batches and 1 chunks"),
        (written("F0@1 B0@1"), r"F0@1 on stage 0 uses version 1 of the weights, and only 0 updates"),
        (written("F0 B0 U0@2"), r"U0@2 on stage 0 is update 1 of its weights"),
        (written("F0 U0@1 B0"), r"U0@1 on stage 0: there is no gradient of micro-batch 0"),
        (written("F0 F1 B0 B1 U0@1", n_micro_batches=2), r"U0@1 .* the last gradient .* that of 1"),
        (written("F0 F1 B0 U0@1 B1", n_micro_batches=2), r"gradient of micro-batch 1 goes into no update of stage 0"),
        (written("F0 F1 B0 U0@1 B1@1 U1@2", n_micro_batches=2), r"B1@1 on stage 0 .*version 1.*version 0"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(schedule: Schedule, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        validate(schedule)


def test_hand_overs_on_one_stage_need_no_message() -> None:
    there_and_back = [((0, 0), (1, 0), (1, 1), (0, 1))]
    proof = validate(
        written("F0 SF0 RF0.1 F0.1 B0.1 SB0.1 RB0 B0", "RF0 F0 F0.1 SF0.1 RB0.1 B0.1 B0 SB0", routes=there_and_back)
    )
    assert proof.n_messages == 4


def test_what_a_proof_says() -> None:
    p, m = 4, 9
    proof = validate(one_f_one_b(p, m))
    assert (proof.n_messages, proof.weight_versions) == (2 * m * (p - 1), (1,) * p)
    assert proof.peak_in_flight == tuple(min(p - s, m) for s in range(p))
    assert proof.bubble == pytest.approx((p - 1) / (m + p - 1))
    assert validate(zero_bubble(p, m)).bubble < proof.bubble


@pytest.mark.parametrize("p", range(1, 6))
def test_versions_held_are_those_of_the_papers(p: int) -> None:
    """PipeDream's p - s, with vertical sync p, without stashing 1; 2BW's two."""
    m = 3 * p
    assert validate(pipedream(p, m)).weight_versions == tuple(range(p, 0, -1))
    assert validate(pipedream(p, m, vertical_sync=True)).weight_versions == (p,) * p
    assert validate(pipedream(p, m, stashing=False)).weight_versions == (1,) * p
    assert max(validate(pipedream_2bw(p, m)).weight_versions) == 2


def held_at_once(schedule: Schedule, stage: int) -> int:
    """By walking the list and keeping what is still asked for, a version at a time."""
    actions = schedule.actions[stage]
    kept, newest, most = {0}, 0, 1
    for i, action in enumerate(actions):
        if action.kind is Kind.UPDATE:
            newest = action.version
            kept.add(newest)
        if action.kind.computes or action.kind is Kind.UPDATE:
            later = {a.version for a in actions[i + 1 :] if a.kind.computes}
            kept = {version for version in kept if version == newest or version in later}
            most = max(most, len(kept))
    return most


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.sampled_from(["stash", "vertical", "2bw"]))
@settings(max_examples=60, deadline=None)
def test_versions_held_by_walking_the_list(p: int, rounds: int, more: int, which: str) -> None:
    if which == "2bw":
        accumulate = p + more - 1
        schedule = pipedream_2bw(p, rounds * accumulate, accumulate=accumulate)
    else:
        schedule = pipedream(p, rounds + more, vertical_sync=which == "vertical")
    assert validate(schedule).weight_versions == tuple(held_at_once(schedule, s) for s in range(p))
