"""What PyTorch's operators that communicate send: read off their arguments.

Operators of the namespace `c10d` stand behind the functions of `torch.distributed`, those of `_c10d_functional` behind
functional collectives and DTensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from minillm.costs.communication import bytes_sent_by_ring, ring_chunks
from minillm.distributed.private_torch import group_of_call


class CallOfOperator(NamedTuple):
    """One call of this rank; `bytes_sent` of its `n_bytes` by the ring algorithm."""

    operation: str
    bytes_sent: int
    n_bytes: int
    group_size: int
    dtype: str


def calls_of_operator(func: Any, args: tuple[Any, ...]) -> list[CallOfOperator]:
    """The calls that an operator makes on this rank; none for one that does not communicate.

    Args:
        func, args: as a `TorchDispatchMode` is given them.

    Raises:
        NotImplementedError: an operator that has a process group and is not known here.
    """
    if func.namespace not in ("c10d", "_c10d_functional", "_dtensor"):
        return []
    known = (_C10D if func.namespace == "c10d" else _FUNCTIONAL).get(func.overloadpacket.__name__)
    if known is None:
        if any(argument.name in ("process_group", "group_name") for argument in func._schema.arguments):
            raise NotImplementedError(f"it is not known here what {func.name()} sends")
        return []
    group = group_of_call(args[known.group])
    n, rank = group.size(), group.rank()
    root = 0 if known.root is None else args[known.root]
    calls = []
    for operation, tensors, chunks in known.read(args, n):
        if operation == "send":
            sent = sum(chunks)
        else:
            sent = 0 if operation == "recv" else bytes_sent_by_ring(operation, chunks, rank, root)
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
        calls.append(CallOfOperator(operation, sent, sum(chunks), n, dtype))
    return calls


_Parts = list[tuple[str, Sequence[Tensor], list[int]]]
# From an operator's arguments and the group's size: operation, tensors (for the dtype), bytes of each rank's chunk.
_Read = Callable[[tuple[Any, ...], int], _Parts]


class _Known(NamedTuple):
    """Where an operator has its group and its root, and how to read the rest."""

    group: int
    read: _Read
    root: int | None = None


def _whole(operation: str) -> _Read:
    """The first argument is the whole buffer, a tensor or several."""

    def read(args: tuple[Any, ...], n: int) -> _Parts:
        tensors = _list(args[0])
        cut = [ring_chunks(tensor.numel(), tensor.element_size(), n) for tensor in tensors]
        return [(operation, tensors, [sum(chunks) for chunks in zip(*cut, strict=True)])]

    return read


def _parts(operation: str, place: int) -> _Read:
    """Argument `place` is this rank's part, as large as any other rank's."""

    def read(args: tuple[Any, ...], n: int) -> _Parts:
        tensors = _list(args[place])
        return [(operation, tensors, [_nbytes(tensors)] * n)]

    return read


def _lists(operation: str, place: int) -> _Read:
    """Argument `place` is a list of lists, each with a tensor for each rank."""

    def read(args: tuple[Any, ...], n: int) -> _Parts:
        chunks = [_nbytes(column) for column in zip(*args[place], strict=True)]
        return [(operation, [tensor for part in args[place] for tensor in part], chunks)]

    return read


def _by_rank(operation: str, place: int) -> _Read:
    """Argument `place` is a list with a tensor, or a list of tensors, for each rank."""

    def read(args: tuple[Any, ...], n: int) -> _Parts:
        parts = [_list(part) for part in args[place]]
        return [(operation, [tensor for part in parts for tensor in part], [_nbytes(part) for part in parts])]

    return read


def _rows(tensor_at: int, splits_at: int) -> _Read:
    """An all-to-all of rows of one tensor: so many to each rank, or equally many if none are given."""

    def read(args: tuple[Any, ...], n: int) -> _Parts:
        tensor, splits = args[tensor_at], args[splits_at]
        rows = tensor.shape[0]
        row = tensor.nbytes // rows if rows else 0
        return [("all_to_all", [tensor], [int(count) * row for count in splits or [rows // n] * n])]

    return read


def _message(operation: str) -> _Read:
    return lambda args, n: [(operation, _list(args[0]), [_nbytes(_list(args[0]))])]


def _barrier(args: tuple[Any, ...], n: int) -> _Parts:
    return [("barrier", [], [0] * n)]


def _messages(args: tuple[Any, ...], n: int) -> _Parts:
    kinds = ["send" if "send" in name else "recv" for name in args[0]]
    return [(kind, [tensor], [tensor.nbytes]) for kind, tensor in zip(kinds, args[3], strict=True)]


def _list(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


_C10D: dict[str, _Known] = {
    "allreduce_": _Known(1, _whole("all_reduce")),
    "allreduce_coalesced_": _Known(1, _whole("all_reduce")),
    "broadcast_": _Known(1, _whole("broadcast"), root=2),
    "reduce_": _Known(1, _whole("reduce"), root=3),
    "allgather_": _Known(2, _lists("all_gather", 0)),
    "allgather_coalesced_": _Known(2, _by_rank("all_gather", 0)),
    "_allgather_base_": _Known(2, _parts("all_gather", 1)),
    "allgather_into_tensor_coalesced_": _Known(2, _parts("all_gather", 1)),
    "reduce_scatter_": _Known(2, _lists("reduce_scatter", 1)),
    "_reduce_scatter_base_": _Known(2, _parts("reduce_scatter", 0)),
    "reduce_scatter_tensor_coalesced_": _Known(2, _parts("reduce_scatter", 0)),
    "alltoall_": _Known(2, _by_rank("all_to_all", 1)),
    "alltoall_base_": _Known(2, _rows(1, 4)),
    "gather_": _Known(2, _parts("gather", 1), root=3),
    "gather_into_tensor_": _Known(2, _parts("gather", 1), root=3),
    "scatter_": _Known(2, _parts("scatter", 0), root=3),
    "send": _Known(1, _message("send")),
    "recv_": _Known(1, _message("recv")),
    "recv_any_source_": _Known(1, _message("recv")),
    "barrier": _Known(1, _barrier),
    "monitored_barrier_": _Known(1, _barrier),
}
_FUNCTIONAL: dict[str, _Known] = {
    "all_reduce": _Known(2, _whole("all_reduce")),
    "all_reduce_": _Known(2, _whole("all_reduce")),
    "all_reduce_coalesced": _Known(2, _whole("all_reduce")),
    "all_reduce_coalesced_": _Known(2, _whole("all_reduce")),
    "broadcast": _Known(2, _whole("broadcast"), root=1),
    "broadcast_": _Known(2, _whole("broadcast"), root=1),
    "all_gather_into_tensor": _Known(2, _parts("all_gather", 0)),
    "all_gather_into_tensor_out": _Known(2, _parts("all_gather", 0)),
    "all_gather_into_tensor_coalesced": _Known(2, _parts("all_gather", 0)),
    "reduce_scatter_tensor": _Known(3, _whole("reduce_scatter")),
    "reduce_scatter_tensor_out": _Known(3, _whole("reduce_scatter")),
    "reduce_scatter_tensor_coalesced": _Known(3, _whole("reduce_scatter")),
    "all_to_all_single": _Known(3, _rows(0, 2)),
    "shard_dim_alltoall": _Known(3, _whole("all_to_all")),
    "isend": _Known(3, _message("send")),
    "irecv": _Known(3, _message("recv")),
    "batch_p2p_ops": _Known(4, _messages),
}
