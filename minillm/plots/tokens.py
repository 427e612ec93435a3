"""Token strips: a text cut into its tokens, one coloured box a token."""

from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from minillm.plots.style import GREY, Picture, style, visible

# Pale enough for black text, far enough apart to tell two neighbours; five, so that a repeated word rarely looks alike.
_TINTS = ("#CFE3F3", "#FBD9BF", "#C9E8DC", "#F1DCE9", "#F7E6AE")
_FONT_SIZE = 11.0  # points
_COLUMN = 0.602 * _FONT_SIZE / 72  # width of one DejaVu Sans Mono character, in inches
_LINE = 0.31  # height of one line of boxes, in inches
_GAP = 0.5  # between two boxes, in columns; half of it is padding inside the box


def token_strip(
    pieces: Sequence[str | bytes] | Mapping[str, Sequence[str | bytes]],
    *,
    tints: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    columns: int = 88,
    title: str | None = None,
) -> Figure:
    """Draw a text as its tokens: a coloured box each, in reading order, wrapped into lines.

    pieces: the text of each token, or several such lists under a label each, drawn one below the other so that they
        can be compared. A space is drawn as "·", a line end as "↵". A piece given as bytes that is not valid UTF-8 by
        itself (part of a character), or that the font cannot draw, is written as its bytes: "e6 97" is b"\\xe6\\x97".
    tints: a matplotlib colour for each piece, pale enough for black text, in the same form as pieces; None changes
        colour from token to token.
    columns: how many characters wide a line is; a longer piece is shortened in its middle.

    Raises ValueError when there is nothing to draw, tints do not fit or columns < 8, TypeError for a piece that is not
    str or bytes.
    """
    if columns < 8:
        raise ValueError(f"columns must be at least 8, got {columns}")
    if isinstance(pieces, str | bytes):
        raise TypeError("pieces must be a list of tokens, got one string: encode it first")
    strips = dict(pieces) if isinstance(pieces, Mapping) else {"": pieces}
    if not any(strips.values()):
        raise ValueError("pieces is empty: nothing to draw")
    colours = _tints_of(strips, tints)
    drawn = {label: _lines([_shown(piece) for piece in strip], columns) for label, strip in strips.items()}
    headers = sum(1 for label in drawn if label) + (title is not None)
    height = _LINE * (sum(len(lines) for lines in drawn.values()) + headers) + 0.12 * (len(drawn) + 1)
    width = columns * _COLUMN + 0.2
    with style():
        figure = Picture(figsize=(width, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height, 0))  # inches, downwards
        axes.axis("off")
        top = 0.08
        if title is not None:
            axes.set_title(title, loc="left", x=0.1 / width, y=1 - (top + 0.2) / height, pad=0, parse_math=False)
            top += _LINE
        for label, lines in drawn.items():
            if label:
                axes.text(0.1, top + _LINE / 2, label, va="center", fontsize=10, color=GREY, parse_math=False)
                top += _LINE
            for line in lines:
                for text, left, number, is_bytes in line:
                    _box(axes, text, left, top, colours[label][number], is_bytes)
                top += _LINE
            top += 0.12
    return figure


def _tints_of(
    strips: Mapping[str, Sequence[str | bytes]], tints: Sequence[str] | Mapping[str, Sequence[str]] | None
) -> dict[str, Sequence[str]]:
    if tints is None:
        return {label: [_TINTS[n % len(_TINTS)] for n in range(len(strip))] for label, strip in strips.items()}
    colours = dict(tints) if isinstance(tints, Mapping) else {"": tints}
    wanted, got = ({label: len(row) for label, row in rows.items()} for rows in (strips, colours))
    if wanted != got:
        raise ValueError(f"tints must hold one colour a piece, {wanted}, got {got}")
    return colours


def _box(axes: Axes, text: str, left: float, top: float, tint: str, is_bytes: bool) -> None:
    x, width = 0.1 + left * _COLUMN, (len(text) + _GAP) * _COLUMN
    shape = FancyBboxPatch(
        (x + 0.02, top + 0.035),
        width - 0.02,
        _LINE - 0.07,
        boxstyle="round,pad=0,rounding_size=0.04",
        fc=tint,
        ec="none",
    )
    axes.add_patch(shape)
    axes.text(
        x + 0.01 + width / 2,
        top + _LINE / 2,
        text,
        ha="center",
        va="center_baseline",
        family=["DejaVu Sans Mono", "DejaVu Sans"],  # the second for what the first lacks
        fontsize=_FONT_SIZE,
        color="#444444" if is_bytes else "black",
        parse_math=False,
    )


def _lines(shown: Iterable[tuple[str, bool]], columns: int) -> list[list[tuple[str, float, int, bool]]]:
    """Place each (text, is_bytes) at (text, left edge in columns, its number, is_bytes), starting lines as needed."""
    lines: list[list[tuple[str, float, int, bool]]] = [[]]
    left = 0.0
    for number, (text, is_bytes) in enumerate(shown):
        if len(text) > columns - 1:
            half = (columns - 2) // 2
            text = text[:half] + "…" + text[-half:]
        if left > 0 and left + len(text) + _GAP > columns:
            lines.append([])
            left = 0.0
        lines[-1].append((text, left, number, is_bytes))
        left += len(text) + _GAP
    return lines


def _shown(piece: str | bytes) -> tuple[str, bool]:
    """How a piece is written, and whether that is its bytes."""
    if isinstance(piece, str):
        return visible(piece), False
    if not isinstance(piece, bytes):
        raise TypeError(f"a piece must be str or bytes, got {type(piece).__name__}")
    try:
        text = visible(piece.decode())
    except UnicodeDecodeError:
        return piece.hex(" "), True
    undrawable = "\\u" in text and b"\\u" not in piece
    return (piece.hex(" "), True) if undrawable else (text, False)
