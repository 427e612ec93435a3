"""Schedules by name: what holds for each of them whatever the sizes and times, and what sizes each refuses."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.distributed.pipeline import SCHEDULES, Kind, Schedule, make_schedule, simulate, validate


@st.composite
def made(draw: st.DrawFn) -> tuple[str, Schedule]:
    """Any schedule by name, of any sizes that it takes."""
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    p, m = draw(st.integers(1, 6)), draw(st.integers(1, 13))
    v = draw(st.integers(1, 3)) if SCHEDULES[name].takes_chunks else 1
    if name in ("chimera", "dualpipe"):
        p, m = 2 * ((p + 1) // 2), 2 * m
    if name == "dualpipe":
        m += 2 * p - 2
    if name == "interleaved" and v > 1:
        m = p * ((m + 3) // 4)
    return name, make_schedule(name, p, m, v)


@given(made())
@settings(max_examples=100, deadline=None)
def test_every_schedule_is_valid_and_has_as_many_pieces_as_its_recipe_says(drawn: tuple[str, Schedule]) -> None:
    name, schedule = drawn
    validate(schedule)
    assert schedule.synchronous
    if not SCHEDULES[name].takes_chunks:
        assert schedule.n_pieces == SCHEDULES[name].pieces_per_stage * schedule.n_stages
    passes = [a.kind for stage in range(schedule.n_stages) for a in schedule.computes(stage)]
    total = schedule.n_micro_batches * schedule.n_pieces
    assert passes.count(Kind.FORWARD) == total
    assert passes.count(Kind.BACKWARD) + passes.count(Kind.BACKWARD_INPUT) == total
    assert passes.count(Kind.BACKWARD_INPUT) == passes.count(Kind.BACKWARD_WEIGHT)


@given(made(), st.data())
@settings(max_examples=60, deadline=None)
def test_none_beats_its_busiest_stage_or_its_longest_chain(drawn: tuple[str, Schedule], data: st.DataObject) -> None:
    """With pieces of any lengths: nothing is lost or done twice, and no bubble is negative."""
    _, schedule = drawn
    times = st.lists(st.integers(1, 9), min_size=schedule.n_pieces, max_size=schedule.n_pieces)
    f, i, w = data.draw(times), data.draw(times), data.draw(times)
    b = [sum(pair) for pair in zip(i, w, strict=True)]
    timeline = simulate(schedule, forward=f, backward=b, backward_input=i, backward_weight=w)
    lasts = {Kind.FORWARD: f, Kind.BACKWARD: b, Kind.BACKWARD_INPUT: i, Kind.BACKWARD_WEIGHT: w}
    work = [
        sum(lasts[a.kind][schedule.piece(stage, a.chunk)] for a in schedule.computes(stage))
        for stage in range(schedule.n_stages)
    ]
    assert timeline.makespan >= max(*work, sum(f) + sum(i)) - 1e-9
    assert timeline.idle == pytest.approx([timeline.makespan - busy for busy in work])
    assert timeline.bubble == pytest.approx(1 - sum(work) / (schedule.n_stages * timeline.makespan))


@given(made(), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_memory_does_not_depend_on_times(drawn: tuple[str, Schedule], f: int, i: int, w: int) -> None:
    """As a stage keeps to its order."""
    _, schedule = drawn
    timeline = simulate(schedule, forward=f, backward=i + w, backward_input=i, backward_weight=w)
    assert timeline.peak_in_flight == pytest.approx(validate(schedule).peak_in_flight)
    assert max(timeline.peak_in_flight) <= schedule.n_micro_batches + 1e-9


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"chimera", "dualpipe"}))
def test_one_stage_and_one_micro_batch_are_schedules_too(name: str) -> None:
    for p, m in [(1, 1), (1, 3), (3, 1)]:
        v = 2 if SCHEDULES[name].takes_chunks and m % p == 0 else 1
        schedule = make_schedule(name, p, m, v)
        validate(schedule)
        timeline = simulate(schedule)
        if p == 1:
            assert timeline.bubble == pytest.approx(0)
        elif schedule.splits_backward:  # nothing overlaps but W with the I of the stages before
            assert 2 * p + 1 <= timeline.makespan < 3 * p
        else:
            assert timeline.makespan == 3 * p


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("interleaved", 4, 6, 2), r"n_micro_batches .*multiple of 4, because .*; got 6, .* 4 or 8"),
        (("interleaved", 4, 3, 2), r"n_micro_batches .*multiple of 4.*got 3, the nearest that will do: 4$"),
        (("chimera", 3, 4), r"n_stages of Chimera .*got 3, .* 2 or 4"),
        (("chimera", 1, 4), r"n_stages of Chimera .*got 1, .*: 2$"),
        (("chimera", 4, 7), r"n_micro_batches of Chimera .*got 7, .* 6 or 8"),
        (("dualpipe", 5, 10), r"n_stages of DualPipe .*got 5, .* 4 or 6"),
        (("dualpipe", 4, 9), r"n_micro_batches of DualPipe .*got 9, .* 8 or 10"),
        (("dualpipe", 4, 6), r"at least twice the 4 stages.*got 6, the nearest that will do: 8"),
        (("gpipe", 4, 6, 2), r"interleaved or breadth-first.*gpipe cuts the model into 1 a stage; got 2, .*is 1"),
        (("zb-v", 4, 6, 3), r"zb-v cuts the model into 2 a stage; got 3, .*is 2"),
        (("gpipe", 0, 4), r"n_stages of GPipe must be at least 1, got 0; .* 1"),
        (("1f1b", 2, -3), r"n_micro_batches of 1F1B must be at least 1, got -3"),
        (("interleaved", 2, 4, 0), r"n_chunks of interleaved 1F1B must be at least 1, got 0"),
        (("gpipe", 2, 4, 0), r"n_chunks of gpipe must be at least 1, got 0"),
        (("chimra", 2, 4), r"schedule must be one of naive, .*got 'chimra'; the nearest is \"chimera\""),
        (("ZB_V", 2, 4), r"the nearest is \"zb-v\""),
        (("1F1B", 2, 4), r"the nearest is \"1f1b\""),
    ],
)
def test_sizes_that_a_schedule_does_not_take_are_refused_with_the_nearest_that_it_does(
    arguments: tuple[str, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(*arguments)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("wrong", [2.0, "4", True, None])
def test_sizes_are_whole_numbers(name: str, wrong: object) -> None:
    with pytest.raises(TypeError, match=r"n_stages of .* must be an int"):
        make_schedule(name, wrong, 8)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"n_micro_batches of .* must be an int"):
        make_schedule(name, 2, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"n_chunks of .* must be an int"):
        make_schedule(name, 2, 8, wrong)  # type: ignore[arg-type]
