"""The roof stands where the two ceilings meet, operators stand where they were put, and tiles show their turn."""

import math
from typing import Any

import numpy as np
import pytest

from minillm.plots import roofline, tile_order

H100 = {"bfloat16": 1000e12, "float32": 60e12}


def test_the_roof_bends_at_the_ridge() -> None:
    figure = roofline(H100, 2e12, {"softmax": 1.25, "flash, measured": (800.0, 400e12)}, title="An $H100$")
    axes = figure.axes[0]
    x, y = np.asarray(axes.lines[0].get_xydata()).T
    assert x[1] == 500.0  # operations a byte
    assert y[0] == pytest.approx(2e12 * x[0])
    assert list(y[1:]) == [1000e12, 1000e12]
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_title(loc="left")) == ("log", "log", "An $H100$")
    points = {line.get_label(): tuple(np.asarray(line.get_xydata())[0]) for line in axes.lines}
    assert points["softmax"] == (1.25, 2.5e12)  # on the slanted part
    assert points["flash, measured"] == (800.0, 400e12)  # where it was measured, under the roof
    assert axes.get_xlim()[0] < 1.25
    assert axes.get_xlim()[1] > 800.0
    notes = [text.get_text() for text in axes.texts]
    assert notes == ["bfloat16: 1 P operations/s", "float32: 60 T operations/s", "2 TB/s"]
    figure.draw_without_rendering()


def test_an_operator_above_the_ridge_stands_on_the_flat_part() -> None:
    axes = roofline({"float32": 1e11}, 1e10, {"product": 100.0}).axes[0]
    (point,) = [line for line in axes.lines if line.get_label() == "product"]
    assert np.asarray(point.get_ydata()).tolist() == [1e11]


def test_operators_at_one_place_share_a_mark() -> None:
    axes = roofline({"float32": 1e11}, 1e10, {"scores": 2.0, "softmax": 1.0, "sum": 2.0}).axes[0]
    assert [line.get_label() for line in axes.lines if line.get_marker() == "D"] == ["scores, sum", "softmax"]


@pytest.mark.parametrize(
    ("flops", "n_bytes", "operators", "words"),
    [
        ({}, 1.0, {"a": 1.0}, "at least one entry"),
        ({"a": 1.0}, 1.0, {}, "at least one entry"),
        ({"a": 0.0}, 1.0, {"a": 1.0}, r"flops_per_second\['a'\] must be positive"),
        ({"a": 1.0}, math.inf, {"a": 1.0}, "bytes_per_second must be positive and finite"),
        ({"a": 1.0}, 1.0, {"b": math.nan}, r"operators\['b'\]: operations per byte"),
        ({"a": 1.0}, 1.0, {"b": (1.0, -2.0)}, r"operators\['b'\]: operations per second"),
    ],
)
def test_refuses_what_is_no_roofline(flops: Any, n_bytes: float, operators: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        roofline(flops, n_bytes, operators)


def test_tiles_show_when_they_were_visited() -> None:
    causal = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    by_keys = sorted(causal, key=lambda tile: (tile[1], tile[0]))
    figure = tile_order({"by $queries$": causal, "by keys": by_keys}, 3, title="Two orders")
    for axes, order in zip(figure.axes, (causal, by_keys), strict=True):
        turns: Any = np.ma.asarray(axes.images[0].get_array())
        for turn, tile in enumerate(order, start=1):
            assert turns[tile] == turn
        assert sorted(zip(*np.nonzero(np.ma.getmaskarray(turns)), strict=True)) == [(0, 1), (0, 2), (1, 2)]
        written = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axes.texts}
        assert written == {tile: str(turn) for turn, tile in enumerate(order, start=1)}
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["by $queries$\n6 tiles", "by keys\n6 tiles"]
    assert figure.get_suptitle() == "Two orders"
    figure.draw_without_rendering()


def test_many_tiles_are_shown_by_their_shade_alone() -> None:
    order = [(row, column) for row in range(20) for column in range(30)]
    axes = tile_order({"all": order}, 20, 30).axes[0]
    assert not axes.texts
    np.testing.assert_array_equal(axes.images[0].get_array(), np.arange(1, 601).reshape(20, 30))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_stays_within_a_notebook_page(count: int) -> None:
    figure = tile_order({str(number): [(0, 0)] for number in range(count)}, 4)
    assert figure.get_size_inches()[0] <= 10
    assert sum(axes.axison for axes in figure.axes) == count


@pytest.mark.parametrize(
    ("visits", "arguments", "words"),
    [
        ({}, {"n_rows": 2}, "at least one algorithm"),
        ({"a": []}, {"n_rows": 0}, "n_rows must be an integer of at least 1"),
        ({"a": []}, {"n_rows": 2, "columns": 0}, "columns must be an integer of at least 1"),
        ({"a": [(0, 2)]}, {"n_rows": 2}, r"holds tile \(0, 2\), outside of 2 x 2"),
    ],
)
def test_refuses_what_is_no_order(visits: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tile_order(visits, **arguments)
