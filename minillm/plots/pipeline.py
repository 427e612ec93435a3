"""Pipeline schedules as their papers draw them, and played step by step."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Patch

from minillm.plots.style import COLOURS, Picture, picture, style
from minillm.plots.timeline import as_box

_WIDTH = 9.5  # inches: what a notebook page shows without shrinking the labels
_NAME = re.compile(r"([A-Z]+)(\d+)(?:\.(\d+))?(?:@(\d+))?")
_KINDS = {
    "F": ("forward", COLOURS[0]),
    "B": ("backward", COLOURS[2]),
    "I": ("backward, input", COLOURS[3]),
    "W": ("backward, weights", COLOURS[4]),
    "U": ("update", COLOURS[6]),
}
_SHADES = (0.0, 0.45, 0.65, 0.3, 0.55, 0.75)  # of white, by chunk: neighbours differ
_IDLE = "#F0F0F0"

Box = tuple[int, str, str, int, float, float]
"""(stage, kind, micro-batch, chunk, start, end)."""


def pipeline_timeline(
    panels: Iterable[Any] | Mapping[str, Iterable[Any]], *, unit: str = "forward passes", title: str | None = None
) -> Picture:
    """Draw a row for each stage and a box for each pass, with its micro-batch's number: forward blue, backward green.

    A backward pass in two halves has a colour for each; a stage's chunks are told apart by their shade; what is grey is
    idle. Messages are not drawn (`timeline` does that).

    panels: of each pass (stage, lane, name, start, end), as tuples or as objects with the attributes rank, lane, name,
        start, end (what `simulate` gives); the name says the rest: "F3", "B3.1" for chunk 1, "F3@2" for version 2 of
        the weights. Or panel title -> such spans, for panels that share their scale.
    unit: what the numbers are.

    Raises ValueError when there is nothing to draw, or for a name that is no pass or a span that is no length of time.
    """
    several = panels if isinstance(panels, Mapping) else {"": panels}
    drawn = {name: _boxes(spans) for name, spans in several.items()}
    every = [box for boxes in drawn.values() for box in boxes]
    if not every:
        raise ValueError("panels holds no pass to draw")
    end = max(box[5] for box in every)
    rows = sum(_n_stages(boxes) for boxes in drawn.values())
    with style():
        figure, axes_list = picture(_WIDTH, 0.3 * rows + 0.9 + 0.35 * len(drawn), rows=len(drawn))
        for axes, (name, boxes) in zip(axes_list, drawn.items(), strict=True):
            _draw(axes, boxes, end)
            if name or title:
                axes.set_title(name or title or "", fontsize=11, parse_math=False)
        axes_list[-1].set_xlabel(unit)
        used = dict.fromkeys((kind, chunk) for kind in _KINDS for _, k, _, chunk, *_ in sorted(every) if k == kind)
        several_chunks = any(chunk for _, chunk in used)
        figure.legend(
            handles=[
                Patch(color=_colour(kind, chunk), label=_word(kind, chunk if several_chunks else None))
                for kind, chunk in used
            ],
            loc="outside lower center",
            ncols=min(4 if several_chunks else 5, len(used)),
        )
        if title and isinstance(panels, Mapping):
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, parse_math=False)
    return figure


class Play:
    """A schedule that a notebook plays; made by `play`."""

    def __init__(self, svg: str, says: str) -> None:
        self._svg, self._says = svg, says

    def __repr__(self) -> str:  # what is left of it in a terminal
        return self._says

    def _repr_html_(self) -> str:
        return self._svg


def play(spans: Iterable[Any], *, seconds: float = 12.0, title: str = "") -> Play:
    """A schedule that runs in a notebook: a box appears when its pass starts and grows until it ends, again and again.

    It is one SVG with its own animation: no script, nothing from the network; where animations are not shown (a printed
    page) it is the whole picture.

    spans: see `pipeline_timeline`.
    seconds: that one run takes to watch; the whole picture then stands still for a quarter of that.

    Raises ValueError for spans that cannot be drawn, or seconds that are not above 0.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds must be above 0, got {seconds}")
    boxes = _boxes(spans)
    if not boxes:
        raise ValueError("spans holds no pass to play")
    end, rows = max(box[5] for box in boxes) or 1.0, _n_stages(boxes)
    left, top, width, height = 60, 24 if title else 4, 840, 26
    scale, whole = width / end, seconds * 1.25
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 6} {top + rows * height + 4}" '
        'role="img" font-family="sans-serif" font-size="12" style="max-width:100%">',
        f"<title>{html.escape(title or 'a pipeline schedule')}</title>",
    ]
    if title:
        parts.append(f'<text x="{left}" y="15" font-size="14">{html.escape(title)}</text>')
    for stage in range(rows):
        y = top + stage * height
        parts.append(f'<text x="{left - 6}" y="{y + 17}" text-anchor="end">stage {stage}</text>')
        parts.append(f'<rect x="{left}" y="{y + 2}" width="{width}" height="{height - 4}" fill="{_IDLE}"/>')
    for stage, kind, number, chunk, start, stop in boxes:
        x, y, wide = left + start * scale, top + stage * height, (stop - start) * scale
        begin, done = (round(at / end * seconds / whole, 5) for at in (start, stop))
        colour = _colour(kind, chunk)
        grow = (
            f'<animate attributeName="width" values="0;0;{wide:.2f};{wide:.2f}" keyTimes="0;{begin};{done};1" '
            f'dur="{whole:g}s" repeatCount="indefinite"/>'
        )
        parts.append(
            f'<rect x="{x:.2f}" y="{y + 2}" width="{wide:.2f}" height="{height - 4}" fill="{colour}" stroke="white">'
            f"<title>{kind}{number}</title>{grow}</rect>"
        )
        if wide > 7 * len(number) + 2:
            show = (
                f'<animate attributeName="opacity" values="0;1" keyTimes="0;{begin}" calcMode="discrete" '
                f'dur="{whole:g}s" repeatCount="indefinite"/>'
            )
            ink = _ink(colour)
            parts.append(
                f'<text x="{x + wide / 2:.2f}" y="{y + 17}" text-anchor="middle" fill="{ink}">{number}{show}</text>'
            )
    n_passes = sum(kind != "U" for _, kind, *_ in boxes)
    says = f"<{title or 'a pipeline schedule'}: {n_passes} passes on {rows} stages>"
    return Play("".join([*parts, "</svg>"]), says)


