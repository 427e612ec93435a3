"""A grid of attention patterns shows each pair where it belongs, with its share of all pairs."""

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection

from minillm.plots import pattern_grid


def test_draws_each_matrix_under_its_name() -> None:
    patterns = {"causal": torch.ones(6, 6).tril().bool(), "a $b$": [[True, False, False, False]]}
    figure = pattern_grid(patterns, title="Two patterns")
    for axes, matrix in zip(figure.axes, patterns.values(), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), np.asarray(matrix, dtype=float))
        assert axes.images[0].get_clim() == (0.0, 1.0)
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("key", "query")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["causal\n58 % of the pairs", "a $b$\n25 % of the pairs"]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["0", "5"]
    assert figure.get_suptitle() == "Two patterns"
    figure.draw_without_rendering()


def test_small_shares_and_empty_patterns_are_told_apart() -> None:
    diagonal = np.eye(500)
    figure = pattern_grid({"diagonal": diagonal, "nothing": 0 * diagonal})
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["diagonal\n0.2 % of the pairs", "nothing\n0 % of the pairs"]


def test_tiles_have_borders() -> None:
    axes = pattern_grid({"causal": np.tri(100)}, block_size=32).axes[0]
    lines = [
        segment for part in axes.collections if isinstance(part, LineCollection) for segment in part.get_segments()
    ]
    assert sorted({segment[0][0] for segment in lines} - {-0.5}) == [31.5, 63.5, 95.5]
    assert sorted({segment[0][1] for segment in lines} - {-0.5}) == [31.5, 63.5, 95.5]


@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_stays_within_a_notebook_page(count: int) -> None:
    figure = pattern_grid({str(number): np.tri(30) for number in range(count)})
    assert figure.get_size_inches()[0] <= 10
    assert sum(bool(axes.images) for axes in figure.axes) == count
    assert sum(axes.axison for axes in figure.axes) == count


@pytest.mark.parametrize(
    ("patterns", "arguments", "words"),
    [
        ({}, {}, "at least one matrix"),
        ({"x": [True, False]}, {}, "n_queries, n_keys"),
        ({"x": np.zeros((0, 3))}, {}, "neither 0"),
        ({"x": np.full((2, 2), 0.5)}, {}, "True and False only"),
        ({"x": np.eye(2)}, {"columns": 0}, "columns must be an integer of at least 1"),
        ({"x": np.eye(2)}, {"block_size": 0}, "block_size must be an integer of at least 1"),
    ],
)
def test_refuses_what_is_no_pattern(patterns: dict[str, Any], arguments: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pattern_grid(patterns, **arguments)
