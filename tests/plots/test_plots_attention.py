"""Attention maps show each weight where it belongs, under the right token."""

from typing import Any

import numpy as np
import pytest
import torch

from minillm.plots import attention_map


def _causal(heads: int, n: int) -> torch.Tensor:
    scores = torch.randn(heads, n, n).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    return scores.softmax(-1)


def test_draws_each_head_with_its_weights_and_tokens() -> None:
    weights = _causal(3, 4)
    figure = attention_map(weights, ["The", " $cat$", "\n", "语"], title="Layer 0")
    *panels, colorbar = figure.axes
    drawn = [axes for axes in panels if axes.images]
    assert [axes.get_title(loc="left") for axes in drawn] == ["head 0", "head 1", "head 2"]
    for axes, head in zip(drawn, weights, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), head.double().numpy())
        assert axes.images[0].get_clim() == (0.0, 1.0)
        labels = ["The", "·$cat$", "↵", "\\u8bed"]
        assert [text.get_text() for text in axes.get_xticklabels()] == labels
        assert [text.get_text() for text in axes.get_yticklabels()] == labels
    assert colorbar.get_ylabel() == "attention weight"
    assert figure.get_suptitle() == "Layer 0"
    figure.draw_without_rendering()  # neither the dollar signs nor the missing glyph may warn


def test_draws_one_head_and_cross_attention() -> None:
    weights = [[0.25, 0.75, 0.0]]
    axes = attention_map(weights, ["a", "b", "c"], queries=["q"], heads=["only"]).axes[0]
    assert axes.images[0].get_array().tolist() == weights
    assert axes.get_title(loc="left") == "only"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["q"]


def test_takes_low_precision_weights_that_need_gradients() -> None:
    weights = torch.full((1, 3, 3), 1 / 3, dtype=torch.bfloat16, requires_grad=True)
    assert attention_map(weights, ["a", "b", "c"]).axes[0].images[0].get_array().shape == (3, 3)


@pytest.mark.parametrize("heads", [1, 2, 4, 12])
def test_stays_within_a_notebook_page(heads: int) -> None:
    for n in (2, 16, 40):
        assert attention_map(_causal(heads, n), ["token"] * n).get_size_inches()[0] <= 10


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        (np.full(4, 0.25), ValueError, "shape"),
        (np.zeros((0, 2, 2)), ValueError, "none of them 0"),
        (np.zeros((1, 2, 2)), ValueError, "softmax"),
        (np.array([[[1.5, -0.5], [0.5, 0.5]]]), ValueError, "not negative"),
        (np.full((1, 2, 2), np.nan), ValueError, "probabilities"),
        (np.full((1, 2, 3), 1 / 3), ValueError, r"tokens must have 3 entries .* got 2"),
        ([["a", "b"]], TypeError, "must be numbers"),
    ],
)
def test_refuses_what_is_no_attention(weights: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        attention_map(weights, ["x", "y"], queries=["x", "y"])


def test_refuses_a_wrong_number_of_names() -> None:
    with pytest.raises(ValueError, match="heads must have 2 entries"):
        attention_map(_causal(2, 2), ["x", "y"], heads=["one"])
