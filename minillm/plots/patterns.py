"""Attention patterns: which pairs of query and key are computed, one square a pattern."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from minillm.plots.style import COLOURS, as_array, picture, style

_WIDTH = 9.0  # inches: what a notebook page shows without shrinking the labels
_LINES_UP_TO = 40  # rows or columns: beyond that, lines between the cells would hide them


def pattern_grid(
    patterns: Mapping[str, Any],
    *,
    columns: int | None = None,
    block_size: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw boolean matrices side by side: row = query, column = key, filled where the query may look at the key.

    patterns: (n_queries, n_keys) of booleans by name; arrays, nested lists or tensors, each of its own size. Under the
        name stands which part of the pairs is filled. Up to a few hundred cells a side can be told apart.
    columns: panels side by side; None is as many as fit, four at most. block_size: draw the borders of tiles of so many
        cells.

    Raises ValueError for an empty mapping, a shape that is no matrix or a value that is no truth value.
    """
    if not patterns:
        raise ValueError("patterns must hold at least one matrix, got none")
    for name, number in (("columns", columns), ("block_size", block_size)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {number}")
    matrices = {name: _matrix(name, pattern) for name, pattern in patterns.items()}
    columns = min(len(matrices), 4 if columns is None else columns)
    rows = math.ceil(len(matrices) / columns)
    side = min(3.6, _WIDTH / columns)
    height = max(min(1.6, len(matrix) / matrix.shape[1]) for matrix in matrices.values()) * (side - 0.5) + 0.9
    with style():
        figure, panels = picture(side * columns, height * rows + (0.4 if title else 0.0), rows=rows, columns=columns)
        for axes, (name, matrix) in zip(panels, matrices.items(), strict=False):
            n_queries, n_keys = matrix.shape
            # Cells are drawn from edge to edge, cell (i, j) around (i, j), as in an attention map.
            axes.imshow(matrix, cmap=ListedColormap(["#F2F2F2", COLOURS[0]]), vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(f"{name}\n{_share(matrix.mean())} of the pairs", fontsize=10, parse_math=False)
            axes.grid(False)
            if max(n_queries, n_keys) <= _LINES_UP_TO:
                _borders(axes, matrix.shape, 1, "white", 0.8)
            if block_size is not None:
                _borders(axes, matrix.shape, block_size, "#6B6B6B", 0.9)
            for axis, length in ((axes.xaxis, n_keys), (axes.yaxis, n_queries)):
                axis.set_ticks([0, length - 1] if length > 1 else [0])
                axis.set_tick_params(labelsize=8, length=2)
            axes.set_xlabel("key", fontsize=9, labelpad=-6)
            axes.set_ylabel("query", fontsize=9, labelpad=0)
        for axes in panels[len(matrices) :]:
            axes.set_axis_off()
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, parse_math=False)
    return figure


def _matrix(name: str, pattern: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    matrix = as_array(f"patterns[{name!r}]", pattern)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"patterns[{name!r}] must have shape (n_queries, n_keys), neither 0; got {matrix.shape}")
    if not np.isin(matrix, (0.0, 1.0)).all():
        raise ValueError(f"patterns[{name!r}] must hold True and False only")
    return matrix


def _share(fraction: float) -> str:
    percent = 100 * fraction
    return f"{percent:.0f} %" if percent >= 10 or percent == 0 else f"{percent:.2g} %"


def _borders(axes: Any, shape: tuple[int, int], step: int, colour: str, width: float) -> None:
    n_queries, n_keys = shape
    axes.vlines(np.arange(step, n_keys, step) - 0.5, -0.5, n_queries - 0.5, color=colour, linewidth=width)
    axes.hlines(np.arange(step, n_queries, step) - 0.5, -0.5, n_keys - 0.5, color=colour, linewidth=width)
