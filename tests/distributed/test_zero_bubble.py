"""Zero bubble: ZB-H1, ZB-H2 and ZB-V have the papers' bubbles and memory, and brute force finds no smaller ones."""

from collections.abc import Iterator
from itertools import product

import pytest

from minillm.distributed.pipeline import (
    Action,
    Kind,
    Schedule,
    ScheduleError,
    Timeline,
    one_f_one_b,
    schedule_of,
    simulate,
    validate,
    zero_bubble,
)

STAGES, MICRO_BATCHES = range(1, 9), range(1, 25)
TIMES = [(1, 1, 1), (2, 2, 1), (3, 2, 1), (2, 3, 1), (1, 2, 1), (5, 6, 4)]
"""F, I and W: no W longer than F or I, which is what the papers take for granted."""


def timed(schedule: Schedule, f: float = 1, i: float = 1, w: float = 1) -> Timeline:
    return simulate(schedule, forward=f, backward=i + w, backward_input=i, backward_weight=w)


def cost(timeline: Timeline) -> float:
    """What the papers count: the longest time from a stage's first pass to its last.

    With this count stages that start late and end late lose nothing, as one batch can follow the other.
    """
    own = [[span for span in timeline.spans if span.rank == stage] for stage in range(len(timeline.idle))]
    return max(max(span.end for span in spans) - min(span.start for span in spans) for spans in own)


@pytest.mark.parametrize("p", STAGES)
def test_zb_h1_fills_a_part_of_the_bubble_without_more_memory(p: int) -> None:
    for m in MICRO_BATCHES:
        schedule = zero_bubble(p, m, variant="h1")
        for f, i, w in TIMES if m in (p, p + 1) else TIMES[:1]:
            timeline = timed(schedule, f, i, w)
            assert max(timeline.peak_in_flight) == min(p, m)
            if m >= p:
                bubble = (p - 1) * (f + i - w)
                assert timeline.makespan - m * (f + i + w) == cost(timeline) - m * (f + i + w) == bubble, (m, f, i, w)
                assert list(timeline.peak_in_flight) == [p] * p


@pytest.mark.parametrize("p", STAGES)
def test_zb_h2_has_no_bubble_for_less_than_twice_the_memory(p: int) -> None:
    for m in MICRO_BATCHES:
        schedule = zero_bubble(p, m, variant="h2")
        for f, i, w in TIMES if m in (2 * p - 1, 2 * p) else TIMES[:1]:
            timeline = timed(schedule, f, i, w)
            assert max(timeline.peak_in_flight) == min(2 * p - 1, m)
            if m >= 2 * p - 1:
                assert cost(timeline) - m * (f + i + w) == (p - 1) * (f + i - 2 * w), (m, f, i, w)


@pytest.mark.parametrize("p", STAGES)
def test_zb_v_has_no_bubble_with_the_memory_of_1f1b(p: int) -> None:
    for m in MICRO_BATCHES:
        timeline = timed(zero_bubble(p, m, variant="v"))
        assert max(timeline.peak_in_flight) == min(p, m)
        assert cost(timeline) == pytest.approx(3 * m + max(2 * p - 1 - m, 0) * (p > 1))


@pytest.mark.parametrize("variant", ["h1", "h2", "v"])
def test_they_are_valid(variant: str) -> None:
    for p in STAGES:
        for m in sorted({1, p - 1, p, p + 1, 2 * p - 1, 2 * p, 24} - {0}):
            validate(zero_bubble(p, m, variant=variant))


def test_the_printed_table() -> None:
    """The authors' table for F, I and W that take the same time: bubble rate, and memory in that of 1F1B."""
    p, m = 4, 12
    rates = {}
    for name, schedule in {
        "1F1B": one_f_one_b(p, m),
        "ZB1P": zero_bubble(p, m, variant="h1"),
        "ZB2P": zero_bubble(p, m, variant="h2"),
        "ZBV": zero_bubble(p, m, variant="v"),
    }.items():
        timeline = timed(schedule)
        rates[name] = (cost(timeline) / (3 * m) - 1, max(timeline.peak_in_flight) / p)
    assert rates["1F1B"] == pytest.approx(((p - 1) / m, 1))
    assert rates["ZB1P"] == pytest.approx(((p - 1) / (3 * m), 1))
    assert rates["ZB2P"] == pytest.approx((0, (2 * p - 1) / p))
    assert rates["ZBV"] == pytest.approx((0, 1))


def orders(m: int, done: tuple[int, int, int] = (0, 0, 0)) -> Iterator[tuple[Action, ...]]:
    """Every way in which a stage can go on with m micro-batches after so many F, I and W."""
    if done[2] == m:
        yield ()
    for k, kind in enumerate("FIW"):
        if done[k] < (m if k == 0 else done[k - 1]):
            more = (done[0] + (k == 0), done[1] + (k == 1), done[2] + (k == 2))
            yield from ((Action(Kind(kind), done[k]), *rest) for rest in orders(m, more))


def test_brute_force_finds_no_smaller_bubble_for_their_memory() -> None:
    p, m = 2, 3
    least: dict[float, float] = {}  # greatest number in flight -> least bubble
    for chosen in product(list(orders(m)), repeat=p):
        try:
            timeline = simulate(schedule_of("tried", chosen, n_micro_batches=m))
        except ScheduleError:  # stages wait in a circle
            continue
        held = max(timeline.peak_in_flight)
        least[held] = min(least.get(held, 99), cost(timeline) - 3 * m)
    assert (least[p], least[2 * p - 1]) == (p - 1, 0)
    for variant, held in [("h1", p), ("h2", 2 * p - 1)]:
        timeline = simulate(zero_bubble(p, m, variant=variant))
        assert (max(timeline.peak_in_flight), cost(timeline) - 3 * m) == (held, least[held])


def test_a_variant_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"variant must be one of h1, h2, v, got 'H2'; the nearest is \"h2\""):
        zero_bubble(2, 4, variant="H2")
