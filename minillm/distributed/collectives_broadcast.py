"""Broadcast: one rank's tensor to all others, down a tree or along a chain.

For n ranks and b bytes on links with latency alpha and bandwidth beta:

    binomial tree          ceil(log2 n) steps     ceil(log2 n) (alpha + b / beta)       short tensors
    chain in m pieces      n + m - 2 steps        (n + m - 2) (alpha + b / (m beta))    long ones: tends to b / beta

Chan, Heimlich, Purkayastha and van de Geijn 2007, "Collective communication: theory, practice, and experience",
section 4 (the tree); van de Geijn and Watts 1997, "SUMMA", section 3 (the pipelined chain).

In the log of messages each bears "broadcast step k" or "broadcast piece c". Nothing here is recorded by autograd.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.distributed.point_to_point import Member, flat_in_place


@torch.no_grad()
def broadcast(tensor: Tensor, source: int, *, group: dist.ProcessGroup | None = None) -> None:
    """Give every rank the tensor of rank `source`, down a binomial tree.

    In each step every rank that has the tensor sends it to one that has not: 1, 2, 4, ... ranks have it.

    Args:
        tensor: any shape and strides, the same shape and dtype on each rank; overwritten on all but the source.
        source: a rank of the default group, as PyTorch's `src`.
        group: the ranks that take part; None: all.

    Raises:
        TypeError: not a dense tensor. ValueError: `source` or this rank is not in the group; an expanded tensor.
    """
    member = Member(group)
    root = member.place_of("source", source)
    with flat_in_place("tensor", tensor) as flat:
        broadcast_down_tree(flat, root, member)


def broadcast_down_tree(flat: Tensor, root: int, member: Member) -> None:
    """`broadcast` of a contiguous tensor from the group's rank `root`.

    Counted from the root, rank v hears from v without its lowest bit, and then tells v + 2^k for each k below that bit,
    the highest first: those of the largest subtrees.
    """
    n = member.size
    place = (member.rank - root) % n
    steps = (n - 1).bit_length()
    lowest_bit = (place & -place) or 1 << steps
    for step, distance in enumerate(1 << k for k in reversed(range(steps))):
        label = f"broadcast step {step}"
        if distance == lowest_bit:
            member.exchange(label, receive=(flat, (place - distance + root) % n))
        elif distance < lowest_bit and place + distance < n:
            member.exchange(label, send=(flat, (place + distance + root) % n))


@torch.no_grad()
def chain_broadcast(tensor: Tensor, source: int, *, n_pieces: int = 8, group: dist.ProcessGroup | None = None) -> None:
    """Give every rank the tensor of rank `source`, piece by piece along the chain source, source + 1, ...

    While a rank passes one piece on it receives the next: all links of the chain are busy at once.

    Args:
        tensor, source, group: as for `broadcast`.
        n_pieces: how many, at least 1; sqrt((n - 2) b / (alpha beta)) of them is fastest.

    Raises:
        TypeError, ValueError: as `broadcast`; ValueError also for `n_pieces` below 1.
    """
    if n_pieces < 1:
        raise ValueError(f"n_pieces must be at least 1, got {n_pieces}")
    member = Member(group)
    n = member.size
    place = (member.rank - member.place_of("source", source)) % n
    left, right = (member.rank - 1) % n, (member.rank + 1) % n
    with flat_in_place("tensor", tensor) as flat:
        pieces = flat.tensor_split(n_pieces)
        for coming in range(n_pieces + 1):
            leaving = coming - 1
            member.exchange(
                f"broadcast piece {leaving}",
                send=(pieces[leaving], right) if leaving >= 0 and place + 1 < n else None,
                receive=(pieces[coming], left) if coming < n_pieces and place > 0 else None,
            )
