"""What the collectives here are written in: one step of messages, and what is done with the numbers that come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.distributed.labels import annotate


class Member:
    """This rank's place in a group. Ranks are the group's own, from 0: not those of the default group.

    Attributes:
        rank, size: this rank, and how many there are.

    Raises:
        ValueError: this rank is not in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(f"group must be one that this rank is in, and rank {dist.get_rank()} is not")

    def place_of(self, name: str, rank: int) -> int:
        """Where a rank of the default group stands in the group; ValueError, naming the argument, if it does not."""
        ranks = dist.get_process_group_ranks(self.group)
        if rank not in ranks:
            raise ValueError(f"{name} must be a rank of the default group that is in the group {ranks}, got {rank}")
        return ranks.index(rank)

    def exchange(
        self,
        label: str,
        *,
        send: tuple[Tensor, int] | None = None,
        receive: tuple[Tensor, int] | None = None,
    ) -> None:
        """Send one contiguous tensor and receive another at the same time, and return when both are done.

        Sending first and receiving then would never end in a ring: gloo's send waits until the receiver has it. A
        tensor of no elements is not sent at all: its receiver knows its size, and waits for nothing.

        Args:
            label: what the message that this rank sends is for, as the log of messages shows it.
            send: (what, to whom).
            receive: (where to, from whom).
        """
        messages = []
        if send is not None and send[0].numel():
            messages.append(dist.P2POp(dist.isend, send[0], group=self.group, group_peer=send[1]))
        if receive is not None and receive[0].numel():
            messages.append(dist.P2POp(dist.irecv, receive[0], group=self.group, group_peer=receive[1]))
        if messages:
            with annotate(label):
                for work in dist.batch_isend_irecv(messages):
                    work.wait()


class Reduction:
    """How numbers of several ranks become one: SUM, AVG (the sum, divided at the end), PRODUCT, MAX or MIN.

    A NaN of any rank is in the maximum and the minimum, whatever the order (with gloo's it depends on the order). Of
    bools SUM and MAX are "or", PRODUCT and MIN "and". Sums are kept in the tensors' own dtype, as gloo keeps them.

    Raises:
        TypeError: numbers of this dtype have no such reduction: AVG of integers, MAX of complex numbers, any of float8.
        ValueError: another operation.
    """

    def __init__(self, op: dist.ReduceOp.RedOpType, dtype: torch.dtype) -> None:
        if not any(op == allowed for allowed in _COMBINE):
            raise ValueError(f"op must be {', '.join(allowed.name for allowed in _COMBINE)}, got {op!r}")
        self.average = bool(op == dist.ReduceOp.AVG)
        self._combine = next(combine for allowed, combine in _COMBINE.items() if op == allowed)
        if self.average and not (dtype.is_floating_point or dtype.is_complex):
            raise TypeError(f"op=AVG needs a tensor of floating-point or complex numbers, got {dtype}")
        if dtype.is_complex and self._combine in (_keep_maximum, _keep_minimum):
            raise TypeError(f"op={op!r} needs numbers that have an order, got {dtype}")
        if dtype.is_floating_point and dtype.itemsize < 2:
            raise TypeError(f"a reduction needs a dtype that can be added, got {dtype}")

    def combine(self, into: Tensor, other: Tensor) -> None:
        """Take `other` into `into`, in place."""
        self._combine(into, other)

    def finish(self, reduced: Tensor, n: int) -> None:
        """What is left when the numbers of all n ranks are in, in place."""
        if self.average:
            reduced.div_(n)


def _add(into: Tensor, other: Tensor) -> None:
    into.add_(other)


def _multiply(into: Tensor, other: Tensor) -> None:
    into.mul_(other)


def _keep_maximum(into: Tensor, other: Tensor) -> None:
    torch.maximum(into, other, out=into)


def _keep_minimum(into: Tensor, other: Tensor) -> None:
    torch.minimum(into, other, out=into)


_COMBINE: dict[dist.ReduceOp.RedOpType, Callable[[Tensor, Tensor], None]] = {
    dist.ReduceOp.SUM: _add,
    dist.ReduceOp.AVG: _add,
    dist.ReduceOp.PRODUCT: _multiply,
    dist.ReduceOp.MAX: _keep_maximum,
    dist.ReduceOp.MIN: _keep_minimum,
}


def plain(name: str, tensor: Tensor) -> Tensor:
    """The tensor's numbers, contiguous, without its graph; a copy only where there must be one.

    Raises:
        TypeError: not a tensor, or a sparse one.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {tensor.layout}")
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


@contextmanager
def flat_in_place(name: str, tensor: Tensor) -> Iterator[Tensor]:
    """All elements as one contiguous axis: what is written there stands in the tensor when this closes.

    Raises:
        TypeError: as `plain`. ValueError: elements of the tensor share memory (`expand`).
    """
    contiguous = plain(name, tensor)
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ValueError(f"{name} must have memory for each element, got strides {tensor.stride()} (expanded?)")
    yield contiguous.view(-1)
    if contiguous.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(contiguous)
