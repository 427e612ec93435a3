"""A box for each span, at its time, in its rank's row, in its lane's colour."""

import math
from dataclasses import astuple
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from minillm.distributed import Span
from minillm.plots import COLOURS, timeline

STEP = [
    Span(0, "compute", "forward", 0.0, 2e-3),
    Span(0, "compute", "backward", 2e-3, 6e-3),
    Span(0, "communication", "bucket 1", 4e-3, 7e-3),
    Span(0, "wait", "all_reduce", 6e-3, 7e-3),
    Span(1, "compute", "forward", 0.0, 3e-3),
]


def _boxes(axes: Axes) -> list[tuple[int, float, float, str]]:
    """Row, start, end and colour."""
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return [
        (
            round(patch.get_y() + patch.get_height() / 2),
            patch.get_x(),
            patch.get_x() + patch.get_width(),
            to_hex(patch.get_facecolor()).upper(),
        )
        for patch in patches
    ]


def _legend(figure: Any) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_draws_each_span_where_it_was() -> None:
    figure = timeline(STEP, title="A $step$")
    (axes,) = figure.axes
    drawn = [(row, pytest.approx(start), pytest.approx(end), colour) for row, start, end, colour in _boxes(axes)]
    compute, communication, wait = COLOURS[0], COLOURS[1], "#DDDDDD"
    assert drawn == [
        (0, 0.0, 2.0, compute),
        (0, 2.0, 6.0, compute),
        (0, 6.0, 7.0, wait),  # in the rank's first row
        (1, 4.0, 7.0, communication),
        (2, 0.0, 3.0, compute),
    ]
    assert axes.get_xlabel() == "ms"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["rank 0", "rank 1"]
    assert list(axes.get_yticks()) == [0, 2]
    assert axes.get_ylim()[0] > 2 > 0 > axes.get_ylim()[1]  # rank 0 is the uppermost
    assert [text.get_text() for text in axes.texts] == ["forward", "backward", "bucket 1", "forward"]
    assert _legend(figure) == ["compute", "communication", "wait"]
    assert axes.get_title(loc="left") == "A $step$"
    figure.draw_without_rendering()


def test_takes_tuples_and_objects_and_any_order() -> None:
    first = timeline([astuple(span) for span in STEP])
    second = timeline(reversed(STEP))
    assert sorted(_boxes(first.axes[0])) == sorted(_boxes(second.axes[0]))


def test_chooses_ranks_and_lanes() -> None:
    axes = timeline(STEP, ranks=[0], lanes=("communication", "compute")).axes[0]
    assert [row for row, *_ in _boxes(axes)] == [0, 1, 1]  # lanes in the order given, and no wait
    assert [text.get_text() for text in axes.get_yticklabels()] == ["rank 0"]


def test_what_overlaps_on_a_lane_is_stacked() -> None:
    spans = [(0, "communication", "", 0.0, 2.0), (0, "communication", "", 1.0, 3.0), (0, "communication", "", 2.0, 4.0)]
    assert [(row, start) for row, start, *_ in _boxes(timeline(spans).axes[0])] == [(0, 0.0), (0, 2.0), (1, 1.0)]


def test_panels_share_their_scale() -> None:
    figure = timeline({"plain": STEP, "slow": [(0, "compute", "x", 0.0, 14e-3)]}, title="Two ways")
    plain, slow = figure.axes
    assert plain.get_xlim() == slow.get_xlim()
    assert plain.get_xlim()[1] >= 14
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["plain", "slow"]
    assert (figure.get_suptitle(), slow.get_xlabel(), plain.get_xlabel()) == ("Two ways", "ms", "")
    figure.draw_without_rendering()


def test_draws_a_pipelines_schedule_as_papers_do() -> None:
    """GPipe with three stages and four micro-batches: a row a rank, names in boxes, forward and backward by colour."""
    stages, batches = 3, 4
    spans = [(s, "compute", f"F{m}", s + m, s + m + 1) for s in range(stages) for m in range(batches)]
    begin = stages + batches - 1
    spans += [
        (s, "compute", f"B{m}", t, t + 2)
        for s in range(stages)
        for m in range(batches)
        for t in [begin + 2 * (stages - 1 - s + m)]
    ]
    figure = timeline(spans, unit="steps", colours={"F": COLOURS[0], "B": COLOURS[2]})
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == [
        f"{kind}{m}" for _ in range(stages) for kind in "FB" for m in range(batches)
    ]
    assert [row for row, *_ in _boxes(axes)] == [stage for stage in range(stages) for _ in range(2 * batches)]
    for _, start, end, colour in _boxes(axes):
        assert colour == (COLOURS[0] if end - start == 1 else COLOURS[2])
    assert _legend(figure) == ["F", "B"]
    assert axes.get_xlabel() == "steps"
    figure.draw_without_rendering()


def test_colours_of_lanes_are_stable_and_may_be_chosen() -> None:
    hosts = [(0, lane, "", float(i), i + 1.0) for i, lane in enumerate(("to host", "mine", "compute", "to device"))]
    colours = {row: colour for row, _, _, colour in _boxes(timeline(hosts).axes[0])}
    assert colours[0] == COLOURS[0]  # compute comes first
    assert len(set(colours.values())) == 4
    alone = _boxes(timeline(hosts[:1]).axes[0])
    assert alone[0][3] == colours[1]  # "to host", whatever else there is
    chosen = _boxes(timeline(hosts, colours={"mine": "#123456", "to": "#654321"}).axes[0])
    assert "#123456" in [colour for *_, colour in chosen]
    assert "#654321" not in [colour for *_, colour in chosen]  # no name begins so


def test_many_ranks_stay_on_a_page() -> None:
    figure = timeline([(rank, "compute", "forward", 0.0, 1.0) for rank in range(64)])
    assert figure.get_size_inches()[1] < 10
    assert not figure.axes[0].texts
    assert not figure.legends  # one colour needs no legend


@pytest.mark.parametrize(
    ("spans", "arguments", "words"),
    [
        ([], {}, "nothing to draw"),
        ({}, {}, "nothing to draw"),
        (STEP, {"ranks": [7]}, "nothing to draw of these ranks and lanes"),
        ([(0, "compute", "x", 2.0, 1.0)], {}, "'x' of rank 0 from 2.0 to 1.0: not a length of time"),
        ([(0, "compute", "x", 0.0, math.inf)], {}, "not a length of time"),
    ],
)
def test_refuses_what_is_no_timeline(spans: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        timeline(spans, **arguments)
