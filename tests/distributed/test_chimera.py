"""Chimera: the paper's bubbles and memory, and two halves that are mirror images."""

import pytest

from minillm.distributed.pipeline import chimera, simulate, validate


@pytest.mark.parametrize("p", [2, 4, 6, 8])
def test_it_halves_the_bubble_and_balances_the_memory(p: int) -> None:
    for m in range(2, 25, 2):
        schedule = chimera(p, m)
        validate(schedule)
        equal, twice = simulate(schedule, backward=1), simulate(schedule)
        last_unit = (m - 1) % p + 1
        assert equal.makespan == 2 * m + 2 * p - 2 - last_unit
        if m % p == 0:
            assert equal.bubble == pytest.approx((p - 2) / (2 * m + p - 2))
            assert twice.makespan == 3 * m + (p - 2) * (1 + m // p)
        if m == p:
            assert twice.bubble == pytest.approx((p - 2) / (3 * m / 2 + p - 2))
        if m >= p:
            held = [p // 2 + 1 + min(s, p - 1 - s) for s in range(p)]
            assert list(equal.peak_in_flight) == list(twice.peak_in_flight) == held
            assert (held[0], max(held)) == (p // 2 + 1, p)  # what the paper prints


@pytest.mark.parametrize("p", [2, 4, 6, 8])
def test_a_stage_does_what_the_one_opposite_does_the_other_way(p: int) -> None:
    for m in range(2, 25, 2):
        schedule = chimera(p, m)
        down, up = ([i for i in range(m) if schedule.route_of[i] == route] for route in (0, 1))
        opposite = dict(zip([*down, *up], [*up, *down], strict=True))
        for s in range(p):
            mirrored = [(a.kind, opposite[a.micro_batch], 1 - a.chunk) for a in schedule.computes(p - 1 - s)]
            assert [(a.kind, a.micro_batch, a.chunk) for a in schedule.computes(s)] == mirrored


def test_each_direction_alone_is_1f1b_of_its_units() -> None:
    """What a stage does for one direction of a unit: as many forward passes ahead as 1F1B has there."""
    p = 8
    for s in range(p):
        down = [str(a) for a in chimera(p, p).computes(s) if a.chunk == 0]
        ahead = min(p - s, p // 2)
        assert down[:ahead] == [f"F{i}" for i in range(ahead)]
        assert down[ahead] == "B0"


def test_the_order_of_a_small_one() -> None:
    assert str(chimera(4, 4)).splitlines()[1:] == [
        "stage 0: F0 F1 F2.1 B2.1 F3.1 B3.1 B0 B1",
        "stage 1: F0 F2.1 F1 F3.1 B2.1 B0 B3.1 B1",
        "stage 2: F2.1 F0 F3.1 F1 B0 B2.1 B1 B3.1",
        "stage 3: F2.1 F3.1 F0 B0 F1 B1 B2.1 B3.1",
    ]
