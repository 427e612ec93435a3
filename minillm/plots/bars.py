"""Bars: a few named numbers side by side, each with its value written out."""

import math
from collections.abc import Callable, Mapping

from matplotlib.figure import Figure

from minillm.plots.style import COLOURS, picture, style, visible

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def bars(
    values: Mapping[str, float] | Mapping[str, Mapping[str, float]],
    *,
    xlabel: str = "",
    title: str | None = None,
    log: bool = False,
    write: Callable[[float], str] = "{:,.3g}".format,
) -> Figure:
    """Draw horizontal bars, top to bottom in the order given, each with its value at its end.

    values: label -> value for one panel, or panel title -> (label -> value) for panels side by side that share their
        scale. log: a logarithmic axis, for values that span many powers of ten. write: how a value is written.

    Raises ValueError when there is nothing to draw or a value is negative, not finite, or 0 on a logarithmic axis.
    """
    nested = any(isinstance(value, Mapping) for value in values.values())
    panels: dict[str, Mapping[str, float]] = dict(values) if nested else {"": values}  # type: ignore[arg-type,dict-item]
    for panel in panels.values():
        _check(panel, positive=log)
    rows = max(len(panel) for panel in panels.values())
    largest = max(value for panel in panels.values() for value in panel.values())
    smallest = min(value for panel in panels.values() for value in panel.values())
    with style():
        width = 7.5 if len(panels) == 1 else 3.2 * len(panels)
        figure, axes_list = picture(width, 0.34 * rows + 1.0 + 0.3 * nested, columns=len(panels))
        for axes, (name, panel) in zip(axes_list, panels.items(), strict=True):
            drawn = axes.barh(range(len(panel)), list(panel.values()), color=COLOURS[0], height=0.68, log=log)
            axes.bar_label(drawn, [write(value) for value in panel.values()], padding=4, fontsize=10)
            axes.set_yticks(range(len(panel)), [visible(label) if label != label.strip() else label for label in panel])
            axes.set_ylim(max(rows, 1) - 0.4, -0.6)
            if log:
                axes.set_xlim(smallest / 10, largest * (largest / smallest) ** 0.25 * 10)
            else:
                axes.set_xlim(0, (largest or 1.0) * 1.25)
                axes.xaxis.set_major_formatter("{x:,g}")
            axes.set_xlabel(xlabel)
            axes.grid(False, axis="y")
            for text in axes.get_yticklabels():
                text.set_parse_math(False)
            if name:
                axes.set_title(name, fontsize=11, parse_math=False)
        if title and nested:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, parse_math=False)
        elif title:
            axes_list[0].set_title(title, parse_math=False)
    return figure


def memory_bars(parts: Mapping[str, Mapping[str, float]], *, title: str | None = None) -> Figure:
    """Draw one stacked bar a row: row label -> (part -> bytes), in binary units, the total written at its end.

    Parts keep one colour through all rows; a row without a part has none of it. Bytes in, KiB ... PiB out.

    Raises ValueError when there is nothing to draw or a number of bytes is negative or not finite.
    """
    if not parts:
        raise ValueError("parts is empty: nothing to draw")
    for row in parts.values():
        _check(row, positive=False)
    totals = [sum(row.values()) for row in parts.values()]
    unit = _unit(max(totals))
    with style():
        figure, (axes,) = picture(7.5, 0.5 * len(parts) + 1.5)
        left = [0.0] * len(parts)
        names = dict.fromkeys(name for row in parts.values() for name in row)
        for index, name in enumerate(names):
            widths = [row.get(name, 0.0) / 1024**unit for row in parts.values()]
            axes.barh(range(len(parts)), widths, left=left, label=name, color=COLOURS[index % len(COLOURS)], height=0.6)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for row_index, total in enumerate(totals):
            axes.annotate(
                format_bytes(total), (left[row_index], row_index), (4, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(range(len(parts)), list(parts))
        axes.set_ylim(len(parts) - 0.4, -0.6)
        axes.set_xlim(0, (max(left) or 1.0) * 1.2)
        axes.set_xlabel(_UNITS[unit])
        axes.grid(False, axis="y")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=min(len(names), 4))
        if title:
            axes.set_title(title, parse_math=False)
    return figure


def format_bytes(n_bytes: float) -> str:
    """`n_bytes` in the largest binary unit that leaves at least 1: 1536 -> "1.5 KiB"."""
    unit = _unit(n_bytes)
    value = n_bytes / 1024**unit
    return f"{value:,.0f} {_UNITS[unit]}" if value >= 100 else f"{value:.3g} {_UNITS[unit]}"


def _unit(n_bytes: float) -> int:
    return min(int(math.log2(n_bytes) // 10), len(_UNITS) - 1) if n_bytes >= 1 else 0


def _check(values: Mapping[str, float], *, positive: bool) -> None:
    if not values:
        raise ValueError("values is empty: nothing to draw")
    for label, value in values.items():
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            allowed = "a positive finite number (the axis is logarithmic)" if positive else "a finite number >= 0"
            raise ValueError(f"values[{label!r}] must be {allowed}, got {value!r}")
