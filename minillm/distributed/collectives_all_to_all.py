"""All-to-all: every rank has something for every other rank, by exchange with one after the other.

In step s = 1 ... n-1 rank r sends to r + s and receives from r - s: nobody waits for a busy port. With parts of one
size, b bytes on each rank in all, and links with latency alpha and bandwidth beta that takes

    (n - 1) (alpha + b / (n beta))

Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication operations in MPICH", section 4.3 (long
messages). In the log of messages each bears "exchange step s". Nothing here is recorded by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.distributed.point_to_point import Member, plain


@torch.no_grad()
def all_to_all(
    tensor: Tensor,
    *,
    send_sizes: Sequence[int] | None = None,
    receive_sizes: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Part s of this rank's rows goes to rank s, and part r of rank s's rows comes from there.

    Args:
        tensor: (rows, ...); all but the first axis the same on each rank.
        send_sizes: how many rows go to each rank, in order of rank; 0 is allowed. None: all parts of one size, on every
            rank.
        receive_sizes: how many rows come from each rank: what that rank has in its `send_sizes` for this one. Given
            with `send_sizes` or not at all.
        group: the ranks that take part; None: all.

    Returns:
        (sum of receive_sizes, ...): what has come, in order of rank.

    Raises:
        TypeError: not a dense tensor.
        ValueError: a tensor without axes; sizes that are not one for each rank, or that do not add up to the rows; rows
            that n does not divide, without sizes; this rank is not in the group.
    """
    member, rows = Member(group), plain("tensor", tensor)
    rank, n = member.rank, member.size
    if rows.dim() == 0:
        raise ValueError("tensor must have an axis to be cut along, got one without axes")
    if (send_sizes is None) != (receive_sizes is None):
        raise ValueError(f"send_sizes and receive_sizes go together, got {send_sizes} and {receive_sizes}")
    if send_sizes is None or receive_sizes is None:
        if len(rows) % n:
            raise ValueError(f"tensor must have rows for {n} parts of one size without send_sizes, got {len(rows)}")
        send_sizes = receive_sizes = [len(rows) // n] * n
    for name, sizes in (("send_sizes", send_sizes), ("receive_sizes", receive_sizes)):
        if len(sizes) != n or min(sizes) < 0:
            raise ValueError(f"{name} must be {n} numbers of at least 0, one for each rank, got {list(sizes)}")
    if sum(send_sizes) != len(rows):
        raise ValueError(f"send_sizes must add up to the {len(rows)} rows of tensor, got {list(send_sizes)}")
    if send_sizes[rank] != receive_sizes[rank]:
        raise ValueError(
            f"send_sizes and receive_sizes must agree on rank {rank}'s own part, "
            f"got {send_sizes[rank]} and {receive_sizes[rank]}"
        )
    output = rows.new_empty(sum(receive_sizes), *rows.shape[1:])
    leaving, coming = torch.split(rows, list(send_sizes)), torch.split(output, list(receive_sizes))
    coming[rank].copy_(leaving[rank])
    for step in range(1, n):
        to, source = (rank + step) % n, (rank - step) % n
        member.exchange(f"exchange step {step}", send=(leaving[to], to), receive=(coming[source], source))
    return output
