"""What each collective operation does to the tensors of its ranks: the data, not the time.

A `Call` is one rank's part in one operation. When all ranks of the group have called, `move` does the whole operation.
Sums run in order of rank, in the tensors' own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from minillm.distributed.errors import MismatchError

_FOLD: dict[ReduceOp.RedOpType, Callable[[Tensor, Tensor], Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.AVG: torch.add,
    ReduceOp.PRODUCT: torch.mul,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.BAND: torch.bitwise_and,
    ReduceOp.BOR: torch.bitwise_or,
    ReduceOp.BXOR: torch.bitwise_xor,
}


@dataclass(frozen=True)
class Mark:
    """What a tensor held when it was given away; `changed` says whether it still does."""

    tensor: Tensor
    version: int
    copy: Tensor | None

    def changed(self) -> bool:
        """Whether its numbers are others now."""
        if self.tensor.is_inference() or self.tensor._version == self.version:
            return False
        return self.copy is None or not torch.equal(self.copy, _bytes(self.tensor))


def mark(tensor: Tensor) -> Mark:
    """Remember what `tensor` holds.

    Parts of one storage share PyTorch's count of changes: of a part the bytes are kept, to tell its own changes from
    its neighbours'.
    """
    if tensor.is_inference():
        return Mark(tensor, 0, None)
    # A view of all there is has neighbours, too: empty ones.
    is_part = tensor._base is not None or tensor.untyped_storage().nbytes() > tensor.nbytes
    return Mark(tensor, tensor._version, _bytes(tensor).clone() if is_part else None)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@dataclass
class Call:
    """One rank's part in a collective operation.

    Attributes:
        operation: "all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "gather", "scatter",
            "all_to_all", "barrier".
        rank: within the group, from 0.
        inputs, outputs: lists of lists of tensors: the operation is done for each list on its own (most have one). What
            they hold by operation: see `move`.
        chunks: bytes that each rank of the group has in the buffer; of an all-to-all, that this rank has for each.
        reduce_op, root: where the operation has them.
        label: what for.
        posted: virtual time of the call.
    """

    operation: str
    rank: int
    inputs: list[list[Tensor]]
    outputs: list[list[Tensor]]
    chunks: list[int]
    reduce_op: ReduceOp.RedOpType | None = None
    root: int | None = None
    label: str = ""
    posted: float = 0.0
    marks: list[Mark] = field(default_factory=list)

    def signature(self) -> str:
        """What must be the same on all ranks, in words."""
        parts = [self.operation]
        if self.reduce_op is not None:
            parts.append(str(self.reduce_op).rpartition(".")[2])
        if self.root is not None:
            parts.append(f"root {self.root}")
        if self.operation not in ("barrier", "all_to_all"):
            tensors = [tensor for group in self.inputs or self.outputs for tensor in group]
            kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
            parts.append(f"{sum(self.chunks)} bytes" + "".join(f" of {kind}" for kind in kinds))
        return ", ".join(parts)


def check_same(calls: Sequence[Call], ranks: Sequence[int]) -> None:
    """Raise MismatchError unless all ranks called the same; `ranks` are their names in the default group."""
    kinds: dict[str, list[int]] = {}
    for call in calls:
        kinds.setdefault(call.signature(), []).append(ranks[call.rank])
    if len(kinds) > 1:
        lines = [f"{_names(who)} called {signature}" for signature, who in kinds.items()]
        raise MismatchError("the ranks of a group do not call the same collective\n  " + "\n  ".join(lines))


def _names(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


@torch.no_grad()
def move(calls: Sequence[Call]) -> None:
    """Do the operation that `calls`, sorted by rank, ask for.

    all_reduce      inputs = outputs: tensors, reduced over ranks in place
    reduce          the same, but only the root's change
    broadcast       outputs: tensors, filled with the root's
    all_gather      inputs: one tensor; outputs: one for each rank
    gather          the same, with outputs on the root only
    scatter         inputs on the root: one for each rank; outputs: one tensor
    reduce_scatter  inputs: one for each rank; outputs: one tensor
    all_to_all      inputs: one for each rank; outputs: one for each rank
    """
    operation, root = calls[0].operation, calls[0].root or 0
    if operation == "barrier":
        return
    for k in range(max(len(call.inputs) for call in calls) or max(len(call.outputs) for call in calls)):
        _move_one(operation, root, calls, k)


def _move_one(operation: str, root: int, calls: Sequence[Call], k: int) -> None:
    outputs = [call.outputs[k] if call.outputs else [] for call in calls]
    inputs = [call.inputs[k] if call.inputs else [] for call in calls]
    receivers = [outputs[root]] if operation in ("reduce", "gather") else outputs
    if operation in ("all_reduce", "reduce"):
        for i in range(len(inputs[0])):
            total = _fold([tensors[i] for tensors in inputs], calls[0].reduce_op)
            for tensors in receivers:
                _fill(tensors[i], total)
    elif operation == "broadcast":
        for rank, tensors in enumerate(outputs):
            for target, kept in zip(tensors, outputs[root], strict=True):
                if rank != root:
                    _fill(target, kept)
    elif operation in ("all_gather", "gather"):
        for tensors in receivers:
            for target, part in zip(tensors, inputs, strict=True):
                _fill(target, part[0])
    elif operation == "scatter":
        for rank, tensors in enumerate(outputs):
            _fill(tensors[0], inputs[root][rank])
    elif operation == "reduce_scatter":
        totals = [_fold([tensors[rank] for tensors in inputs], calls[0].reduce_op) for rank in range(len(calls))]
        for tensors, total in zip(outputs, totals, strict=True):
            _fill(tensors[0], total)
    else:
        for rank, tensors in enumerate(outputs):
            for target, part in zip(tensors, inputs, strict=True):
                _fill(target, part[rank])


def _fold(tensors: Sequence[Tensor], reduce_op: ReduceOp.RedOpType | None) -> Tensor:
    assert reduce_op is not None
    if reduce_op not in _FOLD:
        raise ValueError(f"the simulator reduces by {', '.join(op.name for op in _FOLD)}, got {reduce_op}")
    total = tensors[0].detach().clone()
    if reduce_op == ReduceOp.AVG and not (total.is_floating_point() or total.is_complex()):
        raise TypeError(f"AVG needs floating-point or complex numbers, got {total.dtype}")
    fold = _FOLD[reduce_op]
    for tensor in tensors[1:]:
        if tensor.numel() != total.numel():
            raise MismatchError(f"{total.numel()} and {tensor.numel()} elements cannot be reduced together")
        total = fold(total, tensor.detach().reshape(total.shape))  # as in C++, only the numbers count
    return total / len(tensors) if reduce_op == ReduceOp.AVG else total


def _fill(target: Tensor, source: Tensor) -> None:
    # Detached: collectives are outside of autograd, as they are in C++.
    target, source = target.detach(), source.detach()
    if target.numel() != source.numel() or target.dtype != source.dtype:
        raise MismatchError(
            f"{source.numel()} elements of {source.dtype} come where {target.numel()} of {target.dtype} are expected"
        )
    target.copy_(source.reshape(target.shape))
