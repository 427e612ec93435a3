"""The look every figure shares: colours, font sizes, and output that is the same bytes each time.

Figures are built without pyplot, so nothing needs a display, no window opens and no global list of figures grows.
A `Picture` is an ordinary matplotlib `Figure` that also knows how to show itself in a notebook.
"""

import contextlib
import io
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image  # matplotlib writes its PNGs with it

# Okabe and Ito's eight colours (2008), told apart with every common kind of colour blindness; the yellow is left out
# because thin lines in it vanish on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#6B6B6B"

_STYLE: Any = {
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.prop_cycle": cycler(color=COLOURS),
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}

# Marks for what cannot be seen. The space is the one that matters: most of GPT's tokens begin with it.
_MARKS = {" ": "·", "\n": "↵", "\t": "→", "\r": "←"}


class Picture(Figure):
    """A matplotlib Figure that a notebook shows as a PNG without pyplot being imported."""

    def _repr_png_(self) -> tuple[bytes, dict[str, Any]]:
        buffer = io.BytesIO()
        _write(self, buffer, "png", dpi=self.dpi * 1.5)  # finer than shown, so that it stays sharp on a dense screen
        width, height = self.get_size_inches() * self.dpi
        titles = [self.get_suptitle(), *(axes.get_title(loc="left") for axes in self.axes)]
        shown = {"width": round(width), "height": round(height), "alt": ": ".join(filter(None, titles))}
        return _with_palette(buffer), shown


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Apply the shared look inside a `with` block, whatever the caller's own matplotlib settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def picture(width: float, height: float, *, rows: int = 1, columns: int = 1) -> tuple[Picture, list[Axes]]:
    """A new figure of `width` x `height` inches and its panels, row by row. Call it inside `style()`."""
    figure = Picture(figsize=(width, height), layout="constrained")
    panels = list(np.asarray(figure.subplots(rows, columns, squeeze=False)).flat)
    for axes in panels:
        # Ticks are made when the figure is drawn, outside `style()`: what they look like is fixed here.
        axes.tick_params(labelsize=10, color=GREY, grid_color="#E4E4E4", grid_linewidth=0.8)
    return figure, panels


def save(figure: Figure, path: str | Path) -> Path:
    """Write `figure` to `path` (.png or .svg); the same figure gives the same bytes each time.

    Raises ValueError for any other ending.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ValueError(f"path must end in .png or .svg, got {str(path)!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        _write(figure, file, kind, dpi=150)
    return path


def _write(figure: Figure, file: Any, kind: str, dpi: float) -> None:
    # By default matplotlib writes its own version into a PNG, and the date and random ids into an SVG.
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
    with mpl.rc_context({"svg.hashsalt": "minillm", "svg.fonttype": "path"}):
        figure.savefig(file, format=kind, dpi=dpi, metadata=metadata)


def _with_palette(png: io.BytesIO) -> bytes:
    """The picture in 256 colours: notebooks are committed with their outputs, and this is a third of the bytes."""
    packed = io.BytesIO()
    with Image.open(png) as picture:
        colours = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        colours.save(packed, "PNG", optimize=True)
    return packed.getvalue()


def as_array(name: str, values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`values` (a torch tensor, an array, nested lists) as a float64 array; TypeError if they are not numbers."""
    if hasattr(values, "detach"):  # a tensor, recognised without importing torch
        values = values.detach().cpu().double()
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be numbers in a regular array, got {type(values).__name__}: {error}") from None


def visible(text: str) -> str:
    """`text` with blanks shown as marks and what the font cannot draw as an escape: " the\\n" -> "·the↵"."""
    return "".join(_MARKS.get(character) or _drawable(character) for character in text)


def _drawable(character: str) -> str:
    drawn = ord(character) in _characters() and unicodedata.category(character)[0] not in "CZ"
    return character if drawn else f"\\u{ord(character):04x}"


@cache
def _characters() -> frozenset[int]:
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return frozenset(font.get_charmap())
