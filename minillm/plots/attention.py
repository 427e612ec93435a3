"""Attention maps: which earlier token each token looks at, one panel per head."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minillm.plots.style import as_array, picture, style, visible

_WIDTH = 9.0  # inches: what a notebook page shows without shrinking the labels


def attention_map(
    weights: Any,
    tokens: Sequence[str],
    *,
    queries: Sequence[str] | None = None,
    heads: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw attention weights as one square a head: row = the token that looks, column = the token it looks at.

    weights: (heads, n_queries, n_keys) or, for one head, (n_queries, n_keys); an array, nested lists or a tensor. Each
        row is a probability distribution: not negative, sum 1.
    tokens: n_keys pieces of text, drawn with blanks made visible. queries: n_queries pieces where they differ (cross
        attention). heads: a name a panel, "head 0" and so on if left out.

    Raises ValueError for a shape, a number of labels or a row that does not fit; TypeError if weights are not numbers.
    """
    array = as_array("weights", weights)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"weights must have shape (heads, n_queries, n_keys), none of them 0; got {array.shape}")
    queries = tokens if queries is None else queries
    heads = [f"head {h}" for h in range(len(array))] if heads is None else heads
    for name, labels, expected in zip(
        ("heads", "queries", "tokens"), (heads, queries, tokens), array.shape, strict=True
    ):
        if len(labels) != expected:
            raise ValueError(f"{name} must have {expected} entries to fit weights {array.shape}, got {len(labels)}")
    # bf16 weights sum to 1 within 2^-8.
    if not (np.isfinite(array).all() and (array >= 0).all() and np.allclose(array.sum(-1), 1.0, atol=1e-2)):
        raise ValueError("weights must be probabilities: each row not negative and of sum 1 (softmax over the keys)")

    side = min(max(2.2, 0.21 * max(array.shape[1:]) + 0.8), 7.5 if len(array) == 1 else 4.4)
    columns = min(len(array), int(_WIDTH // side))
    rows = math.ceil(len(array) / columns)
    with style():
        figure, panels = picture(side * columns + 0.8, side * rows + 0.5, rows=rows, columns=columns)
        for axes, head, name in zip(panels, array, heads, strict=False):
            image = axes.imshow(head, cmap="Blues", vmin=0.0, vmax=1.0, interpolation="nearest", aspect="equal")
            axes.set_title(name, fontsize=11, parse_math=False)
            _label(axes, queries, tokens)
        for axes in panels[len(array) :]:
            axes.set_axis_off()
        figure.colorbar(image, ax=panels, shrink=0.8, label="attention weight")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, parse_math=False)
    return figure


def _label(axes: Axes, queries: Sequence[str], keys: Sequence[str]) -> None:
    axes.grid(False)
    size = 9 if max(len(queries), len(keys)) <= 24 else 7
    for axis, labels, rotation in ((axes.xaxis, keys, 90), (axes.yaxis, queries, 0)):
        axis.set_ticks(range(len(labels)), [visible(label) for label in labels], rotation=rotation, fontsize=size)
        for text in axis.get_ticklabels():
            text.set_parse_math(False)  # a token may be "$"
