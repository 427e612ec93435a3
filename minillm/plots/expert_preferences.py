"""Which expert prefers what, and which expert takes each token of a text."""

import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from minillm.plots.experts import expert_ticks
from minillm.plots.style import as_array, picture, style, visible
from minillm.plots.tokens import token_strip

_WIDTH = 9.0  # inches: what a notebook page shows without shrinking the labels
# Colours for the experts of a text, pale enough for black letters; beyond so many, eyes confuse them.
_TINTS = (
    "#9CC8F0",
    "#FFBE86",
    "#98DDBD",
    "#F2B3DA",
    "#F6E27A",
    "#C3B1F2",
    "#F49C93",
    "#A6E4EE",
    "#CBE38B",
    "#D8BE9C",
)
_OTHER, _NOBODY = "#E3E3E3", "#FFFFFF"
_LEGEND = "expert"


def preference_map(
    values: Any,
    labels: Sequence[str],
    *,
    kind: Literal["lift", "share"] = "lift",
    title: str | None = None,
) -> Figure:
    """Draw which expert prefers what: a row an expert, a column a label, the number written in where there is room.

    values: (n_experts, n_labels). kind "lift": how many times more of the label than of all tokens an expert gets
        (:func:`minillm.layers.expert_lift`), colours from a quarter or less over 1 (white) to four times or more;
        NaN is left grey. kind "share": a fraction in [0, 1], such as the part of a label's tokens that an expert gets.
    labels: n_labels names, drawn with blanks made visible; up to about sixty can be read.

    Raises ValueError when there is nothing to draw, for a shape, a number of labels or values that do not fit;
    TypeError for what is no number.
    """
    table = as_array("values", values)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"values must have shape (n_experts, n_labels), neither 0; got {table.shape}")
    if len(labels) != table.shape[1]:
        raise ValueError(f"labels must have {table.shape[1]} entries to fit values {table.shape}, got {len(labels)}")
    norm: Normalize
    if kind == "lift":
        if (table < 0).any() or np.isinf(table).any():
            raise ValueError("values must be lifts: finite and not negative, or NaN where nothing is known")
        norm, cmap, legend = LogNorm(0.25, 4.0, clip=True), "PuOr", "lift (1: no preference)"
    elif kind == "share":
        if not ((table >= 0) & (table <= 1)).all():
            raise ValueError("values must be shares in [0, 1]")
        norm, cmap, legend = Normalize(0.0, float(table.max()) or 1.0), "Blues", "share"
    else:
        raise ValueError(f"kind must be 'lift' or 'share', got {kind!r}")
    n_experts, n_labels = table.shape
    written = n_labels <= 14 and n_experts <= 16
    with style():
        side = 0.55 if written else 0.22
        longest = max(len(visible(label)) for label in labels)
        width = min(max(side * n_labels + 2.2, 4.2), _WIDTH)
        height = min(max((0.34 if written else 0.2) * n_experts, 1.6), 6.5) + 0.7
        cell = (width - 2.2) / n_labels
        upright = 0.08 * longest > cell  # a character is 0.08 inches wide
        figure, (axes,) = picture(width, height + 0.08 * longest * upright)
        shown = np.maximum(table, 0.25) if kind == "lift" else table  # 0 has no logarithm
        image = axes.imshow(shown, cmap=cmap, norm=norm, aspect="auto", interpolation="nearest")
        axes.set_facecolor("#C8C8C8")
        axes.grid(False)
        axes.set_xticks(range(n_labels), [visible(label) for label in labels], rotation=90 * upright)
        axes.tick_params(axis="x", labelsize=min(9.0, 60.0 * cell))
        for text in axes.get_xticklabels():
            text.set_parse_math(False)  # a token may be "$"
        expert_ticks(axes, "y", n_experts, 16)
        axes.set_ylabel("expert", fontsize=10)
        if written:
            for (expert, label), value in np.ndenumerate(table):
                colour = "white" if _is_dark(image.cmap(norm(shown[expert, label]))) else "black"
                if np.isfinite(value):
                    axes.text(label, expert, _short(value), ha="center", va="center", fontsize=8, color=colour)
        bar = figure.colorbar(image, ax=axes, extend="both" if kind == "lift" else "neither", label=legend)
        if kind == "lift":
            bar.ax.minorticks_off()
            bar.set_ticks([0.25, 0.5, 1.0, 2.0, 4.0], labels=["¼", "½", "1", "2", "4"])
        if title:
            axes.set_title(title, parse_math=False)
    return figure


