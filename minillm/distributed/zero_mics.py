"""Which ranks share one copy of the training state, and which hold the same part of it.

ZeRO divides the state over all ranks, so that every gather crosses the slowest link. MiCS (Zhang et al. 2022, "MiCS:
Near-linear Scaling for Training Gigantic Model on Public Cloud", sections 3.2 and 3.4; "hybrid sharding", HSDP, in
PyTorch) divides it inside small groups of p ranks, such as the GPUs of one node, and keeps a replica in each group.
Gathers and reduce-scatters then stay inside a group, and gradients take two hops: a reduce-scatter inside the group in
every micro-step, and one all-reduce among the ranks that hold the same part when the optimizer is about to step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This rank's place: part `part` of `n_parts` in its partition group, replica `replica` of `n_replicas`."""

    partition: dist.ProcessGroup | None
    part: int
    n_parts: int
    replication: dist.ProcessGroup | None
    replica: int
    n_replicas: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, replicate_group: dist.ProcessGroup | None) -> Ranks:
        """The calling rank's place; `group` None is the default group, `replicate_group` None no replicas.

        Raises:
            ValueError: the calling rank is in neither group, or there are no groups yet.
        """
        if not dist.is_initialized():
            raise ValueError("Zero needs an initialised process group: run_ranks, simulate_ranks or torchrun make one")
        for name, given in (("group", group), ("replicate_group", replicate_group)):
            if given is not None and dist.get_rank(given) < 0:  # what new_group gives to those outside, too
                raise ValueError(f"{name} must be one that this rank belongs to, got one without it")
        if replicate_group is None:
            return cls(group, dist.get_rank(group), dist.get_world_size(group), None, 0, 1)
        both = set(dist.get_process_group_ranks(group)) & set(dist.get_process_group_ranks(replicate_group))
        if both != {dist.get_rank()}:
            raise ValueError(
                f"group and replicate_group must have this rank alone in common, got the ranks {sorted(both)}"
            )
        return cls(
            group,
            dist.get_rank(group),
            dist.get_world_size(group),
            replicate_group,
            dist.get_rank(replicate_group),
            dist.get_world_size(replicate_group),
        )

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank of the first replica."""
        return self.part == 0 and self.replica == 0

    @property
    def n_ranks(self) -> int:
        """Ranks over which a gradient is averaged."""
        return self.n_parts * self.n_replicas

    def broadcast(self, tensor: Tensor) -> None:
        """Give every rank the first rank's numbers, in place."""
        if self.n_replicas > 1:
            dist.broadcast(tensor, group=self.replication, group_src=0)
        if self.n_parts > 1:
            dist.broadcast(tensor, group=self.partition, group_src=0)

    def broadcast_object(self, value: Any) -> Any:
        """The first rank's value."""
        box = [value]
        if self.n_replicas > 1:
            dist.broadcast_object_list(box, group=self.replication, group_src=0)
        if self.n_parts > 1:
            dist.broadcast_object_list(box, group=self.partition, group_src=0)
        return box[0]

    def sum(self, tensor: Tensor) -> None:
        """The sum over all ranks, in place."""
        if self.n_replicas > 1:
            dist.all_reduce(tensor, group=self.replication)
        if self.n_parts > 1:
            dist.all_reduce(tensor, group=self.partition)


def mics_groups(partition_size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Divide all ranks into partition groups of `partition_size` neighbours; every rank must call this.

    With 8 ranks and a partition_size of 4 the partition groups are (0 1 2 3) and (4 5 6 7), the replicate groups
    (0 4), (1 5), (2 6) and (3 7).

    Args:
        partition_size: p, a divisor of the number of ranks; the number of ranks in a node, as a rule.

    Returns:
        (group, replicate_group) that the calling rank belongs to, for :class:`minillm.distributed.Zero`.

    Raises:
        ValueError: a partition_size that does not divide the number of ranks.
    """
    n_ranks = dist.get_world_size()
    if isinstance(partition_size, bool) or not isinstance(partition_size, int):
        raise TypeError(f"partition_size must be an int, got {partition_size!r}")
    if partition_size < 1 or n_ranks % partition_size:
        raise ValueError(f"partition_size must be a divisor of the {n_ranks} ranks, got {partition_size}")
    partitions = [list(range(start, start + partition_size)) for start in range(0, n_ranks, partition_size)]
    replications = [list(range(place, n_ranks, partition_size)) for place in range(partition_size)]
    rank = dist.get_rank()
    mine: list[dist.ProcessGroup] = []
    for kind in (partitions, replications):
        made = [(ranks, dist.new_group(ranks)) for ranks in kind]  # all ranks make all groups, in one order
        mine.extend(group for ranks, group in made if rank in ranks)
    return mine[0], mine[1]
