"""Timelines: what each rank did and when, as boxes on lanes."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minillm.plots.style import COLOURS, GREY, picture, style

_WIDTH = 9.5  # inches: what a notebook page shows without shrinking the labels
_LETTER = 0.075  # inches that a letter of 8 points takes
# One colour for one lane in every figure; other lanes, and names, take what is left.
_LANES = {
    "compute": COLOURS[0],
    "communication": COLOURS[1],
    "to host": COLOURS[3],
    "to device": COLOURS[5],
    "host compute": COLOURS[4],
}
_WAIT = "#DDDDDD"
_UNITS = ((1.0, "s"), (1e3, "ms"), (1e6, "µs"))

Box = tuple[int, str, str, float, float]
"""(rank, lane, name, start, end)."""


def timeline(
    spans: Iterable[Any] | Mapping[str, Iterable[Any]],
    *,
    ranks: Collection[int] | None = None,
    lanes: Sequence[str] | None = None,
    colours: Mapping[str, str] | None = None,
    unit: str | None = None,
    title: str | None = None,
) -> Figure:
    """Draw a row for each rank and lane, and a box for each span, with its name where there is room.

    A rank's "wait" stands grey in the row of its first lane: it is where that stood still. What overlaps on one lane is
    stacked.

    spans: of each (rank, lane, name, start, end), as tuples or as objects with these attributes (a simulation's
        timeline); or panel title -> such spans, for panels that share their scale. Seconds, if `unit` is None.
    ranks, lanes: draw these alone, lanes in this order; None draws all, lanes in order of appearance, "compute" first.
    colours: a lane, or how names begin -> colour, such as {"F": ..., "B": ...} for "F0", "B0", "F1"; names win over
        lanes, and the longest beginning over others. Lanes without one have their own, the same in all figures.
    unit: what the numbers are ("steps"); None writes seconds as s, ms or µs.

    Raises ValueError when there is nothing to draw, or for a span that ends before it starts or is not finite.
    """
    panels = spans if isinstance(spans, Mapping) else {"": spans}
    drawn = {name: _boxes(panel, ranks, lanes) for name, panel in panels.items()}
    every = [box for boxes in drawn.values() for box in boxes]
    if not every:
        raise ValueError("spans holds nothing to draw" + (" of these ranks and lanes" if ranks or lanes else ""))
    end = max(box[4] for box in every)
    scale, word = _unit(end) if unit is None else (1.0, unit)
    order = _lane_order(every) if lanes is None else [lane for lane in lanes if lane != "wait"]
    paint = _Paint(every, order, colours or {})
    rows = {name: _rows(boxes, order) for name, boxes in drawn.items()}
    n_rows = sum(len(panel) for panel in rows.values())
    height = 0.3 if n_rows <= 24 else max(0.12, 7.2 / n_rows)
    with style():
        figure, axes_list = picture(_WIDTH, height * n_rows + 0.9 + 0.35 * len(drawn), rows=len(drawn))
        figure.get_layout_engine().set(h_pad=0.04)  # type: ignore[call-arg, union-attr]
        for axes, (name, panel) in zip(axes_list, rows.items(), strict=True):
            _draw(axes, panel, paint, scale, end)
            if name:
                axes.set_title(name, fontsize=11, parse_math=False)
        axes_list[-1].set_xlabel(word)
        if len(paint.legend) > 1:
            figure.legend(
                handles=[Patch(color=colour, label=label) for label, colour in paint.legend.items()],
                loc="outside lower center",
                ncols=min(6, len(paint.legend)),
            )
        if title and isinstance(spans, Mapping):
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, parse_math=False)
        elif title:
            axes_list[0].set_title(title, parse_math=False)
    return figure


def as_box(span: Any) -> Box:
    """A span that is given as (rank, lane, name, start, end), or as an object with these attributes."""
    plain = tuple(span) if isinstance(span, tuple | list) else None
    return plain or (span.rank, span.lane, span.name, span.start, span.end)


def _boxes(spans: Iterable[Any], ranks: Collection[int] | None, lanes: Sequence[str] | None) -> list[Box]:
    boxes = []
    for span in spans:
        rank, lane, name, start, end = as_box(span)
        if not (math.isfinite(start) and math.isfinite(end) and start <= end):
            raise ValueError(f"spans holds {name!r} of rank {rank} from {start} to {end}: not a length of time")
        if (ranks is None or rank in ranks) and (lanes is None or lane in lanes):
            boxes.append((rank, lane, name, start, end))
    return boxes


def _lane_order(boxes: Sequence[Box]) -> list[str]:
    seen = dict.fromkeys(lane for _, lane, *_ in boxes if lane != "wait")
    return sorted(seen, key=lambda lane: lane != "compute")


def _rows(boxes: Sequence[Box], order: Sequence[str]) -> list[tuple[str, list[Box]]]:
    """Label and boxes of each row, top to bottom; those of one lane that overlap are in rows of their own."""
    lines: dict[tuple[int, str], list[list[Box]]] = defaultdict(list)
    for box in sorted((box for box in boxes if box[1] != "wait"), key=lambda box: (box[3], box[4])):
        free = [line for line in lines[box[0], box[1]] if line[-1][4] <= box[3] + 1e-12 * abs(box[3])]
        if free:
            free[0].append(box)
        else:
            lines[box[0], box[1]].append([box])
    rows = []
    for rank in sorted({box[0] for box in boxes}):
        own = [(lane, line) for lane in order for line in lines.get((rank, lane), [])] or [("", [])]
        own[0][1].extend(box for box in boxes if box[0] == rank and box[1] == "wait")
        rows += [(f"rank {rank}" if place == 0 else "", line) for place, (_, line) in enumerate(own)]
    return rows


class _Paint:
    """The colour of each span, and what the legend says."""

    def __init__(self, boxes: Sequence[Box], order: Sequence[str], colours: Mapping[str, str]) -> None:
        spare = [colour for colour in (*COLOURS, GREY) if colour not in (*_LANES.values(), *colours.values())]
        others = [lane for lane in order if lane not in _LANES and lane not in colours]
        self._lanes = {"wait": _WAIT} | _LANES
        self._lanes |= {lane: spare[place % len(spare)] for place, lane in enumerate(others)}
        self._lanes |= {lane: colour for lane, colour in colours.items() if lane in order or lane == "wait"}
        self._names = {name: colour for name, colour in colours.items() if name not in self._lanes}
        words = {word for box in boxes if (word := self._word(box)) is not None}
        lanes = {box[1] for box in boxes if self._word(box) is None}
        self.legend = {word: colour for word, colour in self._names.items() if word in words}
        self.legend |= {lane: self._lanes[lane] for lane in [*order, "wait"] if lane in lanes}

    def of(self, box: Box) -> str:
        word = self._word(box)
        return self._lanes[box[1]] if word is None else self._names[word]

    def _word(self, box: Box) -> str | None:
        fitting = [word for word in self._names if box[2].startswith(word)] if box[1] != "wait" else []
        return max(fitting, key=len) if fitting else None


def _draw(axes: Axes, rows: Sequence[tuple[str, list[Box]]], paint: _Paint, scale: float, end: float) -> None:
    inch = (end or 1.0) * scale / (_WIDTH - 1.1)  # of data, on the page
    for place, (_, line) in enumerate(rows):
        for box in line:
            _, lane, name, start, stop = box
            width = (stop - start) * scale
            (bar,) = axes.barh(
                place, width, left=start * scale, height=0.82, color=paint.of(box), edgecolor="white", linewidth=0.6
            )
            bar.set_label(name)
            if name and lane != "wait" and len(name) * _LETTER * inch < width and len(rows) <= 24:
                at = ((start + stop) / 2 * scale, place)
                axes.text(*at, name, ha="center", va="center", fontsize=8, color=_ink(paint.of(box)), parse_math=False)
    axes.set_xlim(0, (end or 1.0) * scale * 1.005)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    labelled = [place for place, (label, _) in enumerate(rows) if label]
    axes.set_yticks(labelled, [rows[place][0] for place in labelled])
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    for place in labelled[1:]:
        if len(labelled) < len(rows):  # ranks of several rows are told apart by a line
            axes.axhline(place - 0.5, color="#E4E4E4", linewidth=0.8)


def _unit(end: float) -> tuple[float, str]:
    for scale, word in _UNITS:
        if end * scale >= 1:
            return scale, word
    return _UNITS[-1]


def _ink(colour: str) -> str:
    """White on dark boxes, black on light ones."""
    if not colour.startswith("#"):
        return "black"
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else "black"
