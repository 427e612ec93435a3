"""1F1B with a flush: GPipe's bubble, less memory, and brute force finds nothing better among whole passes."""

from itertools import product

import pytest

from minillm.distributed.pipeline import Action, Kind, ScheduleError, one_f_one_b, schedule_of, simulate, validate


@pytest.mark.parametrize("p", range(1, 9))
def test_it_has_gpipes_bubble_and_holds_as_many_micro_batches_as_there_are_stages_from_here_on(p: int) -> None:
    for m in range(1, 25):
        proof = validate(one_f_one_b(p, m))
        assert proof.bubble == pytest.approx((p - 1) / (m + p - 1))
        assert list(proof.peak_in_flight) == [min(p - s, m) for s in range(p)]
    assert simulate(one_f_one_b(p, m)).makespan == 3 * (m + p - 1)


def test_the_order_of_a_small_one() -> None:
    assert str(one_f_one_b(4, 5)).splitlines()[1:] == [
        "stage 0: F0 F1 F2 F3 B0 F4 B1 B2 B3 B4",
        "stage 1: F0 F1 F2 B0 F3 B1 F4 B2 B3 B4",
        "stage 2: F0 F1 B0 F2 B1 F3 B2 F4 B3 B4",
        "stage 3: F0 B0 F1 B1 F2 B2 F3 B3 F4 B4",
    ]


def orders(forwards: int, backwards: int, m: int) -> list[tuple[Action, ...]]:
    """Every way in which a stage can go on with m micro-batches after so many passes of each kind."""
    if backwards == m:
        return [()]
    found = []
    if forwards < m:
        found += [(Action(Kind.FORWARD, forwards), *rest) for rest in orders(forwards + 1, backwards, m)]
    if backwards < forwards:
        found += [(Action(Kind.BACKWARD, backwards), *rest) for rest in orders(forwards, backwards + 1, m)]
    return found


@pytest.mark.parametrize(("p", "m"), [(2, 2), (2, 3), (2, 4), (3, 3)])
def test_brute_force_finds_no_faster_order_and_none_as_fast_with_less_memory(p: int, m: int) -> None:
    found = []
    for chosen in product(orders(0, 0, m), repeat=p):
        try:
            found.append(simulate(schedule_of("tried", chosen, n_micro_batches=m)))
        except ScheduleError:  # stages wait in a circle
            continue
    fastest = min(timeline.makespan for timeline in found)
    ours = simulate(one_f_one_b(p, m))
    assert ours.makespan == fastest
    least = [min(t.peak_in_flight[s] for t in found if t.makespan == fastest) for s in range(p)]
    assert list(ours.peak_in_flight) == least
