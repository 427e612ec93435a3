"""A schedule on the clock, held against longest paths in exact fractions, closed forms, and the rules of the clock."""

import math
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.distributed.pipeline import (
    Action,
    Durations,
    Kind,
    Schedule,
    ScheduleError,
    dualpipe,
    gpipe,
    interleaved,
    loop_route,
    make_schedule,
    naive,
    one_f_one_b,
    pipedream,
    pipedream_2bw,
    simulate,
    zero_bubble,
)

EVERY = [
    naive(3, 4),
    gpipe(4, 5),
    one_f_one_b(4, 6),
    interleaved(3, 6, 2),
    make_schedule("breadth-first", 3, 4, 3),
    zero_bubble(4, 7),
    zero_bubble(3, 7, variant="h2"),
    zero_bubble(3, 5, variant="v"),
    make_schedule("chimera", 4, 8),
    dualpipe(4, 8),
    pipedream(4, 7),
    pipedream(3, 7, vertical_sync=True),
    pipedream_2bw(3, 9),
]
"""One of each."""

schedules = st.sampled_from(EVERY)
seconds = st.integers(1, 40).map(lambda ticks: ticks / 8)


def piece_times(schedule: Schedule) -> st.SearchStrategy[list[float]]:
    return st.lists(seconds, min_size=schedule.n_pieces, max_size=schedule.n_pieces)


def longest_paths(schedule: Schedule, lasts: dict[Kind, list[float]], update: float) -> dict[tuple[int, str], Fraction]:
    """When each pass ends if messages take no time: by what it waits for alone, backwards and without a clock."""
    position = {
        (stage, a.kind, a.micro_batch, a.chunk): i
        for stage in range(schedule.n_stages)
        for i, a in enumerate(schedule.computes(stage))
    }

    def at(kinds: str, micro_batch: int, piece: int) -> Fraction:
        stage, chunk = schedule.routes[schedule.route_of[micro_batch]][piece]
        (place,) = (i for k in kinds if (i := position.get((stage, Kind(k), micro_batch, chunk))) is not None)
        return end(stage, place)

    @cache
    def end(stage: int, place: int) -> Fraction:
        action = schedule.computes(stage)[place]
        before = [end(stage, place - 1)] if place else []
        if action.kind is Kind.UPDATE:
            return max(before, default=Fraction(0)) + Fraction(update)
        piece = schedule.routes[schedule.route_of[action.micro_batch]].index((stage, action.chunk))
        if action.kind is Kind.FORWARD and piece > 0:
            before.append(at("F", action.micro_batch, piece - 1))
        if action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) and piece < schedule.n_pieces - 1:
            before.append(at("BI", action.micro_batch, piece + 1))
        return max(before, default=Fraction(0)) + Fraction(lasts[action.kind][piece])

    return {
        (stage, str(action)): end(stage, place)
        for stage in range(schedule.n_stages)
        for place, action in enumerate(schedule.computes(stage))
    }


@given(schedules, st.data())
@settings(max_examples=80, deadline=None)
def test_passes_end_when_the_longest_path_to_them_does(schedule: Schedule, data: st.DataObject) -> None:
    forward, half, weight, whole = (data.draw(piece_times(schedule)) for _ in range(4))
    update = data.draw(seconds)
    timeline = simulate(
        schedule, forward=forward, backward=whole, backward_input=half, backward_weight=weight, update=update
    )
    lasts = dict(zip("FIWB", (forward, half, weight, whole), strict=True))
    expected = longest_paths(schedule, {Kind(kind): times for kind, times in lasts.items()}, update)
    # Eighths are exact in floating point, so that the two agree to the last bit.
    assert {(span.rank, span.name): Fraction(span.end) for span in timeline} == expected
    assert Fraction(timeline.makespan) == max(expected.values())
    assert {span.lane for span in timeline} == {"compute"}


