"""Pictures of what experts prefer: each number in its cell, each token in the colour of its expert."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from minillm.plots import preference_map, routing_map


def strip(figure: Figure) -> list[tuple[str, str]]:
    """(text, colour) of each box, in order: the legend first."""
    axes = figure.axes[0]
    boxes = [to_hex(patch.get_facecolor()) for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
    texts = [text.get_text() for text in axes.texts if text.get_fontfamily()[0] == "DejaVu Sans Mono"]
    return list(zip(texts, boxes, strict=True))


def headers(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts if text.get_fontfamily()[0] != "DejaVu Sans Mono"]


def test_lifts_are_drawn_and_written_on_a_scale_around_one():
    figure = preference_map([[0.0, 1.0, 12.4], [2.0, 0.061, np.nan]], ["$x", " the", "\n"], title="Lift")
    axes, colorbar = figure.axes
    image = axes.images[0]
    assert [text.get_text() for text in axes.texts] == ["0", "1.0", "12", "2.0", "0.06"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["$x", "·the", "↵"]
    low, middle, high = (image.cmap(image.norm(value))[:3] for value in (0.25, 1.0, 4.0))
    assert min(middle) > 0.9, "no preference is white"
    assert (low[0] > low[2], high[2] > high[1]) == (True, True), "brown below, violet above"
    assert image.get_array().mask[1, 2], "unknown is left blank"
    assert colorbar.get_ylabel() == "lift (1: no preference)"
    assert axes.get_title(loc="left") == "Lift"
    figure.draw_without_rendering()


def test_shares_start_at_zero():
    shares = torch.tensor([[0.25, 1.0], [0.75, 0.0]], dtype=torch.bfloat16)
    axes = preference_map(shares, ["prose", "code"], kind="share").axes[0]
    assert axes.images[0].get_clim() == (0.0, 1.0)
    np.testing.assert_array_equal(axes.images[0].get_array(), shares.double())


@pytest.mark.parametrize(("n_experts", "n_labels"), [(1, 1), (16, 14), (8, 60), (256, 3)])
def test_stays_within_a_notebook_page(n_experts, n_labels):
    values = np.random.default_rng(0).lognormal(size=(n_experts, n_labels))
    figure = preference_map(values, [f" token {n}" for n in range(n_labels)])
    width, height = figure.get_size_inches()
    assert width <= 9.0
    assert height <= 9.0
    figure.draw_without_rendering()
    axes = figure.axes[0]
    for texts, span in ((axes.get_xticklabels(), "x"), (axes.get_yticklabels(), "y")):
        boxes = [text.get_window_extent() for text in texts]
        ends = sorted((getattr(box, f"{span}0"), getattr(box, f"{span}1")) for box in boxes)
        assert all(a[1] <= b[0] + 0.5 for a, b in pairwise(ends)), "labels do not cover each other"


@pytest.mark.parametrize(
    ("values", "arguments", "error", "words"),
    [
        ([1.0, 2.0], {}, ValueError, r"shape \(n_experts, n_labels\)"),
        (np.zeros((0, 2)), {}, ValueError, "neither 0"),
        (np.ones((2, 3)), {}, ValueError, "labels must have 3 entries"),
        ([[1.0, -1.0]], {}, ValueError, "lifts: finite and not negative"),
        ([[1.0, np.inf]], {}, ValueError, "lifts: finite"),
        ([[1.0, 1.5]], {"kind": "share"}, ValueError, r"shares in \[0, 1\]"),
        ([[1.0, np.nan]], {"kind": "share"}, ValueError, "shares in"),
        ([[1.0, 1.0]], {"kind": "counts"}, ValueError, "'lift' or 'share', got 'counts'"),
        ([["a", "b"]], {}, TypeError, "values must be numbers"),
    ],
)
def test_preferences_that_cannot_be_drawn_are_refused(values, arguments, error, words):
    with pytest.raises(error, match=words):
        preference_map(values, ["a", "b"], **arguments)


def test_each_token_has_the_colour_of_its_expert():
    figure = routing_map(["def", " f", "(", ")"], [1, 0, None, 1], n_experts=3, title="Layer 0")
    drawn = strip(figure)
    colours = dict(drawn[:4])
    assert list(colours) == ["0", "1", "2", "none"]
    assert len(set(colours.values())) == 4
    assert drawn[4:] == [("def", colours["1"]), ("·f", colours["0"]), ("(", colours["none"]), (")", colours["1"])]
    assert (headers(figure), figure.axes[0].get_title(loc="left")) == (["expert"], "Layer 0")


def test_layers_are_drawn_one_below_the_other_in_the_same_colours():
    figure = routing_map(["a", "b"], {"layer 1": torch.tensor([0, 1]), "layer 3": np.array([1, 1])})
    drawn = strip(figure)
    colours = dict(drawn[:2])
    assert [colour for _, colour in drawn[2:]] == [colours[expert] for expert in "0111"]
    assert headers(figure) == ["expert", "layer 1", "layer 3"]
    assert colours == dict(strip(routing_map(["x"], [3]))[:2]), "the same in every picture"


def test_of_many_experts_those_of_most_tokens_have_colours():
    experts = [expert for expert in range(20, 32) for _ in range(1 + (expert > 21))]
    drawn = strip(routing_map(["x"] * len(experts), experts, n_experts=64))
    legend = drawn[:11]
    assert [text for text, _ in legend] == [*map(str, range(22, 32)), "another"]
    assert len({colour for _, colour in legend}) == 11
    assert {colour for (_, colour), expert in zip(drawn[11:], experts, strict=True) if expert < 22} == {legend[10][1]}


@settings(max_examples=6, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=6), st.none() | st.integers(0, 300)), min_size=1, max_size=8))
def test_any_routing_can_be_drawn(tokens):
    pieces, experts = zip(*tokens, strict=True)
    drawn = strip(routing_map(pieces, experts))
    assert len(drawn) > len(pieces)
    shown = [colour for _, colour in drawn[-len(pieces) :]]
    named = dict(drawn[: -len(pieces)])
    for expert, colour in zip(experts, shown, strict=True):
        assert colour == named["none" if expert is None else str(expert) if str(expert) in named else "another"]


@pytest.mark.parametrize(
    ("pieces", "experts", "error", "words"),
    [
        ([], [], ValueError, "nothing to draw"),
        (["a"], {}, ValueError, "nothing to draw"),
        ("ab", [0, 1], TypeError, "encode it first"),
        (["a"], [0, 1], ValueError, "experts must have 1 entries"),
        (["a"], {"layer 1": []}, ValueError, r"experts\['layer 1'\] must have 1 entries"),
        (["a"], [4], ValueError, r"in \[0, n_experts=4\) or None, got 4"),
        (["a"], [-1], ValueError, "got -1"),
        (["a"], [0.5], TypeError, "integer"),
        (["a"], {"expert": [0]}, ValueError, "must have another name"),
    ],
)
def test_routings_that_cannot_be_drawn_are_refused(pieces, experts, error, words):
    with pytest.raises(error, match=words):
        routing_map(pieces, experts, n_experts=4)
