"""Tiles of an attention matrix in the order in which an algorithm visits them."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from minillm.plots.style import picture, style

_WIDTH = 9.0  # inches: what a notebook page shows without shrinking the labels
_NUMBERS_UP_TO = 12  # rows or columns of tiles: beyond that the numbers would be too small to read
_SKIPPED = "#EFEFEF"

Visits = Sequence[tuple[int, int]]


def tile_order(
    visits: Mapping[str, Visits],
    n_rows: int,
    n_columns: int | None = None,
    *,
    columns: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw for each algorithm the tiles that it visits: from light to dark, numbered from 1; a tile left out is grey.

    visits: (row, column) of the tiles in the order visited, by the algorithm's name; row = tile of queries, column =
        tile of keys. A tile that is visited more than once keeps its last number. Under the name stands how many visits
        there were.
    n_rows, n_columns: the matrix in tiles; n_columns None is as many as rows. columns: panels side by side; None is as
        many as fit, four at most.

    Raises ValueError for no visits, a size below 1, or a tile outside of the matrix.
    """
    n_columns = n_rows if n_columns is None else n_columns
    sizes = {"n_rows": n_rows, "n_columns": n_columns, "columns": 1 if columns is None else columns}
    for name, number in sizes.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {number}")
    if not visits:
        raise ValueError("visits must name at least one algorithm, got none")
    for name, order in visits.items():
        for row, column in order:
            if not (0 <= row < n_rows and 0 <= column < n_columns):
                raise ValueError(f"visits[{name!r}] holds tile {(row, column)}, outside of {n_rows} x {n_columns}")
    columns = min(len(visits), 4 if columns is None else columns)
    lines = math.ceil(len(visits) / columns)
    side = min(3.4, _WIDTH / columns)
    height = min(1.6, n_rows / n_columns) * (side - 0.4) + 0.9
    with style():
        figure, panels = picture(side * columns, height * lines + (0.4 if title else 0.0), rows=lines, columns=columns)
        for axes, (name, order) in zip(panels, visits.items(), strict=False):
            turns = np.full((n_rows, n_columns), np.nan)
            for turn, tile in enumerate(order, start=1):
                turns[tile] = turn
            shades = colormaps["viridis_r"].with_extremes(bad=_SKIPPED)
            axes.imshow(turns, cmap=shades, vmin=1, vmax=max(2, len(order)), interpolation="nearest")
            axes.set_title(f"{name}\n{len(order)} tiles", fontsize=10, parse_math=False)
            axes.grid(False)
            axes.vlines(np.arange(1, n_columns) - 0.5, -0.5, n_rows - 0.5, color="white", linewidth=1)
            axes.hlines(np.arange(1, n_rows) - 0.5, -0.5, n_columns - 0.5, color="white", linewidth=1)
            if max(n_rows, n_columns) <= _NUMBERS_UP_TO:
                size = min(10.0, 42.0 * (side - 0.6) / max(n_rows, n_columns) / (1 + (len(order) > 99)))
                for (row, column), turn in np.ndenumerate(turns):
                    if not math.isnan(turn):
                        colour = "white" if turn > 0.45 * len(order) else "black"
                        axes.text(column, row, f"{turn:.0f}", ha="center", va="center", color=colour, fontsize=size)
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel("keys →", fontsize=9)
            axes.set_ylabel("← queries", fontsize=9)
        for axes in panels[len(visits) :]:
            axes.set_axis_off()
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, parse_math=False)
    return figure
