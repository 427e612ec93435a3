"""All-reduce in a number of steps that grows with log2 n: up and down a binomial tree, and by recursive halving.

For n ranks and b bytes on links with latency alpha and bandwidth beta:

    binomial tree        2 ceil(log2 n) (alpha + b / beta)                            short tensors, any n
    recursive halving    2 log2(n) alpha + 2 (n - 1) / n b / beta                     n a power of two
                         + 2 (alpha + b / beta), with n rounded down to one           any other n

Recursive halving sends as few bytes as the ring, in fewer steps, but to ranks far away: on a real network such messages
share links. Rabenseifner 2004, "Optimization of collective reduction operations"; Thakur, Rabenseifner and Gropp 2005,
"Optimization of collective communication operations in MPICH", section 4.5.

In the log of messages each bears the step that it belongs to, such as "reduce step 0", "halve step 1" or
"double step 0". Nothing here is recorded by autograd.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.distributed.collectives_broadcast import broadcast_down_tree
from minillm.distributed.point_to_point import Member, Reduction, flat_in_place


@torch.no_grad()
def tree_all_reduce(
    tensor: Tensor, *, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM, group: dist.ProcessGroup | None = None
) -> None:
    """Replace each element by its reduction over the ranks of the group: to rank 0 up a binomial tree, and back down.

    Each rank but one sends the whole tensor up once, and each but one receives the whole result once. All ranks end
    with the same bits.

    Args and raises: as `ring_all_reduce`.
    """
    member = Member(group)
    rank, n = member.rank, member.size
    with flat_in_place("tensor", tensor) as flat:
        reduction = Reduction(op, flat.dtype)
        received = torch.empty_like(flat)
        for step in range((n - 1).bit_length()):
            distance, label = 1 << step, f"reduce step {step}"
            if rank & distance:
                member.exchange(label, send=(flat, rank - distance))
                break
            if rank + distance < n:
                member.exchange(label, receive=(received, rank + distance))
                reduction.combine(flat, received)
        if rank == 0:
            reduction.finish(flat, n)
        broadcast_down_tree(flat, 0, member)


@torch.no_grad()
def recursive_halving_all_reduce(
    tensor: Tensor, *, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM, group: dist.ProcessGroup | None = None
) -> None:
    """Replace each element by its reduction over the ranks of the group: Rabenseifner's algorithm.

    The reduce-scatter: two ranks at distance n/2 exchange halves of the tensor and each reduces one, two at distance
    n/4 quarters of that, and so on, until each rank has one chunk. The all-gather goes the same way back. If n is not a
    power of two, the first 2 (n - 2^k) ranks pair up before, and one of each pair stands for both. All ranks end with
    the same bits.

    Args and raises: as `ring_all_reduce`.
    """
    member = Member(group)
    with flat_in_place("tensor", tensor) as flat:
        reduction = Reduction(op, flat.dtype)
        power = 1 << (member.size.bit_length() - 1)
        n_folded = member.size - power
        rank = member.rank
        if rank >= 2 * n_folded:
            _halve_and_double(flat, rank - n_folded, n_folded, power, reduction, member)
        elif rank % 2:
            received = torch.empty_like(flat)
            member.exchange("fold", receive=(received, rank - 1))
            reduction.combine(flat, received)
            _halve_and_double(flat, rank // 2, n_folded, power, reduction, member)
            member.exchange("unfold", send=(flat, rank - 1))
        else:
            member.exchange("fold", send=(flat, rank + 1))
            member.exchange("unfold", receive=(flat, rank + 1))


def _halve_and_double(
    flat: Tensor, place: int, n_folded: int, power: int, reduction: Reduction, member: Member
) -> None:
    """The two halves of the algorithm for the rank at `place` of the `power` ranks that are left after folding."""
    bounds = [0]
    for chunk in flat.tensor_split(power):
        bounds.append(bounds[-1] + len(chunk))

    def rank_of(other: int) -> int:
        return 2 * other + 1 if other < n_folded else other + n_folded

    def window(first: int, count: int) -> Tensor:
        return flat[bounds[first] : bounds[first + count]]

    distances = [
        power >> step for step in range(1, power.bit_length())
    ]  # power / 2, ..., 2, 1: in chunks, and in ranks
    for step, distance in enumerate(distances):
        first = place & -distance  # of the chunks that stay here
        received = torch.empty_like(window(first, distance))
        member.exchange(
            f"halve step {step}",
            send=(window(first ^ distance, distance), rank_of(place ^ distance)),
            receive=(received, rank_of(place ^ distance)),
        )
        reduction.combine(window(first, distance), received)
    reduction.finish(window(place, 1), member.size)
    for step, distance in enumerate(reversed(distances)):
        first = place & -distance
        member.exchange(
            f"double step {step}",
            send=(window(first, distance), rank_of(place ^ distance)),
            receive=(window(first ^ distance, distance), rank_of(place ^ distance)),
        )
