"""How much each expert of a mixture gets, and whether they collapse."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from minillm.plots.style import COLOURS, as_array, picture, style

_Array = np.ndarray[Any, np.dtype[np.float64]]

_WIDTH = 9.0  # inches: what a notebook page shows without shrinking the labels
_WORKED, _DROPPED, _EQUAL = "worked on", "dropped: no room", "equal shares"


def expert_load(
    loads: Any,
    *,
    dropped: Any = None,
    columns: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the share of the tokens that each expert gets, as bars around the line of equal shares.

    loads: what each expert worked on, (n_experts,), as counts or shares; or panel title -> such a row (layers, runs),
        drawn with one scale. Up to a few hundred experts.
    dropped: in the same form and unit, what each expert was given but had no room for; stacked on top.
    columns: panels side by side; None is as many as stay readable, three at most.

    A bar is (load + dropped) over the sum of both over all experts, in percent; without any load all bars are 0.

    Raises ValueError when there is nothing to draw, for a shape or name that does not fit, a negative number or one
    that is not finite; TypeError for what is no number.
    """
    rows = {name: _row(f"loads{_at(name)}", row) for name, row in _panels("loads", loads).items()}
    lost = {name: np.zeros_like(row) for name, row in rows.items()}
    if dropped is not None:
        lost = {name: _row(f"dropped{_at(name)}", row) for name, row in _panels("dropped", dropped).items()}
        wanted, got = ({name: len(row) for name, row in part.items()} for part in (rows, lost))
        if wanted != got:
            raise ValueError(f"dropped must have the panels and experts of loads, {wanted}, got {got}")
    most = max(map(len, rows.values()))
    columns = _columns(columns, len(rows), 3 if most <= 16 else 2 if most <= 64 else 1)
    lines = math.ceil(len(rows) / columns)
    with style():
        width, height = (7.0, 3.2) if len(rows) == 1 else (_WIDTH, 2.1 * lines + 0.7)
        figure, panels = picture(width, height, rows=lines, columns=columns)
        highest = 0.0
        for number, (axes, name) in enumerate(zip(panels, rows, strict=False)):
            n_experts, total = len(rows[name]), rows[name].sum() + lost[name].sum()
            done, gone = (100.0 * part / (total or 1.0) for part in (rows[name], lost[name]))
            highest = max(highest, float((done + gone).max()), 100.0 / n_experts)
            # Without gaps where a bar is only a few pixels wide: lines between them would be all one sees.
            experts, thickness = np.arange(n_experts), 0.8 if n_experts * columns <= 96 else 1.0
            axes.bar(experts, done, thickness, color=COLOURS[0], label=_WORKED)
            if gone.any():
                axes.bar(experts, gone, thickness, bottom=done, color=COLOURS[1], label=_DROPPED)
            axes.axhline(100.0 / n_experts, color="black", linewidth=1.2, linestyle="--", label=_EQUAL)
            axes.set_xlim(-0.6, n_experts - 0.4)
            expert_ticks(axes, "x", n_experts, max(1, 18 // columns))
            axes.grid(False, axis="x")
            axes.yaxis.set_major_formatter("{x:g} %")
            if name:
                axes.set_title(name, fontsize=11, parse_math=False)
            if number >= len(rows) - columns:
                axes.set_xlabel("expert", fontsize=10)
        for axes in panels[: len(rows)]:
            axes.set_ylim(0.0, 1.08 * highest)
        for axes in panels[len(rows) :]:
            axes.set_axis_off()
        drawn = {label: handle for axes in panels for label, handle in _legend(axes)}
        shown = [label for label in (_WORKED, _DROPPED, _EQUAL) if label in drawn]
        figure.legend([drawn[label] for label in shown], shown, loc="outside lower center", ncols=3)
        _title(figure, panels[0], title)
    return figure


def expert_load_over_time(
    steps: Sequence[float],
    loads: Any,
    *,
    title: str | None = None,
) -> Figure:
    """Draw what each expert gets while a model trains: a row an expert, a column a step, white where it is the mean.

    A balanced layer is pale all over; in a collapsed one a few rows are dark violet, with many times the mean (4 and
    more look the same), and all others brown: they get nothing. A step without any load is grey.

    steps: rising numbers. loads: (n_steps, n_experts), counts or shares, each step for itself; or panel title -> such a
        table (runs, layers) over the same steps.

    Raises ValueError when there is nothing to draw, for a shape that does not fit, steps that do not rise, a negative
    number or one that is not finite; TypeError for what is no number.
    """
    times = as_array("steps", steps)
    if times.ndim != 1 or not len(times) or not np.isfinite(times).all() or (np.diff(times) <= 0).any():
        raise ValueError(f"steps must be finite numbers that rise, at least one, got shape {times.shape}: {times}")
    tables = {name: _table(f"loads{_at(name)}", table) for name, table in _panels("loads", loads).items()}
    for name, table in tables.items():
        if len(table) != len(times):
            raise ValueError(f"loads{_at(name)} must have {len(times)} rows, one for each step, got {len(table)}")
    middles = (times[1:] + times[:-1]) / 2
    first, last = (times[1] - times[0], times[-1] - times[-2]) if len(times) > 1 else (1.0, 1.0)
    edges = np.concatenate([[times[0] - first / 2], middles, [times[-1] + last / 2]])
    columns = min(len(tables), 2)
    lines = math.ceil(len(tables) / columns)
    with style():
        width, height = (7.0, 3.2) if len(tables) == 1 else (_WIDTH, 2.5 * lines + 0.6)
        figure, panels = picture(width, height, rows=lines, columns=columns)
        for number, (axes, (name, table)) in enumerate(zip(panels, tables.items(), strict=False)):
            n_experts = table.shape[1]
            means = table.mean(axis=1, keepdims=True)
            # A step without any token says nothing about balance: left blank.
            relative = np.divide(table, means, out=np.full_like(table, np.nan), where=means > 0)
            colours = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=4.0)
            image = axes.pcolormesh(
                edges, np.arange(n_experts + 1) - 0.5, relative.T, norm=colours, cmap="PuOr", rasterized=True
            )
            axes.invert_yaxis()
            axes.grid(False)
            expert_ticks(axes, "y", n_experts, 8)
            axes.set_facecolor("#C8C8C8")
            if name:
                axes.set_title(name, fontsize=11, parse_math=False)
            if number % columns == 0:
                axes.set_ylabel("expert", fontsize=10)
            if number >= len(tables) - columns:
                axes.set_xlabel("step", fontsize=10)
        for axes in panels[len(tables) :]:
            axes.set_axis_off()
        bar = figure.colorbar(image, ax=panels, extend="max", ticks=[0, 0.5, 1, 2, 3, 4], label="load over the mean")
        bar.ax.set_yticklabels(["0", "½", "1", "2", "3", "4"])
        _title(figure, panels[0], title)
    return figure


def _legend(axes: Axes) -> list[tuple[str, Artist]]:
    handles, labels = axes.get_legend_handles_labels()
    return list(zip(labels, handles, strict=True))


def _panels(name: str, values: Any) -> dict[str, Any]:
    panels = dict(values) if isinstance(values, Mapping) else {"": values}
    if not panels:
        raise ValueError(f"{name} is empty: nothing to draw")
    return panels


def _at(name: str) -> str:
    return f"[{name!r}]" if name else ""


def _row(name: str, values: Any) -> _Array:
    row = as_array(name, values)
    if row.ndim != 1 or not len(row):
        raise ValueError(f"{name} must have shape (n_experts,), not 0; got {row.shape}")
    return _amounts(name, row)


def _table(name: str, values: Any) -> _Array:
    table = as_array(name, values)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"{name} must have shape (n_steps, n_experts), neither 0; got {table.shape}")
    return _amounts(name, table)


def _amounts(name: str, values: _Array) -> _Array:
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"{name} must be finite numbers, none negative")
    return values


def _columns(columns: int | None, n_panels: int, readable: int) -> int:
    if columns is not None and (not isinstance(columns, int) or columns < 1):
        raise ValueError(f"columns must be an integer of at least 1, got {columns!r}")
    return min(n_panels, readable if columns is None else columns)


def expert_ticks(axes: Axes, which: Literal["x", "y"], n_experts: int, most: int) -> None:
    """A number at every expert, or at every 2nd, 4th, 8th ... where they would touch."""
    step = 2 ** max(math.ceil(math.log2(n_experts / most)), 0)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(range(0, n_experts, step))
    axis.set_tick_params(labelsize=9, length=2)


def _title(figure: Figure, axes: Axes, title: str | None) -> None:
    if title and axes.get_title(loc="left"):  # the panels have names of their own
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, parse_math=False)
    elif title:
        axes.set_title(title, parse_math=False)
