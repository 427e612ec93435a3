"""Token strips: what is drawn, in which order, and that every kind of token can be drawn."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from minillm.plots import token_strip


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def boxes(figure: Figure) -> list[FancyBboxPatch]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]


def test_one_box_a_token_in_reading_order():
    figure = token_strip(["The", " cat", "\n"])
    assert texts(figure) == ["The", "·cat", "↵"]
    edges = [box.get_bbox() for box in boxes(figure)]
    assert len(edges) == 3
    assert all(left.x1 <= right.x0 for left, right in pairwise(edges))
    assert len({box.get_facecolor() for box in boxes(figure)}) == 3


def test_tints_give_each_piece_its_colour():
    figure = token_strip({"a": ["x", "y"], "b": ["z"]}, tints={"a": ["#ff0000", "#00ff00"], "b": ["#ff0000"]})
    assert [to_hex(box.get_facecolor()) for box in boxes(figure)] == ["#ff0000", "#00ff00", "#ff0000"]
    one = token_strip(["x", "y"], tints=["#ffffff", "#000000"])
    assert [to_hex(box.get_facecolor()) for box in boxes(one)] == ["#ffffff", "#000000"]


@pytest.mark.parametrize("tints", [["red"], {"a": ["red", "red"]}, {"": ["red"]}])
def test_tints_that_do_not_fit_are_refused(tints):
    with pytest.raises(ValueError, match="tints must hold one colour a piece"):
        token_strip(["x", "y"], tints=tints)


def test_labels_and_title_stand_above_their_strips():
    figure = token_strip({"by words": ["ab", "c"], "by letters": ["a", "b", "c"]}, title="two ways")
    assert texts(figure) == ["by words", "ab", "c", "by letters", "a", "b", "c"]
    assert figure.axes[0].get_title(loc="left") == "two ways"
    figure.canvas.draw()
    title = next(child for child in figure.axes[0].get_children() if getattr(child, "get_text", str)() == "two ways")
    drawn = [title, *figure.axes[0].texts]
    heights = [text.get_window_extent().y0 for text in drawn]
    assert heights[0] > heights[1] > heights[2] > heights[4] > heights[5], "from the top down"
    assert title.get_window_extent().y1 <= figure.bbox.y1, "inside the figure"


@pytest.mark.parametrize(
    ("piece", "drawn"),
    [
        ("日".encode(), "e6 97 a5"),  # the font has no such glyph
        (b"\xe6\x97", "e6 97"),  # two thirds of a character
        ("é".encode(), "é"),
        (b"\\u", "\\u"),
        (b"$x_1$", "$x_1$"),
        ("日", "\\u65e5"),
        (b"", ""),
    ],
)
def test_what_cannot_be_drawn_is_written_as_its_bytes(piece, drawn):
    assert texts(token_strip([piece])) == [drawn]


def test_long_texts_wrap_inside_the_figure_and_no_token_is_split():
    pieces = [f"w{n}" for n in range(100)]
    figure = token_strip(pieces, columns=30)
    assert texts(figure) == pieces
    width = figure.get_size_inches()[0]
    assert all(box.get_bbox().x0 >= 0 and box.get_bbox().x1 <= width for box in boxes(figure))
    assert len({box.get_bbox().y0 for box in boxes(figure)}) > 10


def test_a_token_longer_than_a_line_is_shortened_in_its_middle():
    figure = token_strip([" " * 80, "x"], columns=20)
    assert texts(figure)[0] == "·" * 9 + "…" + "·" * 9
    assert boxes(figure)[0].get_bbox().x1 <= figure.get_size_inches()[0]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=12), st.binary(max_size=12)), min_size=1, max_size=6))
def test_any_tokens_can_be_drawn(pieces):
    figure = token_strip(pieces)
    assert len(boxes(figure)) == len(pieces)
    png, _ = figure._repr_png_()
    assert png.startswith(b"\x89PNG")


@pytest.mark.parametrize("nothing", [[], {}, {"label": []}])
def test_nothing_to_draw_is_refused(nothing):
    with pytest.raises(ValueError, match="nothing to draw"):
        token_strip(nothing)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("one string",), TypeError, "encode it first"),
        (([1, 2],), TypeError, "str or bytes"),
    ],
)
def test_wrong_kinds_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        token_strip(*arguments)


def test_too_few_columns_are_refused():
    with pytest.raises(ValueError, match="columns"):
        token_strip(["a"], columns=7)
