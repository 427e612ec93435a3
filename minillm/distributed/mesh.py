"""Named axes over the ranks of a job: who shares a tensor, a sequence, a batch, a pipeline."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from minillm.distributed.mesh_layout import DIMENSIONS, MeshLayout, nearest_layouts


@dataclass(frozen=True)
class Mesh:
    """A job's ranks along named axes, and a process group for each.

    Attributes:
        layout: the arithmetic behind it, which needs no process group.
        device_mesh: torch's mesh with the axes ``("pp", "dp", "cp", "tp")``, for what takes one (FSDP2, DTensor);
            ``mesh.device_mesh["dp"]`` is one axis of it.
        rank: of this process, in the default group.
    """

    layout: MeshLayout
    device_mesh: DeviceMesh
    rank: int
    _groups: Mapping[str, dist.ProcessGroup]

    def size(self, axis: str) -> int:
        """How many ranks share `axis`: "pp", "dp", "cp", "tp", "ep" or "expert_dp"."""
        return self.layout.size(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The group of this rank along `axis`: the ranks that differ from it in nothing else."""
        self.layout.size(axis)
        return self._groups[axis]

    @property
    def coordinate(self) -> dict[str, int]:
        """This rank's index on each axis, by name."""
        return self.layout.coordinates(self.rank)

    def rank_of(self, **coordinates: int) -> int:
        """The rank that stands at `coordinates`, and on the axes that are not named where this rank stands.

        ``mesh.rank_of(pp=mesh.coordinate["pp"] + 1)`` is the next stage. Raises ValueError outside of an axis.
        """
        place = {axis: at for axis, at in self.coordinate.items() if axis != "dp"}
        if "dp" in coordinates:
            place = {axis: place[axis] for axis in place if axis in DIMENSIONS}
        return self.layout.rank(**{**place, **coordinates})

    def __str__(self) -> str:
        return str(self.layout)

    def _repr_html_(self) -> str:
        return self.layout._repr_html_()


def init_mesh(
    *, dp: int = 1, pp: int = 1, tp: int = 1, cp: int = 1, ep: int = 1, device_type: str | None = None
) -> Mesh:
    """Arrange the ranks of the default process group along named axes; every rank must call this.

    Args:
        dp, pp, tp, cp: data, pipeline, tensor and context parallel size; their product is the world size.
        ep: expert parallel size; divides dp. What each axis is, and how ranks are numbered: :class:`MeshLayout`.
        device_type: of the device mesh, "cpu" or "cuda"; None is "cuda" where the default group has NCCL.

    Raises:
        ValueError: the sizes do not make up the world; the message has the nearest that do.
        RuntimeError: there is no default process group.
    """
    layout = MeshLayout(dp=dp, pp=pp, tp=tp, cp=cp, ep=ep)
    if not dist.is_initialized():
        raise RuntimeError(
            "init_mesh needs a process group: call it in a function that simulate_ranks or run_ranks runs, or inside "
            "of `with initialize():` in a program that torchrun starts"
        )
    if layout.world_size != dist.get_world_size():
        raise ValueError(_mismatch(layout, dist.get_world_size()))
    if device_type is None:
        device_type = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    sizes = tuple(layout.size(axis) for axis in DIMENSIONS)
    device_mesh = init_device_mesh(device_type, sizes, mesh_dim_names=DIMENSIONS)
    groups = {axis: device_mesh.get_group(axis) for axis in DIMENSIONS}
    for axis in ("ep", "expert_dp"):
        wanted = layout.groups(axis)
        same = next((known for known in DIMENSIONS if layout.groups(known) == wanted), None)
        if same is not None:
            groups[axis] = groups[same]
        else:
            groups[axis], _ = dist.new_subgroups_by_enumeration(wanted)  # type: ignore[no-untyped-call]
    return Mesh(layout, device_mesh, dist.get_rank(), groups)


def _mismatch(layout: MeshLayout, world_size: int) -> str:
    product = " * ".join(f"{axis}={layout.size(axis)}" for axis in DIMENSIONS)
    nearest = [
        ", ".join(f"{axis}={size}" for axis in (*DIMENSIONS, "ep") if (size := near.size(axis)) > 1) or "all sizes 1"
        for near in nearest_layouts(layout, world_size)
    ]
    return (
        f"the sizes must make up the {world_size} ranks, got {product}, which makes {layout.world_size}. "
        f"Near to it: {'; '.join(nearest)}"
    )