def _boxes(spans: Iterable[Any]) -> list[Box]:
    boxes: list[Box] = []
    for span in spans:
        stage, lane, name, start, end = as_box(span)
        if lane != "compute":
            continue
        found = _NAME.fullmatch(name)
        if found is None or found[1] not in _KINDS:
            raise ValueError(f'spans holds {name!r} of stage {stage}: expected a pass like "F3", "B3.1" or "F3@2"')
        if not (math.isfinite(start) and math.isfinite(end) and 0 <= start <= end):
            raise ValueError(f"spans holds {name!r} of stage {stage} from {start} to {end}: not a length of time")
        boxes.append((stage, found[1], found[2], int(found[3] or 0), start, end))
    return sorted(boxes, key=lambda box: (box[4], box[0]))


def _n_stages(boxes: Sequence[Box]) -> int:
    return 1 + max((box[0] for box in boxes), default=0)


def _colour(kind: str, chunk: int) -> str:
    white = _SHADES[chunk % len(_SHADES)]
    red, green, blue = (part + (1 - part) * white for part in to_rgb(_KINDS[kind][1]))
    return to_hex((red, green, blue))


def _word(kind: str, chunk: int | None) -> str:
    return f"{_KINDS[kind][0]}{'' if chunk is None or kind == 'U' else f', chunk {chunk}'}"


def _ink(colour: str) -> str:
    red, green, blue = to_rgb(colour)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "black"


def _draw(axes: Axes, boxes: Sequence[Box], end: float) -> None:
    inch = (end or 1.0) / (_WIDTH - 1.1)  # of data, on the page
    own = max((box[5] for box in boxes), default=0.0)  # what comes later is another panel's time, and not idle
    for stage in range(_n_stages(boxes)):
        axes.barh(stage, own, height=0.86, color=_IDLE, zorder=0).patches[0].set_gid("idle")
    for stage, kind, number, chunk, start, stop in boxes:
        colour = _colour(kind, chunk)
        (bar,) = axes.barh(
            stage, stop - start, left=start, height=0.86, color=colour, edgecolor="white", linewidth=0.6, zorder=2
        )
        bar.set_label(f"{kind}{number}")
        if 0.085 * len(number) * inch < stop - start:
            at = ((start + stop) / 2, stage)
            axes.text(*at, number, ha="center", va="center", fontsize=8, color=_ink(colour), zorder=3)
    axes.set_xlim(0, (end or 1.0) * 1.005)
    axes.set_ylim(_n_stages(boxes) - 0.45, -0.55)
    axes.set_yticks(range(_n_stages(boxes)), [f"stage {stage}" for stage in range(_n_stages(boxes))])
    axes.tick_params(axis="y", length=0)
    axes.grid(False)
