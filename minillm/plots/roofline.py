"""The roofline: how many operations a second a machine allows, by operations for each byte moved."""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minillm.plots.style import COLOURS, GREY, picture, style

_PREFIXES = ("", "k", "M", "G", "T", "P")


def roofline(
    flops_per_second: Mapping[str, float],
    bytes_per_second: float,
    operators: Mapping[str, float | tuple[float, float]],
    *,
    title: str | None = None,
) -> Figure:
    """Draw a machine's roof and where operators stand under it, both axes logarithmic.

    flops_per_second: the flat ceilings, label -> operations per second; the highest is the machine's, the others are
        drawn as lines below it. bytes_per_second: the slanted ceiling.
    operators: label -> operations per byte, drawn on the roof at its own place (the most that is possible there); or
        label -> (operations per byte, operations per second as measured), drawn where it was measured.

    The model is Williams, Waterman and Patterson's (2009, "Roofline"). Raises ValueError when there is no ceiling or
    no operator, and for a number that is not positive and finite.
    """
    if not flops_per_second or not operators:
        raise ValueError("flops_per_second and operators must each hold at least one entry")
    for label, ceiling in flops_per_second.items():
        _positive(f"flops_per_second[{label!r}]", ceiling)
    _positive("bytes_per_second", bytes_per_second)
    highest = max(flops_per_second.values())
    points: dict[str, tuple[float, float, bool]] = {}
    for label, place in operators.items():
        intensity, speed = place if isinstance(place, tuple) else (place, None)
        _positive(f"operators[{label!r}]: operations per byte", intensity)
        if speed is not None:
            _positive(f"operators[{label!r}]: operations per second", speed)
        points[label] = (intensity, speed or min(highest, intensity * bytes_per_second), speed is not None)
    ridge = highest / bytes_per_second
    left = min(ridge, *(intensity for intensity, _, _ in points.values())) / 3
    right = max(ridge, *(intensity for intensity, _, _ in points.values())) * 8
    with style():
        figure, (axes,) = picture(8, 4.4)
        axes.loglog([left, ridge, right], [left * bytes_per_second, highest, highest], color="#000000")
        axes.fill_between([left, ridge], [left * bytes_per_second, highest], highest, color=COLOURS[1], alpha=0.07)
        for label, ceiling in flops_per_second.items():
            meets = ceiling / bytes_per_second
            if ceiling < highest:
                axes.plot([meets, right], [ceiling, ceiling], "--", color=GREY, linewidth=1.2)
            _note(axes, (right, ceiling), (-4, 8), f"{label}: {_short(ceiling)} operations/s", "right")
        middle = math.sqrt(left * ridge)
        _note(axes, (middle, middle * bytes_per_second), (-6, 4), f"{_short(bytes_per_second)}B/s", "right")
        axes.plot([ridge, ridge], [left * bytes_per_second, highest], ":", color=GREY, linewidth=1.2)
        together: dict[tuple[float, float, bool], list[str]] = {}  # operators at one place share a mark and a colour
        for label, point in points.items():
            together.setdefault(point, []).append(label)
        for number, ((intensity, speed, measured), labels) in enumerate(together.items()):
            colour = COLOURS[number % (len(COLOURS) - 1)]  # without the black of the roof
            mark: dict[str, Any] = {
                "marker": "o" if measured else "D",
                "markersize": 8,
                "linestyle": "",
                "color": colour,
                "zorder": 3,
            }
            axes.plot([intensity], [speed], label=", ".join(labels), **mark)
        axes.set(xlim=(left, right), ylim=(None, highest * 2.5))
        axes.set(xlabel="operations for each byte moved", ylabel="operations per second")
        for text in figure.legend(loc="outside lower center", ncols=min(4, len(points))).get_texts():
            text.set_parse_math(False)
        if title:
            axes.set_title(title, parse_math=False)
    return figure


def _note(axes: Axes, place: tuple[float, float], offset: tuple[float, float], text: str, side: str) -> None:
    axes.annotate(
        text,
        place,
        offset,
        textcoords="offset points",
        ha=side,
        va="bottom",
        color=GREY,
        fontsize=10,
        parse_math=False,
    )


def _short(number: float) -> str:
    """12_300_000_000 -> "12.3 G"."""
    power = max(0, min(int(math.log10(number) // 3), len(_PREFIXES) - 1))
    return f"{number / 1000**power:.3g} {_PREFIXES[power]}"


def _positive(name: str, number: float) -> None:
    if not 0.0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {number!r}")
