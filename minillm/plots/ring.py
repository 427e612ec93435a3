"""A collective operation, step by step: which chunk goes from whom to whom, and what each rank then holds."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from minillm.plots.style import COLOURS, picture, style

_WIDTH = 9.5
_WORDS_UP_TO = 8  # ranks: beyond that what a chunk holds would be too small to read
_LABEL = re.compile(r"(?P<kind>\w+) chunk (?P<chunk>\d+)")

Holding = list[list[frozenset[int]]]


def ring_steps(messages: Iterable[Any], *, columns: int | None = None, title: str | None = None) -> Figure:
    """Draw a panel for the start and for each step: ranks are rows, chunks columns, messages arrows.

    A chunk says whose numbers are in it: "0" at first on rank 0, "01" when rank 1 has added its own, darker the more
    there are, "Σ" on green when it has all ranks'. The chunks that a step changes have a frame.

    messages: (source, destination, label) as tuples or as objects with these attributes (a simulation's messages), in
        order; a rank's k-th message belongs to step k. The label says what comes: "reduce chunk 3" is added to what the
        receiver has, any other word before "chunk" takes its place.
    columns: panels side by side; None is as many as fit, five at most.

    Raises ValueError for no message, or one whose label names no chunk.
    """
    steps, n_ranks, n_chunks = _steps(messages)
    holding: Holding = [[frozenset([rank])] * n_chunks for rank in range(n_ranks)]
    panels: list[tuple[str, Holding, list[tuple[int, int, int]]]] = [("start", holding, [])]
    for number, step in enumerate(steps, start=1):
        before, holding = holding, [list(row) for row in holding]
        for source, destination, kind, chunk in step:
            sent = before[source][chunk]
            holding[destination][chunk] = holding[destination][chunk] | sent if kind == "reduce" else sent
        words = ", ".join(dict.fromkeys(kind for _, _, kind, _ in step))
        panels.append((f"step {number}: {words}", holding, [(a, b, chunk) for a, b, _, chunk in step]))
    columns = min(len(panels), 5, max(1, int(_WIDTH / (0.42 * n_chunks + 0.5)))) if columns is None else columns
    lines = math.ceil(len(panels) / columns)
    side = min(_WIDTH / columns, 0.62 * n_chunks + 0.6)
    with style():
        height = (0.36 * n_ranks + 0.75) * lines + (0.4 if title else 0.0)
        figure, axes_list = picture(max(side * columns, 3.0), height, rows=lines, columns=columns)
        for axes, (name, held, arrows) in zip(axes_list, panels, strict=False):
            _draw(axes, held, arrows)
            axes.set_title(name, fontsize=10)
        for axes in axes_list[len(panels) :]:
            axes.set_axis_off()
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, parse_math=False)
    return figure


def _steps(messages: Iterable[Any]) -> tuple[list[list[tuple[int, int, str, int]]], int, int]:
    """Of each step its (source, destination, kind, chunk); how many ranks and chunks there are."""
    steps: list[list[tuple[int, int, str, int]]] = []
    sent: dict[int, int] = {}
    for message in messages:
        plain = tuple(message) if isinstance(message, tuple | list) else None
        source, destination, label = plain or (message.source, message.destination, message.label)
        found = _LABEL.search(label)
        if found is None:
            raise ValueError(
                f'messages holds {label!r} from {source} to {destination}: expected "<word> chunk <number>"'
            )
        step = sent.get(source, 0)
        sent[source] = step + 1
        if step == len(steps):
            steps.append([])
        steps[step].append((source, destination, found["kind"], int(found["chunk"])))
    if not steps:
        raise ValueError("messages is empty: nothing to draw")
    n_ranks = 1 + max(max(source, destination) for step in steps for source, destination, _, _ in step)
    return steps, n_ranks, 1 + max(chunk for step in steps for *_, chunk in step)


def _draw(axes: Axes, held: Holding, arrows: Sequence[tuple[int, int, int]]) -> None:
    n_ranks, n_chunks = len(held), len(held[0])
    shades = colormaps["Blues"]
    for rank, row in enumerate(held):
        for chunk, parts in enumerate(row):
            whole = len(parts) == n_ranks
            colour = COLOURS[2] if whole else shades(0.08 + 0.5 * len(parts) / n_ranks)
            axes.add_patch(
                Rectangle((chunk - 0.46, rank - 0.42), 0.92, 0.84, facecolor=colour, edgecolor="white", gid="chunk")
            )
            if n_ranks <= _WORDS_UP_TO:
                text = "Σ" if whole else "".join(map(str, sorted(parts)))
                size = min(9.0, 26.0 / len(text))
                axes.text(
                    chunk, rank, text, ha="center", va="center", fontsize=size, color="white" if whole else "black"
                )
    for source, destination, chunk in arrows:
        place = (chunk - 0.46, destination - 0.42)
        axes.add_patch(
            Rectangle(place, 0.92, 0.84, fill=False, edgecolor=COLOURS[1], linewidth=1.6, zorder=3, gid="changed")
        )
        far = abs(destination - source) > 1  # round the others, not through them
        arrow = FancyArrowPatch(
            (chunk + 0.3, source),
            (chunk + 0.3, destination),
            connectionstyle=f"arc3,rad={(0.25 if destination < source else -0.25) if far else 0}",
            arrowstyle="-|>",
            mutation_scale=9,
            shrinkA=2,
            shrinkB=2,
            color=COLOURS[1],
            linewidth=1.3,
            zorder=4,
        )
        axes.add_patch(arrow)
    axes.set_xlim(-0.55, n_chunks - 0.05)  # room for the arrows that go round
    axes.set_ylim(n_ranks - 0.45, -0.55)
    axes.set_xticks(range(n_chunks), [str(chunk) for chunk in range(n_chunks)])
    axes.set_yticks(
        range(n_ranks), [f"rank {rank}" if n_ranks <= _WORDS_UP_TO else str(rank) for rank in range(n_ranks)]
    )
    axes.tick_params(length=0, labelsize=8)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
