"""A pipeline's picture: a box for each pass, at its time, in its stage's row, coloured by kind and chunk."""

import math
from dataclasses import astuple
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Rectangle

from minillm.distributed import Span
from minillm.plots import COLOURS, pipeline_timeline, play

STEP = [
    Span(0, "compute", "F0", 0.0, 1.0),
    Span(1, "compute", "F0", 1.0, 2.0),
    Span(0, "communication", "RF0", 1.0, 1.5),
    Span(1, "compute", "I0@2", 2.0, 3.0),
    Span(1, "compute", "W0@2", 3.0, 4.0),
    Span(0, "compute", "B0", 3.0, 5.0),
    Span(0, "compute", "U0@3", 5.0, 5.5),
]


def _boxes(axes: Axes) -> list[tuple[int, float, float, str]]:
    return [
        (round(p.get_y() + p.get_height() / 2), p.get_x(), p.get_x() + p.get_width(), to_hex(p.get_facecolor()).upper())
        for p in axes.patches
        if isinstance(p, Rectangle) and p.get_gid() != "idle"
    ]


def _width(patch: Any) -> float:
    return float(patch.get_width())


def _legend(figure: Any) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_draws_each_pass_where_it_was() -> None:
    figure = pipeline_timeline(STEP, title="One $micro$-batch")
    (axes,) = figure.axes
    assert _boxes(axes) == [
        (0, 0.0, 1.0, COLOURS[0]),
        (1, 1.0, 2.0, COLOURS[0]),
        (1, 2.0, 3.0, COLOURS[3]),
        (0, 3.0, 5.0, COLOURS[2]),
        (1, 3.0, 4.0, COLOURS[4]),
        (0, 5.0, 5.5, COLOURS[6]),
    ]
    assert [text.get_text() for text in axes.texts] == ["0"] * 6
    assert [text.get_text() for text in axes.get_yticklabels()] == ["stage 0", "stage 1"]
    assert axes.get_ylim()[0] > 1 > 0 > axes.get_ylim()[1]  # stage 0 is the uppermost
    assert _legend(figure) == ["forward", "backward", "backward, input", "backward, weights", "update"]
    assert (axes.get_title(loc="left"), axes.get_xlabel()) == ("One $micro$-batch", "forward passes")
    idle = [p for p in axes.patches if p.get_gid() == "idle"]
    assert [p.get_width() for p in idle if isinstance(p, Rectangle)] == [5.5, 5.5]
    figure.draw_without_rendering()


def test_takes_tuples_and_objects_and_any_order() -> None:
    first = pipeline_timeline([astuple(span) for span in STEP])
    second = pipeline_timeline(reversed(STEP))
    assert _boxes(first.axes[0]) == _boxes(second.axes[0])


def test_chunks_have_shades_and_panels_one_scale() -> None:
    looped = [
        (0, "compute", f"F{m}.{c}" if c else f"F{m}", 3.0 * c + m, 3.0 * c + m + 1) for c in (0, 1) for m in range(3)
    ]
    figure = pipeline_timeline({"plain": STEP, "looped": looped}, title="Both", unit="steps")
    plain, chunks = figure.axes
    assert plain.get_xlim() == chunks.get_xlim()
    grey = [{_width(p) for p in axes.patches if p.get_gid() == "idle"} for axes in (plain, chunks)]
    assert grey == [{5.5}, {6.0}]  # each to its own end
    shades = [colour for *_, colour in _boxes(chunks)]
    assert shades[:3] == [COLOURS[0]] * 3
    assert len(set(shades)) == 2
    assert "forward, chunk 1" in _legend(figure)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["plain", "looped"]
    assert (figure.get_suptitle(), chunks.get_xlabel(), plain.get_xlabel()) == ("Both", "steps", "")
    figure.draw_without_rendering()


def test_boxes_without_room_have_no_number() -> None:
    many = [(0, "compute", f"F{m}", float(m), m + 1.0) for m in range(400)]
    assert not pipeline_timeline(many).axes[0].texts


def _luminance(colour: Any) -> float:
    """Relative, of WCAG 2: 0 black, 1 white."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_numbers_can_be_read_on_their_boxes() -> None:
    names = [f"{kind}0.{chunk}" for kind in "FBIWU" for chunk in range(7)]
    (axes,) = pipeline_timeline([(0, "compute", name, float(i), i + 1.0) for i, name in enumerate(names)]).axes
    boxes = [colour for *_, colour in _boxes(axes)]
    assert len(boxes) == len(axes.texts) == len(names)
    for name, box, text in zip(names, boxes, axes.texts, strict=True):
        dark, light = sorted([_luminance(box), _luminance(text.get_color())])
        assert (light + 0.05) / (dark + 0.05) >= 2.9, name


def _svg(spans: Any, **arguments: Any) -> ElementTree.Element:
    return ElementTree.fromstring(play(spans, **arguments)._repr_html_())


def test_plays_each_pass_from_its_start_to_its_end() -> None:
    space = "{http://www.w3.org/2000/svg}"
    root = _svg(STEP, seconds=11.0, title="a < b")
    grown = [rect for rect in root.iter(f"{space}rect") if len(rect)]
    assert [rect.findtext(f"{space}title") for rect in grown] == ["F0", "F0", "I0", "B0", "W0", "U0"]
    spans = sorted((span for span in STEP if span.lane == "compute"), key=lambda span: (span.start, span.rank))
    for rect, span in zip(grown, spans, strict=True):
        animate = rect.find(f"{space}animate")
        assert animate is not None
        times = [float(time) for time in animate.attrib["keyTimes"].split(";")]
        assert times == sorted(times)
        assert [time * 11.0 * 1.25 for time in times[1:3]] == pytest.approx([2 * span.start, 2 * span.end], abs=1e-3)
        widths = [float(width) for width in animate.attrib["values"].split(";")]
        assert widths == [0, 0, *[float(rect.attrib["width"])] * 2]  # without animation: the whole picture
    texts = [text.text for text in root.iter(f"{space}text")]
    assert texts[:3] == ["a < b", "stage 0", "stage 1"]
    assert not list(root.iter(f"{space}script"))
    source = play(STEP)._repr_html_()
    assert "http" not in source.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert source == play(list(STEP))._repr_html_()  # nothing drawn by chance: the notebook's output stays
    assert repr(play(STEP, title="a step")) == "<a step: 5 passes on 2 stages>"


@pytest.mark.parametrize("draw", [pipeline_timeline, play])
@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([], "holds no pass"),
        ([(0, "communication", "RF0", 0.0, 1.0)], "holds no pass"),
        ([(0, "compute", "forward", 0.0, 1.0)], "'forward' of stage 0: expected a pass like"),
        ([(0, "compute", "RF0", 0.0, 1.0)], "'RF0' of stage 0: expected a pass like"),
        ([(2, "compute", "F0", 2.0, 1.0)], "'F0' of stage 2 from 2.0 to 1.0: not a length of time"),
        ([(0, "compute", "F0", 0.0, math.inf)], "not a length of time"),
    ],
)
def test_refuses_what_is_no_schedule(draw: Any, spans: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        draw(spans)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_playing_takes_time(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds must be above 0"):
        play(STEP, seconds=seconds)