@given(schedules, st.data())
@settings(max_examples=120, deadline=None)
def test_the_rules_of_the_clock_with_messages_that_take_time(schedule: Schedule, data: st.DataObject) -> None:
    """Nobody is late and nobody early: each start is the latest of what it had to wait for.

    A pass starts when the one before it and the messages that it needs have ended. A message starts when both ends have
    come to it and the sender's and the receiver's port are free of those that were ready before it.
    """
    forward, backward = data.draw(piece_times(schedule)), data.draw(piece_times(schedule))
    lasts = data.draw(seconds)
    timeline = simulate(
        schedule, forward=forward, backward=backward, latency=lasts / 2, bandwidth=8.0, message_bytes=4 * lasts
    )
    computed = {(span.rank, span.name): span for span in timeline if span.lane == "compute"}
    sent = {(span.rank, span.name): span for span in timeline if span.lane == "communication"}
    assert len(computed) + len(sent) == len(timeline.spans)
    assert all(span.end - span.start == lasts for span in sent.values())

    posted: dict[tuple[int, int, str], list[float]] = {}  # (sender, receiver, receive) -> when each end came to it
    for stage, actions in enumerate(schedule.actions):
        clock = 0.0
        for action in actions:
            other = schedule.neighbour(stage, action)
            if action.kind.sends:
                assert other is not None
                receive = Action(Kind("R" + action.kind[1:]), action.micro_batch, other[1])
                posted.setdefault((stage, other[0], str(receive)), []).append(clock)
            elif action.kind.receives:
                assert other is not None
                posted.setdefault((other[0], stage, str(action)), []).append(clock)
            else:
                span = computed[stage, str(action)]
                needs = {Kind.FORWARD: "RF", Kind.BACKWARD: "RB", Kind.BACKWARD_INPUT: "RB"}.get(action.kind)
                needed = Action(Kind(needs), action.micro_batch, action.chunk) if needs else None
                source = schedule.neighbour(stage, needed) if needed else None
                waits = [clock]
                if source is not None and source[0] != stage:
                    waits.append(sent[source[0], str(needed)].end)
                assert span.start == max(waits), (stage, action)
                clock = span.end
    assert len(posted) == len(sent)

    ready = {key: max(ends) for key, ends in posted.items()}
    for side in (0, 1):  # what one port sends, what one port receives
        for stage in range(schedule.n_stages):
            through = sorted(
                (sent[key[0], key[2]] for key in posted if key[side] == stage), key=lambda span: span.start
            )
            assert all(second.start >= first.end for first, second in pairwise(through))
    for key, when in ready.items():
        span = sent[key[0], key[2]]
        busy = [
            sent[other[0], other[2]].end
            for other, earlier in ready.items()
            if other != key and (other[0] == key[0] or other[1] == key[1]) and earlier <= when
        ]
        assert span.start in {when, *busy}  # nothing is put off for no reason
        assert span.start >= when


