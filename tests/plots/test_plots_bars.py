"""Bars are as long as their values, in the order given, with the value written out."""

import math
from typing import Any

import pytest
from matplotlib.axes import Axes

from minillm.plots import bars, format_bytes, memory_bars


def _labels(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_yticklabels()]


def test_draws_values_top_to_bottom() -> None:
    figure = bars({" $the$": 0.5, "a cat": 0.25, "dog": 0.0}, xlabel="probability", title="Next token")
    axes = figure.axes[0]
    assert [patch.get_width() for patch in axes.patches] == [0.5, 0.25, 0.0]
    assert _labels(axes) == ["·$the$", "a cat", "dog"]
    assert [text.get_text() for text in axes.texts] == ["0.5", "0.25", "0"]
    top, bottom = axes.get_ylim()[1], axes.get_ylim()[0]
    assert top < 0 < bottom  # the first bar is the uppermost one
    assert (axes.get_xlabel(), axes.get_title(loc="left")) == ("probability", "Next token")
    figure.draw_without_rendering()


def test_draws_panels_on_one_scale() -> None:
    figure = bars({"cold": {"a": 0.9, "b": 0.1}, "hot": {"c": 0.5}}, title="Temperature", write="{:.0%}".format)
    cold, hot = figure.axes
    assert cold.get_xlim() == hot.get_xlim()
    assert cold.get_ylim() == hot.get_ylim()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["cold", "hot"]
    assert [text.get_text() for text in (*cold.texts, *hot.texts)] == ["90%", "10%", "50%"]
    assert figure.get_suptitle() == "Temperature"


def test_draws_powers_of_ten_on_a_log_axis() -> None:
    axes = bars({"here": 3e13, "GPT-3": 3.14e23}, log=True).axes[0]
    assert axes.get_xscale() == "log"
    assert axes.get_xlim()[0] < 3e13 < 3.14e23 < axes.get_xlim()[1]
    assert [patch.get_x() + patch.get_width() for patch in axes.patches] == pytest.approx([3e13, 3.14e23])


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_refuses_what_has_no_length(value: float) -> None:
    with pytest.raises(ValueError, match=r"values\['a'\]"):
        bars({"a": value})
    with pytest.raises(ValueError, match=r"values\['weights'\]"):
        memory_bars({"row": {"weights": value}})


def test_refuses_zero_on_a_log_axis_and_nothing_at_all() -> None:
    with pytest.raises(ValueError, match="logarithmic"):
        bars({"a": 0.0}, log=True)
    empty: list[dict[str, Any]] = [{}, {"panel": {}}]
    for values in empty:
        with pytest.raises(ValueError, match="nothing to draw"):
            bars(values)
        with pytest.raises(ValueError, match="nothing to draw"):
            memory_bars(values)


def test_stacks_memory_in_one_unit() -> None:
    gib = 1024**3
    figure = memory_bars(
        {"plain": {"weights": 2 * gib, "optimizer": 6 * gib}, "sharded": {"optimizer": 1.5 * gib}}, title="Memory"
    )
    axes = figure.axes[0]
    stacks = [[(patch.get_x(), patch.get_width()) for patch in container] for container in axes.containers]
    assert stacks == [[(0, 2), (0, 0)], [(2, 6), (0, 1.5)]]
    assert [text.get_text() for text in axes.texts] == ["8 GiB", "1.5 GiB"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["weights", "optimizer"]
    assert (_labels(axes), axes.get_xlabel()) == (["plain", "sharded"], "GiB")
    figure.draw_without_rendering()


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1,023 bytes"),
        (1536, "1.5 KiB"),
        (1024**2, "1 MiB"),
        (250 * 1024**3, "250 GiB"),
        (2.0**70, "1,048,576 PiB"),
    ],
)
def test_writes_bytes_in_the_unit_that_fits(n_bytes: float, text: str) -> None:
    assert format_bytes(n_bytes) == text
