"""Hidden and exposed communication: against a count of ticks, and against the closed form of a bucketed step."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.costs import communication_seconds, data_parallel_step_seconds
from minillm.distributed import Network, Span, compute, overlap, simulate_ranks
from minillm.distributed.overlap import Overlap

TICKS = st.tuples(st.integers(0, 30), st.integers(0, 8)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@settings(max_examples=80, deadline=None)
@given(st.lists(TICKS, max_size=6), st.lists(TICKS, max_size=6))
def test_seconds_are_those_of_ticks_counted_one_by_one(sent: list[Any], computed: list[Any]) -> None:
    spans = [Span(3, "communication", "", *interval) for interval in sent]
    spans += [Span(3, "compute", "", *interval) for interval in computed]
    spans.append(Span(3, "wait", "", 0.0, 50.0))
    busy = {tick for start, end in sent for tick in range(start, end)}
    working = {tick for start, end in computed for tick in range(start, end)}
    (found,) = overlap(reversed(spans))
    assert found == Overlap(3, len(working), len(busy), len(busy & working))
    assert found.exposed == len(busy - working)
    assert found.fraction == (len(busy & working) / len(busy) if busy else 1.0)


def _backward_in_buckets(seconds: float, n_buckets: int, asynchronous: bool) -> None:
    works = []
    compute(1.0, name="forward")
    for _ in range(n_buckets):
        compute(seconds / n_buckets, name="backward")
        works.append(dist.all_reduce(torch.ones(800 // n_buckets), async_op=asynchronous))
    for work in works:
        if work is not None:
            work.wait()


@pytest.mark.parametrize("seconds", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("n_buckets", [1, 4])
def test_a_simulated_step_hides_what_the_formula_says(seconds: float, n_buckets: int) -> None:
    link = {"latency": 0.05, "bandwidth": 2000.0}
    step = {}
    for asynchronous in (False, True):
        simulation = simulate_ranks(_backward_in_buckets, 4, seconds, n_buckets, asynchronous, network=Network(**link))
        step[asynchronous] = simulation.makespan
        expected = data_parallel_step_seconds(1.0, seconds, 3200, 4, n_buckets=n_buckets, overlap=asynchronous, **link)
        assert simulation.makespan == pytest.approx(expected)
        for found in overlap(simulation.timeline):
            once = communication_seconds("all_reduce", 3200 / n_buckets, 4, **link)
            assert found.communication == pytest.approx(n_buckets * once)
            assert found.compute == pytest.approx(1.0 + seconds)
            assert found.exposed == pytest.approx(simulation.makespan - found.compute)
    assert found.hidden == pytest.approx(step[False] - step[True], abs=1e-12)


def test_other_lanes_and_other_ranks() -> None:
    spans = [Span(1, "to host", "", 0.0, 2.0), Span(0, "compute", "", 1.0, 4.0), Span(1, "host compute", "", 1.0, 3.0)]
    first, second = overlap(spans, lanes=("to host",), behind=("host compute",))
    assert (first, second) == (Overlap(0, 0, 0, 0), Overlap(1, 2, 2, 1))
    assert overlap([]) == []
