"""All-reduce through one rank, which hears from every other and answers every other: what a ring is measured against.

For n ranks and b bytes on links with latency alpha and bandwidth beta it takes 2 (n - 1) steps of the whole tensor,

    2 (n - 1) (alpha + b / beta)

because all of them go through the one port of the server: n times what a ring takes where bandwidth counts. It is what
one step of a synchronous parameter server costs (`minillm.distributed.ParameterServer`).

In the log of messages each bears "to the server" or "from the server". Nothing here is recorded by autograd.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.distributed.point_to_point import Member, Reduction, flat_in_place


@torch.no_grad()
def server_all_reduce(
    tensor: Tensor,
    *,
    server: int = 0,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Replace each element by its reduction over the ranks of the group: one of them does it for all.

    Args:
        tensor, op, group: as for `ring_all_reduce`.
        server: the rank of the default group that does it.

    Raises:
        TypeError, ValueError: as `ring_all_reduce`; ValueError also for a `server` that is not in the group.
    """
    member = Member(group)
    root = member.place_of("server", server)
    workers = [rank for rank in range(member.size) if rank != root]
    with flat_in_place("tensor", tensor) as flat:
        reduction = Reduction(op, flat.dtype)
        if member.rank != root:
            member.exchange("to the server", send=(flat, root))
            member.exchange("from the server", receive=(flat, root))
            return
        received = torch.empty_like(flat)
        for worker in workers:
            member.exchange("to the server", receive=(received, worker))
            reduction.combine(flat, received)
        reduction.finish(flat, member.size)
        for worker in workers:
            member.exchange("from the server", send=(flat, worker))
