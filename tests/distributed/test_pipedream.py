"""PipeDream's schedules: which weights a pass works with, how many are held, and that nobody waits in between."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.distributed.pipeline import Kind, Schedule, pipedream, pipedream_2bw, simulate, validate


@pytest.mark.parametrize("p", range(1, 9))
def test_stashing_has_the_versions_of_the_paper(p: int) -> None:
    """Micro-batch b on stage s: the weights after b - (p - 1 - s) updates (SOSP 2019, section 3.3)."""
    for m in range(1, 25):
        schedule = pipedream(p, m)
        proof = validate(schedule)
        for stage in range(p):
            for action in schedule.computes(stage):
                if action.kind is not Kind.UPDATE:
                    assert action.version == max(0, action.micro_batch - (p - 1 - stage))
        assert proof.peak_in_flight == tuple(min(p - s, m) for s in range(p))
        if m >= 2 * p:
            assert proof.weight_versions == tuple(p - s for s in range(p))


@pytest.mark.parametrize("p", range(1, 9))
def test_vertical_sync_has_one_version_on_all_stages_and_p_are_held(p: int) -> None:
    for m in range(1, 25):
        schedule = pipedream(p, m, vertical_sync=True)
        proof = validate(schedule)
        used = [{a.micro_batch: a.version for a in schedule.computes(s) if a.kind is not Kind.UPDATE} for s in range(p)]
        assert all(versions == {b: max(0, b - (p - 1)) for b in range(m)} for versions in used)
        if m >= 2 * p:
            assert proof.weight_versions == (p,) * p


@pytest.mark.parametrize("p", range(1, 9))
def test_2bw_is_one_update_behind_and_holds_two_versions(p: int) -> None:
    for accumulate in (p, p + 1, 2 * p):
        schedule = pipedream_2bw(p, 4 * accumulate, accumulate=accumulate)
        for stage in range(p):
            for action in schedule.computes(stage):
                group = action.micro_batch // accumulate
                assert action.version == (group + 1 if action.kind is Kind.UPDATE else max(0, group - 1))
        assert max(validate(schedule).weight_versions) == 2
        assert validate(schedule).peak_in_flight == tuple(float(p - s) for s in range(p))


@pytest.mark.parametrize("schedule", [pipedream(4, 40), pipedream(4, 40, vertical_sync=True), pipedream_2bw(4, 40)])
def test_the_pipeline_runs_empty_once_only(schedule: Schedule) -> None:
    """A stage waits (p - 1) (F + B) in the whole stream, however long: a flush would wait that long each update."""
    timeline = simulate(schedule)
    assert timeline.makespan == 40 * 3 + 3 * 3
    for stage in range(4):
        spans = [s for s in timeline.spans if s.rank == stage and s.lane == "compute" and s.end > s.start]
        steady = [s for s in spans if s.start >= 12 and s.end <= timeline.makespan - 12]
        assert all(a.end == b.start for a, b in pairwise(steady))


def test_without_stashing_the_backward_pass_has_the_weights_of_its_time() -> None:
    schedule = pipedream(3, 6, stashing=False)
    assert validate(schedule).weight_versions == (1, 1, 1)
    forward, backward = (
        {a.micro_batch: a.version for a in schedule.computes(0) if a.kind is kind}
        for kind in (Kind.FORWARD, Kind.BACKWARD)
    )
    assert [backward[b] - forward[b] for b in range(6)] == [0, 1, 2, 2, 2, 2]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 30), st.sampled_from([(True, False), (True, True), (False, False)]))
def test_every_gradient_makes_one_update_in_order(p: int, m: int, how: tuple[bool, bool]) -> None:
    schedule = pipedream(p, m, stashing=how[0], vertical_sync=how[1])
    validate(schedule)
    for stage in range(p):
        updates = [(a.micro_batch, a.version) for a in schedule.computes(stage) if a.kind is Kind.UPDATE]
        assert updates == [(b, b + 1) for b in range(m)]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="n_stages of PipeDream must be at least 1, got 0"):
        pipedream(0, 4)
    with pytest.raises(ValueError, match="vertical_sync needs stashing"):
        pipedream(2, 4, vertical_sync=True, stashing=False)
    with pytest.raises(ValueError, match=r"accumulate of PipeDream-2BW must be at least the 4 stages.*nearest.*: 4"):
        pipedream_2bw(4, 8, accumulate=3)
    with pytest.raises(ValueError, match=r"must be a multiple of 4.*got 9, the nearest that will do: 8 or 12"):
        pipedream_2bw(4, 9)