def routing_map(
    pieces: Sequence[str | bytes],
    experts: Sequence[int | None] | Mapping[str, Sequence[int | None]],
    *,
    n_experts: int | None = None,
    columns: int = 88,
    title: str | None = None,
) -> Figure:
    """Draw a text as its tokens, each in the colour of its expert (Jiang et al. 2024, "Mixtral of Experts", figure 8).

    pieces: the text of each token, as in :func:`token_strip`.
    experts: the expert of each, None where nobody worked on it (white); or layer name -> such a list, for the same text
        once a layer. :func:`minillm.layers.main_experts` gives them.
    n_experts: how many there are, if the text may have missed the last ones. Up to ten have their own colours, the same
        in every picture; of more, the ten that take most tokens of this text, and all others are grey.
    columns: how many characters wide a line is.

    Raises ValueError when there is nothing to draw, for another number of experts than pieces or one out of range;
    TypeError for an expert that is no integer.
    """
    if isinstance(pieces, str | bytes):
        raise TypeError("pieces must be a list of tokens, got one string: encode it first")
    layers = _layers(experts, len(pieces), n_experts)
    if not len(pieces) or not layers:
        raise ValueError("pieces or experts is empty: nothing to draw")
    uses = Counter(one for row in layers.values() for one in row if one is not None)
    named = list(range(max(uses, default=-1) + 1 if n_experts is None else n_experts))
    if len(named) > len(_TINTS):
        named = sorted(sorted(uses, key=lambda one: (-uses[one], one))[: len(_TINTS)])
    tint: dict[int | None, str] = {expert: _TINTS[number] for number, expert in enumerate(named)}
    legend = [(str(expert), colour) for expert, colour in tint.items()]
    if set(uses) - set(tint):
        legend.append(("another", _OTHER))
    tint |= {expert: _OTHER for expert in uses if expert not in tint} | {None: _NOBODY}
    if any(one is None for row in layers.values() for one in row):
        legend.append(("none", _NOBODY))
    strips: dict[str, Sequence[str | bytes]] = {_LEGEND: [name for name, _ in legend]}
    tints: dict[str, Sequence[str]] = {_LEGEND: [colour for _, colour in legend]}
    for name, row in layers.items():
        strips[name], tints[name] = pieces, [tint[one] for one in row]
    return token_strip(strips, tints=tints, columns=columns, title=title)


def _layers(experts: Any, n_pieces: int, n_experts: int | None) -> dict[str, list[int | None]]:
    """The experts of each layer as plain integers, checked."""
    layers = {}
    for name, row in (experts if isinstance(experts, Mapping) else {"": experts}).items():
        argument = f"experts[{name!r}]" if name else "experts"
        if name == _LEGEND:
            raise ValueError(f"{argument} must have another name: {name!r} is written over the colours")
        if len(row) != n_pieces:
            raise ValueError(f"{argument} must have {n_pieces} entries, one for each piece, got {len(row)}")
        layers[name] = [None if expert is None else operator.index(expert) for expert in row]
        for expert in layers[name]:
            if expert is not None and not 0 <= expert < (math.inf if n_experts is None else n_experts):
                allowed = "at least 0" if n_experts is None else f"in [0, n_experts={n_experts})"
                raise ValueError(f"{argument} must be {allowed} or None, got {expert}")
    return layers


def _short(value: float) -> str:
    return (
        "0" if value == 0.0 else f"{value:.2f}" if value < 0.995 else f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
    )


def _is_dark(colour: Any) -> bool:
    red, green, blue = colour[:3]
    return bool(0.3 * red + 0.59 * green + 0.11 * blue < 0.5)
