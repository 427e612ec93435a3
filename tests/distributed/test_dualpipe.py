"""DualPipe: the bubble and memory that DeepSeek prints, where the two passes of a pair begin and end together."""

import itertools
from collections.abc import Iterator

import pytest

from minillm.distributed.pipeline import Action, Kind, Schedule, dualpipe, simulate, validate


@pytest.mark.parametrize("p", [2, 4, 6, 8])
def test_the_printed_bubble_and_memory(p: int) -> None:
    """Table 2: (PP/2 - 1) (F&B + B - 3W) and PP + 1, exact where I takes as long as F."""
    for m in range(2 * p, 25, 2):
        schedule = dualpipe(p, m)
        validate(schedule)
        for f, i, w in [(1, 1, 1), (2, 2, 1), (3, 3, 2), (5, 5, 1)]:
            b, work = i + w, m * (f + i + w)
            assert makespan_in_pairs(schedule, f, i, w) - work == (p / 2 - 1) * ((f + b) + b - 3 * w)
            timeline = simulate(schedule, forward=f, backward=b, backward_input=i, backward_weight=w)
            assert timeline.makespan - work == (p / 2 - 1) * (f + i - w)
            assert list(timeline.peak_in_flight) == [p + 1] * p


def makespan_in_pairs(schedule: Schedule, f: float, i: float, w: float) -> float:
    """The time where a pair, F and B one after the other, begins when both can and gives nothing before both end."""
    p = schedule.n_stages
    lasts = {Kind.FORWARD: f, Kind.BACKWARD: i + w, Kind.BACKWARD_INPUT: i, Kind.BACKWARD_WEIGHT: w}
    steps = [list(pairs(schedule.computes(s), middle=s in (p // 2 - 1, p // 2))) for s in range(p)]
    ends: dict[tuple[bool, int, int], float] = {}  # (forward, micro-batch, piece)
    clocks, progress = [0.0] * p, True
    while progress:
        progress = False
        for s in range(p):
            while steps[s]:
                needed = []
                for a in steps[s][0]:
                    piece = schedule.piece(s, a.chunk)
                    if a.kind is Kind.FORWARD and piece:
                        needed.append((True, a.micro_batch, piece - 1))
                    elif a.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) and piece + 1 < p:
                        needed.append((False, a.micro_batch, piece + 1))
                if any(key not in ends for key in needed):
                    break
                clocks[s] = max([clocks[s], *(ends[key] for key in needed)]) + sum(lasts[a.kind] for a in steps[s][0])
                for a in steps[s].pop(0):
                    if a.kind is not Kind.BACKWARD_WEIGHT:
                        ends[a.kind is Kind.FORWARD, a.micro_batch, schedule.piece(s, a.chunk)] = clocks[s]
                progress = True
    assert not any(steps)
    return max(clocks)


def pairs(actions: tuple[Action, ...], *, middle: bool) -> Iterator[tuple[Action, ...]]:
    """F and the whole B after it as one step, but for the first such pair of the two middle stages (as printed)."""
    rest, apart = list(actions), middle
    while rest:
        paired = len(rest) > 1 and (rest[0].kind, rest[1].kind) == (Kind.FORWARD, Kind.BACKWARD)
        size = 2 if paired and not apart else 1
        apart = apart and not paired
        yield tuple(rest[:size])
        del rest[:size]


@pytest.mark.parametrize("p", [2, 4, 6, 8])
def test_a_stage_does_what_the_one_opposite_does_the_other_way(p: int) -> None:
    for m in range(2 * p, 25, 2):
        schedule = dualpipe(p, m)
        for s in range(p):
            mirrored = [(a.kind, (a.micro_batch + m // 2) % m, 1 - a.chunk) for a in schedule.computes(p - 1 - s)]
            assert [(a.kind, a.micro_batch, a.chunk) for a in schedule.computes(s)] == mirrored


def test_the_middle_is_forward_of_one_direction_and_backward_of_the_other_in_turn() -> None:
    middle = [(a.kind, a.chunk) for a in dualpipe(8, 40).computes(2)][20:44]
    assert {kind for kind, _ in middle} == {Kind.FORWARD, Kind.BACKWARD}
    assert all(one[0] is not other[0] for one, other in itertools.pairwise(middle))
