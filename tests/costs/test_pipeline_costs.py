"""Closed forms of pipelines, held against schedules that are run on a clock pass by pass."""

import itertools
from typing import Any

import pytest

from minillm.costs import (
    pipedream_staleness,
    pipedream_versions,
    pipeline_bubble,
    pipeline_bytes_sent,
    pipeline_in_flight,
    zero_bubble_seconds,
)
from minillm.distributed.pipeline import (
    Kind,
    Schedule,
    gpipe,
    interleaved,
    make_schedule,
    one_f_one_b,
    pipedream,
    simulate,
    validate,
    zero_bubble,
)

SIZES = [(p, m) for p in range(1, 9) for m in (1, 2, 3, 5, 8, 13, 24)]


@pytest.mark.parametrize("backward", [1.0, 2.0, 3.5])
def test_the_bubble_is_that_of_a_schedule_on_the_clock(backward: float) -> None:
    for p, m in SIZES:
        for generator in (gpipe, one_f_one_b):
            bubble = simulate(generator(p, m), forward=1.0, backward=backward).bubble
            assert bubble == pytest.approx(pipeline_bubble(p, m), abs=1e-12)
    for p, v, rounds in itertools.product(range(2, 6), range(1, 5), (1, 2, 3)):
        m = p * rounds
        bubble = simulate(interleaved(p, m, v), forward=1.0, backward=backward).bubble
        assert bubble == pytest.approx(pipeline_bubble(p, m, v), abs=1e-12)


def test_the_printed_example_of_the_gpipe_paper() -> None:
    """Section 2.3: the bubble is negligible when m >= 4 p."""
    assert pipeline_bubble(4, 16) < 0.16
    assert pipeline_bubble(1, 1) == 0


@pytest.mark.parametrize("times", [(1.0, 1.0, 1.0), (1.0, 1.2, 0.9), (2.0, 2.5, 2.0)])
@pytest.mark.parametrize("variant", ["h1", "h2"])
def test_zero_bubble_seconds(variant: str, times: tuple[float, float, float]) -> None:
    """As the paper counts: the greatest time between a stage's first and last pass, less its work."""
    forward, half, weight = times
    for p in range(1, 9):
        m = 4 * p
        timeline = simulate(
            zero_bubble(p, m, variant=variant),
            forward=forward,
            backward=half + weight,
            backward_input=half,
            backward_weight=weight,
        )
        own = [[span for span in timeline.spans if span.rank == stage] for stage in range(p)]
        longest = max(max(s.end for s in spans) - min(s.start for s in spans) for spans in own)
        expected = zero_bubble_seconds(p, forward, half, weight, variant=variant)
        assert longest - m * sum(times) == pytest.approx(expected, abs=1e-9)


def test_zero_bubble_seconds_are_never_below_none() -> None:
    assert zero_bubble_seconds(4, 1.0, 1.0, 1.5, variant="h2") == 0
    assert zero_bubble_seconds(4, 1.0, 1.0, 1.5, variant="h1") == 1.5


def test_no_more_in_flight_than_there_are_chunks_of_micro_batches() -> None:
    assert pipeline_in_flight("interleaved", 4, 4, n_chunks=2) == simulate(interleaved(4, 4, 2)).peak_in_flight[0] == 4


def made(name: str, p: int, m: int, v: int) -> Schedule:
    return pipedream(p, m) if name == "pipedream" else make_schedule(name, p, m, v)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "pipedream"])
def test_in_flight_is_what_the_lists_keep(name: str) -> None:
    for p in range(1, 7):
        for v in (1, 2, 3) if name == "interleaved" else (1,):
            m = 4 * p
            peaks = simulate(made(name, p, m, v)).peak_in_flight
            expected = [pipeline_in_flight(name, p, m, stage, n_chunks=v) for stage in range(p)]
            assert list(peaks) == pytest.approx(expected)
            if name == "interleaved":
                assert peaks[0] == pytest.approx(
                    pipeline_in_flight("1f1b", p, m) * (1 + (p - 1) / (p * v)) if v > 1 else p
                )


@pytest.mark.parametrize("vertical_sync", [False, True])
def test_versions_and_staleness(vertical_sync: bool) -> None:
    for p in range(1, 9):
        schedule = pipedream(p, 3 * p, vertical_sync=vertical_sync)
        versions = validate(schedule).weight_versions
        assert list(versions) == [pipedream_versions(p, s, vertical_sync=vertical_sync) for s in range(p)]
        for stage in range(p):
            made_here, behind = 0, []
            for action in schedule.computes(stage):
                made_here += action.kind is Kind.UPDATE
                if action.kind is Kind.BACKWARD:
                    behind.append(made_here - action.version)
            assert max(behind) == pipedream_staleness(p, stage, vertical_sync=vertical_sync)


def test_bytes_sent_are_the_messages_of_the_lists() -> None:
    for p, v, rounds in itertools.product(range(1, 6), (1, 2, 3), (1, 3)):
        schedule = interleaved(p, p * rounds, v)
        for stage, actions in enumerate(schedule.actions):
            sends = sum(action.kind.sends for action in actions)
            assert pipeline_bytes_sent(p, p * rounds, 10.0, stage=stage, n_chunks=v) == 10.0 * sends


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pipeline_bubble(0, 4), "n_stages must be at least 1, got 0"),
        (lambda: pipeline_bubble(4, 0), "n_micro_batches must be at least 1, got 0"),
        (lambda: pipeline_bubble(4, 4, 0), "n_chunks must be at least 1, got 0"),
        (lambda: zero_bubble_seconds(4, 1, 1, 1, variant="h3"), "variant must be one of h1, h2, got 'h3'"),
        (lambda: zero_bubble_seconds(4, -1, 1, 1), "forward must be at least 0, got -1"),
        (lambda: pipeline_in_flight("gpipes", 4, 4), "schedule must be one of gpipe, "),
        (lambda: pipeline_in_flight("gpipe", 4, 4, 4), "stage must be 0 to 3, got 4"),
        (lambda: pipedream_versions(4, -1), "stage must be 0 to 3, got -1"),
        (lambda: pipedream_versions(4, 4), "stage must be 0 to 3, got 4"),
        (lambda: pipeline_bytes_sent(4, 4, -1.0), "activation_bytes must be at least 0"),
        (lambda: pipeline_bytes_sent(4, 4, 1.0, stage=4), "stage must be 0 to 3, got 4"),
    ],
)
def test_bad_numbers_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
