"""The table of ranks: every rank stands once, at its place, in the colour of its group."""

import math
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from minillm.distributed import MeshLayout
from minillm.plots import mesh_table


def cells(axes: Axes) -> dict[int, tuple[tuple[float, float], Any]]:
    """(column, row) and colour, by rank."""
    colours = {patch.get_xy(): patch.get_facecolor() for patch in axes.patches if isinstance(patch, Rectangle)}
    ranks = {text.get_text(): text.get_position() for text in axes.texts if text.get_text().isdecimal()}
    corners = {int(rank): (math.floor(x), math.floor(y)) for rank, (x, y) in ranks.items()}
    return {rank: (corner, colours[corner]) for rank, corner in corners.items()}


@pytest.mark.parametrize("axis", ["pp", "dp", "tp"])
def test_ranks_of_a_group_have_one_colour(axis: str) -> None:
    layout = MeshLayout(dp=2, pp=2, tp=2)
    figure = mesh_table(layout.sizes, colour_by=axis, title="$8$ ranks")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    drawn = cells(axes)
    assert sorted(drawn) == list(range(8))
    assert [drawn[rank][0] for rank in range(8)] == [(rank % 2, rank // 2) for rank in range(8)]
    groups = [{drawn[rank][1] for rank in group} for group in layout.groups(axis)]
    assert all(len(group) == 1 for group in groups)
    assert len(set.union(*groups)) == len(groups)
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "pp=0 dp=0",
        "pp=0 dp=1",
        "pp=1 dp=0",
        "pp=1 dp=1",
    ]


def test_shared_experts_are_axes_of_their_own() -> None:
    layout = MeshLayout(dp=4, ep=2)
    (axes,) = mesh_table(layout.sizes, colour_by=["expert_dp", "ep"]).axes
    assert len({colour for _, colour in cells(axes).values()}) == 1  # all are one data parallel group
    assert axes.get_yticklabels()[3].get_text() == "expert_dp=1 ep=1"


def test_nodes_stand_under_their_ranks() -> None:
    (axes,) = mesh_table({"dp": 2, "tp": 4}, ranks_per_node=4).axes
    nodes = [text.get_text() for text in axes.texts if text.get_text().startswith("node")]
    assert nodes == ["node 0"] * 4 + ["node 1"] * 4


@pytest.mark.parametrize(
    ("sizes", "arguments", "message"),
    [
        ({}, {}, "sizes must name at least one axis"),
        ({"dp": 0}, {}, "dp must be an integer of at least 1, got 0"),
        ({"dp": 2}, {"colour_by": "tp"}, "colour_by must be of dp, got 'tp'"),
        ({"dp": 512}, {}, "sizes must make at most 256 ranks, got 512"),
        ({"dp": 2}, {"ranks_per_node": 0}, "ranks_per_node must be an integer of at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(sizes: dict[str, int], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mesh_table(sizes, **arguments)
