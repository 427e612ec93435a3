"""Named axes over ranks: numbers are torch's, every axis cuts the world into groups, collectives stay in them."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from minillm.distributed import Mesh, MeshLayout, RankError, init_mesh, run_ranks, simulate_ranks
from minillm.distributed.mesh_layout import AXES, DIMENSIONS, nearest_layouts

SIZES = st.integers(1, 4)


@st.composite
def layouts(draw: st.DrawFn) -> MeshLayout:
    dp = draw(SIZES)
    ep = draw(st.sampled_from([size for size in range(1, dp + 1) if dp % size == 0]))
    return MeshLayout(dp=dp, pp=draw(SIZES), tp=draw(SIZES), cp=draw(SIZES), ep=ep)


@given(layouts())
@settings(deadline=None, max_examples=60)
def test_ranks_and_coordinates_are_each_other_s_inverse(layout: MeshLayout) -> None:
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert [layout.rank(**place) for place in places] == list(range(layout.world_size))
    assert len({tuple(place[axis] for axis in DIMENSIONS) for place in places}) == layout.world_size
    for rank, place in enumerate(places):
        assert layout.rank(**{axis: place[axis] for axis in ("pp", "cp", "tp", "ep", "expert_dp")}) == rank


@given(layouts())
@settings(deadline=None, max_examples=60)
def test_numbers_are_those_of_a_row_major_array(layout: MeshLayout) -> None:
    ranks = torch.arange(layout.world_size).view([layout.size(axis) for axis in DIMENSIONS])
    for place in itertools.product(*(range(layout.size(axis)) for axis in DIMENSIONS)):
        assert layout.rank(**dict(zip(DIMENSIONS, place, strict=True))) == ranks[place].item()
    for number, axis in enumerate(DIMENSIONS):
        wanted = ranks.movedim(number, -1).reshape(-1, layout.size(axis)).tolist()
        assert layout.groups(axis) == sorted(wanted)
    split = ranks.view(layout.pp, layout.expert_dp, layout.ep, layout.cp, layout.tp)
    assert layout.groups("ep") == sorted(split.movedim(2, -1).reshape(-1, layout.ep).tolist())
    assert layout.groups("expert_dp") == sorted(split.movedim(1, -1).reshape(-1, layout.expert_dp).tolist())


@given(layouts())
@settings(deadline=None, max_examples=60)
def test_every_axis_cuts_the_world_into_groups_of_its_size(layout: MeshLayout) -> None:
    for axis in AXES:
        groups = layout.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        assert {len(group) for group in groups} == {layout.size(axis)}
    assert math.prod(layout.sizes.values()) == layout.world_size


def test_tensor_parallel_ranks_are_neighbours_and_stages_are_far() -> None:
    layout = MeshLayout(dp=4, pp=2, tp=2, ep=2)
    assert layout.groups("tp")[0] == [0, 1]
    assert layout.groups("dp")[0] == [0, 2, 4, 6]
    assert layout.groups("ep")[0] == [0, 2]
    assert layout.groups("expert_dp")[0] == [0, 4]
    assert layout.groups("pp")[0] == [0, 8]


def test_the_table_draws_itself() -> None:
    layout = MeshLayout(dp=2, pp=2, tp=2)
    assert str(layout).splitlines() == [
        "pp=2 x dp=2 x cp=1 x tp=2: 8 ranks",
        "           tp=0  tp=1",
        "pp=0 dp=0     0     1",
        "pp=0 dp=1     2     3",
        "pp=1 dp=0     4     5",
        "pp=1 dp=1     6     7",
    ]
    page = layout._repr_html_()
    assert page.count("<td>rank ") == 8
    assert "<tr><th>pp=1 dp=0</th><td>rank 4</td><td>rank 5</td></tr>" in page
    assert str(MeshLayout()) == "pp=1 x dp=1 x cp=1 x tp=1: 1 rank\n  0"
    assert str(MeshLayout(dp=1024)) == "pp=1 x dp=1024 x cp=1 x tp=1: 1024 ranks"
    assert "<td>" not in MeshLayout(dp=1024)._repr_html_()


def _ranks_in(group: dist.ProcessGroup) -> list[int]:
    bits = torch.tensor([1 << dist.get_rank()])
    dist.all_reduce(bits, group=group)
    return [rank for rank in range(dist.get_world_size()) if bits.item() >> rank & 1]


def _groups_by_axis(dp: int, pp: int, tp: int, cp: int, ep: int) -> dict[str, list[int]]:
    mesh = init_mesh(dp=dp, pp=pp, tp=tp, cp=cp, ep=ep)
    return {axis: _ranks_in(mesh.group(axis)) for axis in AXES}


@pytest.mark.parametrize(
    "sizes", [(2, 1, 2, 1, 1), (4, 1, 2, 1, 2), (4, 2, 1, 1, 4), (2, 2, 2, 2, 1), (8, 1, 1, 1, 2), (1, 1, 1, 1, 1)]
)
def test_collectives_stay_in_their_axis(sizes: tuple[int, int, int, int, int]) -> None:
    layout = MeshLayout(*sizes)
    for rank, found in enumerate(simulate_ranks(_groups_by_axis, layout.world_size, *sizes).results):
        for axis in AXES:
            assert [rank in group for group in layout.groups(axis)].count(True) == 1
            assert found[axis] == next(group for group in layout.groups(axis) if rank in group)


def test_real_processes_are_in_the_same_groups() -> None:
    sizes = (4, 1, 2, 1, 2)
    assert run_ranks(_groups_by_axis, 8, *sizes) == simulate_ranks(_groups_by_axis, 8, *sizes).results


def test_coordinates_are_torch_s() -> None:
    def coordinates() -> tuple[dict[str, int], list[int], list[int], int]:
        mesh = init_mesh(dp=2, pp=2, tp=2)
        torch_s = init_device_mesh("cpu", (2, 2, 1, 2), mesh_dim_names=DIMENSIONS)
        assert isinstance(mesh.device_mesh, DeviceMesh)
        assert mesh.device_mesh.mesh_dim_names == DIMENSIONS
        assert mesh.device_mesh["dp"].size() == mesh.size("dp") == 2
        own = mesh.device_mesh.get_coordinate()
        assert own is not None
        theirs = torch_s.get_coordinate()
        assert theirs is not None
        return mesh.coordinate, list(own), list(theirs), torch_s["tp"].get_local_rank()

    for own, mine, torch_s, tp in simulate_ranks(coordinates, 8).results:
        assert [own[axis] for axis in DIMENSIONS] == mine == torch_s
        assert own["tp"] == tp


def test_a_rank_finds_its_neighbours() -> None:
    def neighbours() -> tuple[int, ...]:
        mesh = init_mesh(dp=4, pp=2, ep=2)
        stage = mesh.coordinate["pp"]
        return mesh.rank_of(), mesh.rank_of(pp=1 - stage), mesh.rank_of(dp=0), mesh.rank_of(ep=0)

    for rank, (own, other_stage, first, first_of_experts) in enumerate(simulate_ranks(neighbours, 8).results):
        assert own == rank
        assert other_stage == (rank + 4) % 8
        assert first == rank // 4 * 4
        assert first_of_experts == rank // 2 * 2


def test_sizes_that_do_not_make_up_the_world_are_refused_with_the_nearest() -> None:
    with pytest.raises(RankError, match="the sizes must make up the 6 ranks, got pp=1") as caught:
        simulate_ranks(lambda: init_mesh(dp=2, tp=2), 6)
    assert isinstance(caught.value.__cause__, ValueError)
    assert "dp=2 * cp=1 * tp=2, which makes 4. Near to it: dp=3, tp=2" in str(caught.value)


@given(layouts(), st.integers(1, 64))
@settings(deadline=None, max_examples=40)
def test_the_nearest_layouts_fill_the_world(layout: MeshLayout, world_size: int) -> None:
    found = nearest_layouts(layout, world_size)
    assert found
    assert all(near.world_size == world_size for near in found)
    assert nearest_layouts(layout, layout.world_size)[0] == layout


def test_without_a_group_it_says_where_to_call_it() -> None:
    with pytest.raises(RuntimeError, match="init_mesh needs a process group"):
        init_mesh(dp=2)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"dp": 0}, ValueError, "dp must be at least 1, got 0"),
        ({"tp": 2.0}, TypeError, "tp must be an integer, got 2.0"),
        ({"dp": 4, "ep": 3}, ValueError, "ep must divide dp=4"),
    ],
)
def test_sizes_are_checked(sizes: dict[str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MeshLayout(**sizes)


def test_places_outside_are_refused() -> None:
    layout = MeshLayout(dp=4, tp=2, ep=2)
    with pytest.raises(ValueError, match=r"rank must be in 0 \.\.\. 7, got 8"):
        layout.coordinates(8)
    with pytest.raises(ValueError, match=r"tp must be in 0 \.\.\. 1, got 2"):
        layout.rank(tp=2)
    with pytest.raises(ValueError, match="dp=1 is at expert_dp=0 and ep=1"):
        layout.rank(dp=1, ep=0)
    with pytest.raises(ValueError, match="axis must be one of pp, dp, cp, tp, ep, expert_dp, got 'model'"):
        layout.groups("model")


def test_a_mesh_is_a_value() -> None:
    def make() -> bool:
        mesh = init_mesh(dp=2)
        return isinstance(mesh, Mesh) and mesh._repr_html_() == mesh.layout._repr_html_()

    assert simulate_ranks(make, 2).results == [True, True]
