"""Loss curves draw the numbers they were given, and refuse what cannot be drawn."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from minillm.plots import loss_curve

HISTORY: list[dict[str, Any]] = [
    {"step": 1, "loss": 6.9, "learning_rate": 1e-4},
    {"step": 2, "loss": 5.0, "validation_loss": 5.5},
    {"step": 3, "loss": 4.0, "validation_loss": None},
    {"step": 4, "loss": 3.5, "validation_loss": 4.1},
]


def test_draws_the_recorded_losses_as_they_are() -> None:
    axes = loss_curve(HISTORY).axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {
        "training": [[1, 6.9], [2, 5.0], [3, 4.0], [4, 3.5]],
        "validation": [[2, 5.5], [4, 4.1]],
    }
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "validation"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss (nats per token)")
    assert axes.get_xscale() == "linear"


def test_draws_named_series_with_references_on_a_log_axis() -> None:
    series = {"trained": ([1, 2, 4], [3.0, 2.5, math.nan])}
    figure = loss_curve(series, references={"floor $x$": 1.25}, xlabel="position", title="By position $", log_x=True)
    axes = figure.axes[0]
    curve, reference = axes.lines
    np.testing.assert_array_equal(curve.get_ydata(), [3.0, 2.5, math.nan])
    assert set(reference.get_ydata()) == {1.25}
    assert [text.get_text() for text in axes.texts] == ["floor $x$: 1.25"]
    assert (axes.get_xlabel(), axes.get_xscale(), axes.get_title(loc="left")) == ("position", "log", "By position $")
    assert axes.get_legend() is None
    figure.draw_without_rendering()


def test_accepts_tensors_and_keeps_every_line_apart() -> None:
    series = {f"run {i}": (range(3), torch.full((3,), float(i), requires_grad=True)) for i in range(9)}
    axes = loss_curve(series).axes[0]
    assert [line.get_ydata().tolist() for line in axes.lines] == [[float(i)] * 3 for i in range(9)]
    assert len({line.get_color() for line in axes.lines[:7]}) == 7


@pytest.mark.parametrize(
    ("history", "error", "words"),
    [
        ([], ValueError, "nothing to draw"),
        ({}, ValueError, "nothing to draw"),
        ([{"step": 1, "learning_rate": 0.1}], ValueError, "nothing to draw"),
        ({"a": ([1, 2], [1.0])}, ValueError, "as many x as y"),
        ({"a": ([], [])}, ValueError, "at least one"),
        ({"a": [1.0, 2.0]}, TypeError, "must be a tuple"),
        ({"a": ([1], ["high"])}, TypeError, "must be numbers"),
    ],
)
def test_refuses_what_cannot_be_drawn(history: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        loss_curve(history)


def test_refuses_a_reference_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match=r"references\['floor'\].*inf"):
        loss_curve(HISTORY, references={"floor": math.inf})
