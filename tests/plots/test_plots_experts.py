"""Pictures of expert load show the shares they are given, at any number of experts, and a collapse stands out."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from minillm.plots import expert_load, expert_load_over_time


def heights(axes: Axes) -> list[list[float]]:
    return [[bar.get_height() for bar in part] for part in axes.containers if isinstance(part, BarContainer)]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def labels(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.get_ticklabels()]


def test_draws_shares_around_the_line_of_equal_ones():
    figure = expert_load(torch.tensor([1, 2, 3, 4]), title="Layer $0$")
    (axes,) = figure.axes
    assert heights(axes) == [[10.0, 20.0, 30.0, 40.0]]
    assert list(axes.lines[0].get_ydata()) == [25.0, 25.0]
    assert legend(figure) == ["worked on", "equal shares"]
    assert axes.get_title(loc="left") == "Layer $0$"
    assert labels(axes.xaxis) == ["0", "1", "2", "3"]
    figure.draw_without_rendering()


def test_what_was_dropped_stands_on_top_in_the_same_unit():
    figure = expert_load([30, 10, 0], dropped=[10, 0, 0])
    worked, dropped = heights(figure.axes[0])
    np.testing.assert_allclose(worked, [60.0, 20.0, 0.0])
    np.testing.assert_allclose(dropped, [20.0, 0.0, 0.0])
    assert [bar.get_y() for bar in figure.axes[0].containers[1]] == worked
    assert legend(figure) == ["worked on", "dropped: no room", "equal shares"]


def test_panels_share_their_scale_and_each_sums_to_one_hundred():
    loads = {"without a loss": [97, 1, 1, 1], "with $l$": [0.25] * 4, "nothing": [0] * 4}
    figure = expert_load(loads, dropped={name: [0] * 4 for name in loads}, title="Two runs")
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(loads)
    assert [sum(heights(axes)[0]) for axes in figure.axes] == pytest.approx([100.0, 100.0, 0.0])
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    assert figure.axes[0].get_ylim()[1] > 97.0
    assert (figure.get_suptitle(), legend(figure)) == ("Two runs", ["worked on", "equal shares"])


@pytest.mark.parametrize(("n_experts", "n_panels"), [(1, 2), (8, 1), (16, 3), (64, 2), (100, 1), (256, 2)])
def test_is_legible_for_many_experts_and_layers(n_experts, n_panels):
    rng = np.random.default_rng(0)
    figure = expert_load({f"layer {n}": rng.integers(1, 99, n_experts) for n in range(n_panels)})
    assert figure.get_size_inches()[0] <= 9.0
    figure.draw_without_rendering()
    for axes in [axes for axes in figure.axes if axes.containers]:
        boxes = [text.get_window_extent() for text in axes.get_xticklabels()]
        assert len(boxes) >= min(n_experts, 4)
        assert all(a.x1 < b.x0 for a, b in pairwise(boxes)), "numbers do not touch"
        assert all(bar.get_window_extent().width >= 1.0 for bar in axes.containers[0]), "a bar is a pixel or more"
    assert sum(bool(axes.containers) for axes in figure.axes) == n_panels


def test_columns_arrange_the_panels():
    loads = {str(n): [1, 1] for n in range(4)}
    figure = expert_load(loads, columns=1)
    figure.draw_without_rendering()
    assert len({round(axes.get_position().x0, 3) for axes in figure.axes}) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"loads": {}}, ValueError, "loads is empty"),
        ({"loads": []}, ValueError, r"loads must have shape \(n_experts,\)"),
        ({"loads": {"a": [[1, 2]]}}, ValueError, r"loads\['a'\] must have shape"),
        ({"loads": [1, -1]}, ValueError, "none negative"),
        ({"loads": [1, np.nan]}, ValueError, "finite"),
        ({"loads": ["a", "b"]}, TypeError, "loads must be numbers"),
        ({"loads": [1, 2], "dropped": [1]}, ValueError, "dropped must have the panels and experts of loads"),
        ({"loads": {"a": [1, 2]}, "dropped": {"b": [1, 2]}}, ValueError, "dropped must have the panels"),
        ({"loads": [1, 2], "dropped": [1, -1]}, ValueError, "dropped must be finite numbers, none negative"),
        ({"loads": [1, 2], "columns": 0}, ValueError, "columns must be an integer of at least 1, got 0"),
    ],
)
def test_loads_that_cannot_be_drawn_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        expert_load(**arguments)


def test_each_step_is_drawn_over_its_own_mean():
    figure = expert_load_over_time([0, 10, 30], [[5, 5], [30, 10], [0, 2]], title="A run")
    axes, colorbar = figure.axes
    mesh = axes.collections[0]
    np.testing.assert_allclose(mesh.get_array(), [[1.0, 1.5, 0.0], [1.0, 0.5, 2.0]])
    edges = mesh.get_coordinates()
    assert edges[0, :, 0].tolist() == [-5.0, 5.0, 20.0, 40.0], "borders halfway between the steps"
    assert edges[:, 0, 1].tolist() == [-0.5, 0.5, 1.5]
    assert axes.yaxis_inverted(), "expert 0 on top"
    assert (axes.get_xlabel(), axes.get_ylabel(), colorbar.get_ylabel()) == ("step", "expert", "load over the mean")
    assert axes.get_title(loc="left") == "A run"
    figure.draw_without_rendering()


def test_a_collapse_stands_out_from_balance_at_any_number_of_experts():
    for n_experts in (4, 64):
        collapsed = np.zeros((3, n_experts))
        collapsed[:, 2] = 100
        figure = expert_load_over_time([1, 2, 3], {"collapsed": collapsed, "balanced": np.ones((3, n_experts))})
        figure.draw_without_rendering()
        meshes = [axes.collections[0] for axes in figure.axes[:2]]
        bad, good = ([mesh.to_rgba(value)[:3] for value in mesh.get_array()[:, 0]] for mesh in meshes)
        assert all(min(colour) > 0.9 for colour in good), "balanced: nearly white"
        assert all(max(colour) < 0.55 for colour in bad), "everything or nothing: dark"
        assert bad[2][2] > bad[2][1], "the one that gets everything is violet"
        assert bad[0][0] > 2 * bad[0][2], "the others are brown"


def test_a_step_without_load_is_left_blank_and_one_step_is_enough():
    mesh = expert_load_over_time([5], torch.zeros(1, 3)).axes[0].collections[0]
    assert np.isnan(np.ma.filled(mesh.get_array(), np.nan)).all()
    assert mesh.get_coordinates()[0, :, 0].tolist() == [4.5, 5.5]


@pytest.mark.parametrize("n_panels", [1, 3])
def test_stays_within_a_notebook_page(n_panels):
    tables = {f"run {n}": np.ones((4, 64)) for n in range(n_panels)}
    figure = expert_load_over_time(range(4), tables, title="Runs")
    assert figure.get_size_inches()[0] <= 9.0
    assert [axes.get_title(loc="left") for axes in figure.axes[:n_panels]] == list(tables)
    assert figure.get_suptitle() == "Runs"
    figure.draw_without_rendering()


@pytest.mark.parametrize(
    ("steps", "loads", "error", "words"),
    [
        ([], [[1]], ValueError, "steps must be finite numbers that rise"),
        ([1, 1], [[1], [1]], ValueError, "steps must be finite numbers that rise"),
        ([0, np.inf], [[1], [1]], ValueError, "steps must be finite"),
        ([0, 1], {"a": [[1, 2]]}, ValueError, r"loads\['a'\] must have 2 rows, one for each step, got 1"),
        ([0], [1, 2], ValueError, r"loads must have shape \(n_steps, n_experts\)"),
        ([0], [[1, -2]], ValueError, "none negative"),
        ([0], {}, ValueError, "loads is empty"),
        ([0], [["x"]], TypeError, "loads must be numbers"),
    ],
)
def test_histories_that_cannot_be_drawn_are_refused(steps, loads, error, words):
    with pytest.raises(error, match=words):
        expert_load_over_time(steps, loads)
