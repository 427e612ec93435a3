"""Collectives on a ring: reduce-scatter, all-gather, and the all-reduce that they make together.

The n ranks stand in a ring, and each talks to its two neighbours only: in every step it sends one chunk to the rank on
its right (r + 1) and receives one from the rank on its left (r - 1). A buffer of b bytes is cut into n chunks as
`torch.tensor_split` cuts; on links with latency alpha and bandwidth beta, and chunks of one size,

    reduce-scatter    n - 1 steps       (n - 1) (alpha + b / (n beta))
    all-gather        n - 1 steps       (n - 1) (alpha + b / (n beta))
    all-reduce        2 (n - 1) steps   2 (n - 1) (alpha + b / (n beta)), which tends to 2 b / beta

so that each rank sends less than 2 b however many there are. Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce
algorithms for clusters of workstations"; Gibiansky 2017, "Bringing HPC techniques to deep learning".

In the log of messages each bears "reduce chunk c" or "gather chunk c", with c the number of the chunk that it carries.
Nothing here is recorded by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.distributed.point_to_point import Member, Reduction, flat_in_place, plain


@torch.no_grad()
def ring_all_reduce(
    tensor: Tensor, *, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM, group: dist.ProcessGroup | None = None
) -> None:
    """Replace each element by its reduction over the ranks of the group: a reduce-scatter, then an all-gather.

    All ranks end with the same bits: each chunk is reduced in one place. Rank r sends every chunk but r in the first
    half, and every chunk but r + 1 in the second.

    Args:
        tensor: any shape, strides and number of elements, the same on each rank; changed in place.
        op: SUM, AVG, PRODUCT, MAX or MIN.
        group: the ranks that take part; None: all.

    Raises:
        TypeError: not a dense tensor, or `op` does not go with its dtype (AVG of integers, ...).
        ValueError: another `op`; an expanded tensor; this rank is not in the group.
    """
    member = Member(group)
    with flat_in_place("tensor", tensor) as flat:
        reduction = Reduction(op, flat.dtype)
        chunks = flat.tensor_split(member.size)
        chunks[member.rank].copy_(_reduce_around(chunks, reduction, member))
        _gather_around(chunks, member)


@torch.no_grad()
def ring_reduce_scatter(
    tensor: Tensor, *, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM, group: dist.ProcessGroup | None = None
) -> Tensor:
    """This rank's chunk of the reduction of `tensor` over the ranks of the group.

    Args:
        tensor: (rows, ...), the same shape on each rank; stays as it is. It is cut along its first axis.
        op, group: as for `ring_all_reduce`.

    Returns:
        What `tensor.tensor_split(n)[r]` would be of the reduced tensor, for rank r of the n in the group.

    Raises:
        TypeError, ValueError: as `ring_all_reduce`; ValueError also for a tensor without axes.
    """
    member, rows = Member(group), plain("tensor", tensor)
    if rows.dim() == 0:
        raise ValueError("tensor must have an axis to be cut along, got one without axes")
    return _reduce_around(rows.tensor_split(member.size), Reduction(op, rows.dtype), member)


@torch.no_grad()
def ring_all_gather(
    chunk: Tensor, *, sizes: Sequence[int] | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The chunks of all ranks, one after the other along the first axis.

    Args:
        chunk: (rows, ...), this rank's; all but the first axis the same on each rank.
        sizes: the rows of each rank's chunk, in order of rank; None: as many as here, everywhere. The chunks that
            `ring_reduce_scatter` gives of N rows have `minillm.costs.ring_chunks(N, 1, n)`.
        group: as for `ring_all_reduce`.

    Returns:
        (sum of sizes, ...).

    Raises:
        TypeError: not a dense tensor.
        ValueError: a chunk without axes; sizes that are not one for each rank, or not this rank's rows at its place.
    """
    member, mine = Member(group), plain("chunk", chunk)
    if mine.dim() == 0:
        raise ValueError("chunk must have an axis to be joined along, got one without axes")
    sizes = [len(mine)] * member.size if sizes is None else list(sizes)
    if len(sizes) != member.size or min(sizes) < 0 or sizes[member.rank] != len(mine):
        raise ValueError(
            f"sizes must be {member.size} numbers of at least 0, one for each rank, with {len(mine)} for rank "
            f"{member.rank}, got {sizes}"
        )
    gathered = mine.new_empty(sum(sizes), *mine.shape[1:])
    chunks = torch.split(gathered, sizes)
    chunks[member.rank].copy_(mine)
    _gather_around(chunks, member)
    return gathered


def _reduce_around(chunks: Sequence[Tensor], reduction: Reduction, member: Member) -> Tensor:
    """Each chunk c starts at rank c + 1 and takes in every rank's part, until it arrives at rank c, complete."""
    rank, n = member.rank, member.size
    partial = chunks[rank - 1].clone()
    for step in range(n - 1):
        leaving, coming = (rank - 1 - step) % n, (rank - 2 - step) % n
        received = torch.empty_like(chunks[coming])
        member.exchange(f"reduce chunk {leaving}", send=(partial, (rank + 1) % n), receive=(received, (rank - 1) % n))
        reduction.combine(received, chunks[coming])
        partial = received
    reduction.finish(partial, n)
    return partial


def _gather_around(chunks: Sequence[Tensor], member: Member) -> None:
    """Each chunk c starts at rank c and is copied by every rank that it comes to, until it is at rank c - 1."""
    rank, n = member.rank, member.size
    for step in range(n - 1):
        leaving, coming = (rank - step) % n, (rank - 1 - step) % n
        member.exchange(
            f"gather chunk {leaving}",
            send=(chunks[leaving], (rank + 1) % n),
            receive=(chunks[coming], (rank - 1) % n),
        )
