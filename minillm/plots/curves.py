"""Loss curves: how wrong the model is, against training steps (or against anything else that is ordered)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minillm.plots.style import COLOURS, GREY, as_array, picture, style

History = Sequence[Mapping[str, Any]]
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def loss_curve(
    history: History | Series,
    *,
    references: Mapping[str, float] | None = None,
    title: str | None = None,
    xlabel: str = "step",
    ylabel: str = "loss (nats per token)",
    log_x: bool = False,
) -> Figure:
    """Draw one line per series, and a dashed line at each reference value.

    history: what `Trainer` records, a list of dicts with "step" and "loss" and, in some of them, "validation_loss";
        or a mapping from a label to its (x values, y values). NaN leaves a gap: a run that diverged looks like one.
    references: label -> value in the same unit, such as {"unigram entropy": 5.1}.

    Raises ValueError when there is nothing to draw or the lengths differ, TypeError for anything that is not a number.
    """
    series = _from_mapping(history) if isinstance(history, Mapping) else _from_history(history)
    with style():
        figure, (axes,) = picture(7.5, 3.8)
        for (label, (x, y)), colour in zip(series.items(), _cycle(len(series)), strict=True):
            sparse = len(x) <= 40  # so few points that each was measured for a reason: mark them
            axes.plot(x, y, label=label, color=colour, marker="o" if sparse else None, markersize=4)
        for label, value in (references or {}).items():
            _draw_reference(axes, label, value)
        if log_x:
            axes.set_xscale("log")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if title:
            axes.set_title(title, parse_math=False)
        if len(series) > 1:
            axes.legend(loc="best")
    return figure


def _from_history(history: History) -> dict[str, tuple[Any, Any]]:
    series: dict[str, tuple[Any, Any]] = {}
    for key, label in (("loss", "training"), ("validation_loss", "validation")):
        rows = [row for row in history if row.get(key) is not None]
        if rows:
            series[label] = ([row["step"] for row in rows], [row[key] for row in rows])
    if not series:
        raise ValueError('history has no row with a "loss" or a "validation_loss": nothing to draw')
    return _from_mapping(series)


def _from_mapping(series: Series) -> dict[str, tuple[Any, Any]]:
    if not series:
        raise ValueError("history is empty: nothing to draw")
    checked = {}
    for label, pair in series.items():
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"history[{label!r}] must be a tuple (x values, y values), got {type(pair).__name__}")
        x, y = as_array(f"x values of {label!r}", pair[0]), as_array(f"y values of {label!r}", pair[1])
        if x.ndim != 1 or x.shape != y.shape or not len(x):
            raise ValueError(f"history[{label!r}] needs as many x as y values, at least one; got {x.shape}, {y.shape}")
        checked[label] = (x, y)
    return checked


def _draw_reference(axes: Axes, label: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"references[{label!r}] must be a finite number, got {value!r}")
    axes.axhline(value, color=GREY, linestyle="--", linewidth=1.2)
    axes.annotate(
        f"{label}: {value:.2f}",
        xy=(1, value),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=GREY,
        fontsize=10,
        parse_math=False,
    )


def _cycle(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]
