"""A job's ranks as a table, coloured by the group that each one is in."""

import itertools
import math
from collections.abc import Mapping, Sequence

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minillm.plots.style import COLOURS, GREY, picture, style

_CELL = (0.82, 0.46)  # inches
_WIDTH = 9.0  # inches: what a notebook page shows without shrinking the labels
_MOST = 256  # ranks that can be read


def mesh_table(
    sizes: Mapping[str, int],
    *,
    colour_by: str | Sequence[str] = (),
    across: Sequence[str] = ("cp", "tp"),
    ranks_per_node: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw ranks 0, 1, 2, ... at their places on named axes.

    sizes: each axis' size by its name, outermost first (the last one's index moves fastest), as ``MeshLayout.sizes``.
    colour_by: an axis or several; ranks that differ only along these are one group, and have one colour. No axis: no
        colours. There are six colours; beyond that they come again.
    across: axes that go across; the others go down. Axes of size 1 are not named.
    ranks_per_node: under each rank stands its node.

    Raises ValueError for no axes, sizes below 1, more than 256 ranks or an axis that is not in `sizes`.
    """
    colour_by = [colour_by] if isinstance(colour_by, str) else list(colour_by)
    if not sizes:
        raise ValueError("sizes must name at least one axis, got none")
    for name, size in [*sizes.items(), ("ranks_per_node", 1 if ranks_per_node is None else ranks_per_node)]:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
    for axis in colour_by:
        if axis not in sizes:
            raise ValueError(f"colour_by must be of {', '.join(sizes)}, got {axis!r}")
    if math.prod(sizes.values()) > _MOST:
        raise ValueError(f"sizes must make at most {_MOST} ranks, got {math.prod(sizes.values())}")
    down = [axis for axis in sizes if axis not in across]
    beside = [axis for axis in sizes if axis in across]
    rows, columns = _places(down, sizes), _places(beside, sizes)
    groups: dict[tuple[int, ...], int] = {}
    cell = min(_CELL[0], (_WIDTH - 1.6) / len(columns))
    with style():
        figure, (axes,) = picture(cell * len(columns) + 1.6, _CELL[1] * len(rows) + (0.9 if title else 0.5))
        for rank, indices in enumerate(itertools.product(*(range(size) for size in sizes.values()))):
            place = dict(zip(sizes, indices, strict=True))
            row, column = rows.index(_at(down, place)), columns.index(_at(beside, place))
            group = groups.setdefault(tuple(at for axis, at in place.items() if axis not in colour_by), len(groups))
            colour = _pale(COLOURS[group % (len(COLOURS) - 1)]) if colour_by else (1.0, 1.0, 1.0)
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="white", linewidth=2))
            raised = 0.0 if ranks_per_node is None else 0.12
            axes.text(column + 0.5, row + 0.5 - raised, str(rank), ha="center", va="center", fontsize=11)
            if ranks_per_node is not None:
                node = f"node {rank // ranks_per_node}"
                axes.text(column + 0.5, row + 0.74, node, ha="center", va="center", fontsize=7, color=GREY)
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
        axes.set_xticks([at + 0.5 for at in range(len(columns))], [_label(beside, at, sizes) for at in columns])
        axes.set_yticks([at + 0.5 for at in range(len(rows))], [_label(down, at, sizes) for at in rows])
        axes.tick_params(length=0, labelsize=9, labeltop=True, labelbottom=False)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        if title:
            axes.set_title(title, fontsize=12, parse_math=False)
    return figure


def _places(axes: Sequence[str], sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(sizes[axis]) for axis in axes)))


def _at(axes: Sequence[str], place: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(place[axis] for axis in axes)


def _label(axes: Sequence[str], indices: Sequence[int], sizes: Mapping[str, int]) -> str:
    return " ".join(f"{axis}={at}" for axis, at in zip(axes, indices, strict=True) if sizes[axis] > 1)


def _pale(colour: str) -> tuple[float, float, float]:
    """Light enough for black numbers."""
    red, green, blue = to_rgb(colour)
    return (0.45 * red + 0.55, 0.45 * green + 0.55, 0.45 * blue + 0.55)