@given(schedules, st.integers(1, 6), st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_slower_links_never_make_a_pipeline_faster(schedule: Schedule, slow: int, slower: int) -> None:
    first = simulate(schedule, latency=slow / 4).makespan
    assert simulate(schedule).makespan <= first <= simulate(schedule, latency=(slow + slower) / 4).makespan


@pytest.mark.parametrize("p", range(1, 9))
def test_the_naive_pipeline_waits_for_every_message(p: int) -> None:
    """m times there and back: m (sum F + sum B + 2 (p - 1) (latency + bytes / bandwidth))."""
    for m in (1, 2, 7):
        forward, backward = [1.0 + s % 3 for s in range(p)], [2.0 + s % 2 for s in range(p)]
        timeline = simulate(
            naive(p, m), forward=forward, backward=backward, latency=0.25, bandwidth=16.0, message_bytes=8.0
        )
        assert timeline.makespan == m * (sum(forward) + sum(backward) + 2 * (p - 1) * 0.75)


@pytest.mark.parametrize("p", range(1, 9))
def test_gpipe_with_uneven_stages_goes_at_the_pace_of_the_slowest(p: int) -> None:
    """A flow shop with one order for all: sum F + (m - 1) max F there, and the same back."""
    for m in (1, 3, 24):
        forward = [1.0 + (5 * s % 4) / 4 for s in range(p)]
        backward = [2.0 + (3 * s % 5) / 2 for s in range(p)]
        there, back = (sum(t) + (m - 1) * max(t) for t in (forward, backward))
        timeline = simulate(gpipe(p, m), forward=forward, backward=backward)
        assert timeline.makespan == there + back
        assert timeline.bubble == pytest.approx(1 - m * (sum(forward) + sum(backward)) / (p * (there + back)))


@pytest.mark.parametrize("latency", [0.25, 1.0, 3.0])
def test_gpipe_over_slow_links_goes_at_the_pace_of_the_link(latency: float) -> None:
    """There: p F + (p - 1) L + (m - 1) max(F, L); a link takes one message at a time."""
    for p in range(2, 9):
        for m in (1, 4, 24):
            timeline = simulate(gpipe(p, m), latency=latency)
            lasts = {span.name: span.end for span in timeline if span.rank == p - 1 and span.lane == "compute"}
            assert lasts[f"F{m - 1}"] == p + (p - 1) * latency + (m - 1) * max(1.0, latency)


@pytest.mark.parametrize("p", range(1, 9))
def test_bubbles_are_the_notes_closed_forms(p: int) -> None:
    for m in (1, 2, 8, 24, 6 * p):  # each schedule's own tests go over the whole grid
        for schedule in (gpipe(p, m), one_f_one_b(p, m)):
            assert simulate(schedule).bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
        for v in range(1, 5):
            if m % p == 0 or v == 1:
                timeline = simulate(interleaved(p, m, v))
                assert timeline.bubble == pytest.approx((p - 1) / (v * m + p - 1), abs=1e-12)
                # A piece takes n_stages / n_pieces of a stage's time: the work does not depend on v.
                assert timeline.busy == pytest.approx([3 * m] * p)


def test_a_pipeline_without_flushes_is_full_once_it_is_full() -> None:
    p, m = 4, 40
    timeline = simulate(pipedream(p, m))
    assert timeline.makespan == 3 * (m + p - 1)
    for stage in range(p):
        backwards = [s for s in timeline if s.rank == stage and s.name.startswith("B")]
        steady = backwards[p : m - p]
        assert {b.end - a.end for a, b in pairwise(steady)} == {3.0}


def test_what_a_timeline_tells() -> None:
    timeline = simulate(one_f_one_b(2, 2), latency=0.5, update=1.0)
    assert [(s.rank, s.lane, s.name, s.start, s.end) for s in timeline if s.rank == 1] == [
        (1, "compute", "F0", 1.5, 2.5),
        (1, "compute", "B0", 2.5, 4.5),
        (1, "communication", "RB0", 4.5, 5.0),
        (1, "compute", "F1", 4.5, 5.5),
        (1, "compute", "B1", 5.5, 7.5),
        (1, "communication", "RB1", 7.5, 8.0),
    ]
    assert (timeline.makespan, timeline.busy, timeline.idle) == (10.0, (6.0, 6.0), (4.0, 4.0))
    assert timeline.bubble == 0.4
    assert timeline.peak_in_flight == (2.0, 1.0)
    assert simulate(one_f_one_b(2, 2), forward=0.0, backward=0.0).bubble == 0.0


def in_flight_by_clock(schedule: Schedule, stage: int) -> float:
    """Between the start of a forward pass and the end of what frees it, counted at every start."""
    timeline = simulate(schedule)
    alive: dict[str, list[float]] = {}
    for span in timeline:
        if span.rank == stage and span.name[0] in "FBIW":
            micro_batch = span.name[1:].split("@")[0]
            if span.name[0] == "F":
                alive[micro_batch] = [span.start, math.inf]
            else:
                alive[micro_batch][1] = span.end  # the last of I and W, which is W
    most = max(sum(a <= start < b for a, b in alive.values()) for start, _ in alive.values())
    return most * schedule.n_stages / schedule.n_pieces


@pytest.mark.parametrize("schedule", EVERY, ids=lambda schedule: schedule.name)
def test_peak_in_flight_is_what_is_alive_at_once(schedule: Schedule) -> None:
    found = simulate(schedule).peak_in_flight
    assert found == pytest.approx([in_flight_by_clock(schedule, stage) for stage in range(schedule.n_stages)])


def test_durations_of_pieces_and_halves() -> None:
    schedule = interleaved(2, 4, 2)
    even = Durations.of(schedule, forward=3.0, backward=8.0, update=0.5)
    assert even.seconds(1, Action(Kind.FORWARD, 0, 1)) == 1.5  # half a stage
    assert [even.seconds(0, Action(kind, 0)) for kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.UPDATE)] == [
        4,
        2,
        0.5,
    ]
    assert even.seconds(0, Action(Kind.SEND_FORWARD, 0)) == 0
    uneven = Durations.of(schedule, forward=[1, 2, 3, 4], backward_weight=[5, 6, 7, 8])
    assert [uneven.seconds(s, Action(Kind.FORWARD, 0, c)) for c in (0, 1) for s in (0, 1)] == [1, 2, 3, 4]
    assert uneven.seconds(1, Action(Kind.BACKWARD_WEIGHT, 3, 1)) == 8
    assert uneven.seconds(1, Action(Kind.BACKWARD_INPUT, 3, 1)) == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forward": [1.0, 2.0]}, r"forward must be a number or one for each of the 3 pieces, got 2"),
        ({"backward_weight": [1.0, -2.0, 1.0]}, r"backward_weight must be finite and at least 0"),
        ({"forward": math.nan}, r"forward must be finite"),
        ({"update": -1.0}, r"update must be finite and at least 0, got -1"),
        ({"latency": -1.0}, r"latency must be finite and at least 0, got -1"),
        ({"latency": math.inf}, r"latency must be finite"),
        ({"message_bytes": -8.0}, r"message_bytes must be finite and at least 0, got -8"),
        ({"bandwidth": 0.0}, r"bandwidth must be above 0, got 0"),
        ({"bandwidth": math.nan}, r"bandwidth must be above 0, got nan"),
    ],
)
def test_times_that_are_none_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(gpipe(3, 2), **arguments)


def test_a_schedule_that_waits_for_nobody_is_stuck() -> None:
    lists = ["F0 SF0 RB0 B0", "F0 B0 SB0"]
    actions = tuple(tuple(map(Action.parse, line.split())) for line in lists)
    with pytest.raises(ScheduleError, match="gets stuck: stage 0 at B0, stage 1 at F0"):
        simulate(Schedule("mine", actions, (loop_route(2),), (0,)))
