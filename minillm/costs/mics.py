"""What MiCS keeps and sends on each rank: ZeRO's stage 3 inside groups of p ranks, whole copies across groups.

Zhang et al. 2022, "MiCS: Near-linear Scaling for Training Gigantic Model on Public Cloud", arXiv 2205.00119, section 3.
PyTorch's FSDP calls it hybrid sharding. Gathers stay on the fast links of a node, if a group is one.
"""

from typing import NamedTuple

from minillm.costs.arguments import at_least
from minillm.costs.zero import share_sent, zero_bytes_per_rank, zero_communication_bytes


def mics_bytes_per_rank(
    n_parameters: float,
    group_size: int,
    *,
    parameter_bytes: float = 2,
    gradient_bytes: float = 2,
    optimizer_bytes: float = 12,
) -> float:
    """Bytes of model state per rank under MiCS: 16 Psi / p in groups of p, however many groups there are.

    Args:
        n_parameters: Psi. group_size: p. The others as in `zero_bytes_per_rank`.

    Raises:
        ValueError: a value out of range.
    """
    at_least(1, group_size=group_size)
    return zero_bytes_per_rank(
        n_parameters,
        group_size,
        3,
        parameter_bytes=parameter_bytes,
        gradient_bytes=gradient_bytes,
        optimizer_bytes=optimizer_bytes,
    )


class MiCSTraffic(NamedTuple):
    """Bytes that a rank sends in one step: to ranks of its own group, and to ranks of the others."""

    inside: float
    across: float


def mics_communication_bytes(
    n_parameters: float,
    world_size: int,
    group_size: int,
    *,
    parameter_bytes: float = 2,
    gradient_bytes: float = 2,
    micro_batches: int = 1,
    reshard_after_forward: bool = True,
) -> MiCSTraffic:
    """Bytes that a rank sends in one step under MiCS, by the ring algorithm.

        inside    (p-1)/p of stage 3's: two gathers and a reduce-scatter for each micro-batch
        across    2 (r-1)/r Psi g / p: the r = N / p ranks that hold the same part of the gradients all-reduce it,
                  once a step ("two-hop" synchronisation)

    Args:
        n_parameters: Psi. world_size: N, a multiple of group_size. group_size: p. The others as in
            `zero_communication_bytes`.

    Raises:
        ValueError: a value out of range.
    """
    at_least(1, world_size=world_size, group_size=group_size)
    if world_size % group_size:
        raise ValueError(f"group_size must divide world_size, got {group_size} and {world_size}")
    inside = zero_communication_bytes(
        n_parameters,
        3,
        group_size,
        parameter_bytes=parameter_bytes,
        gradient_bytes=gradient_bytes,
        micro_batches=micro_batches,
        reshard_after_forward=reshard_after_forward,
    )
    across = 2 * share_sent(world_size // group_size) * n_parameters / group_size * gradient_bytes
    return MiCSTraffic(inside, across)
