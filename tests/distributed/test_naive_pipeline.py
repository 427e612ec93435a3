"""The naive pipeline: one stage works, the others wait."""

import itertools

import pytest

from minillm.distributed.pipeline import naive, simulate, validate


@pytest.mark.parametrize("p", range(1, 9))
def test_one_stage_computes_at_a_time(p: int) -> None:
    for m in range(1, 25):
        proof = validate(naive(p, m))
        assert proof.bubble == pytest.approx(1 - 1 / p)
        assert list(proof.peak_in_flight) == [1] * p
    timeline = simulate(naive(p, m))
    assert timeline.makespan == 3 * m * p
    spans = sorted((span.start, span.end) for span in timeline.spans)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_the_order_of_a_small_one() -> None:
    assert str(naive(2, 2)).splitlines()[1:] == ["stage 0: F0 B0 F1 B1", "stage 1: F0 B0 F1 B1"]
