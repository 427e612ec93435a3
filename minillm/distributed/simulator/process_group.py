# mypy: disable-error-code="override, assignment, no-untyped-call, call-arg"
"""The simulator as a backend of `torch.distributed`: turns the library's calls into `Call`s of the exchange.

`torch.distributed.Backend.register_backend` is PyTorch's public way to add a backend (the "Customize Process Group
Backends" tutorial); a creator function may return a `ProcessGroup` written in Python. Its methods bear the names that
PyTorch's C++ code looks for, which are not the same in all versions: hence the second names at the end.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import AllreduceOptions, ReduceScatterOptions

from minillm.distributed.private_torch import group_key
from minillm.distributed.simulator.exchange import Exchange, Group
from minillm.distributed.simulator.movement import Call
from minillm.distributed.simulator.scheduler import Event, Rank, current_rank

BACKEND = "simulated"
_POLL = 1e-6  # virtual seconds that asking "is it done?" takes, so that a loop of such questions comes to an end


class SimulatedWork(dist.Work):
    """The handle of a call that may still be under way.

    C++ holds a handle by a pointer of its own, and its Python half must not go before it: hence `kept`, in which it
    stays until somebody has waited for it.
    """

    def __init__(
        self, rank: Rank, event: Event, outputs: list[Tensor], kept: set[SimulatedWork], post: Any = None
    ) -> None:
        super().__init__()
        self._rank, self._event, self._outputs, self._post, self._kept = rank, event, outputs, post, kept
        kept.add(self)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Hold the rank until the call is done; its clock is then not before that time."""
        self._rank.scheduler.wait(self._rank, self._event)
        self._kept.discard(self)
        return True

    def synchronize(self) -> None:
        """As `wait`."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether the call is done at the rank's virtual time, which the question moves on a little."""
        self._rank.clock += _POLL
        self._rank.scheduler.synchronise(self._rank)
        return self._event.end is not None and self._event.end <= self._rank.clock

    def is_success(self) -> bool:
        """As `is_completed`: what fails in a simulation ends it."""
        return self.is_completed()

    def exception(self) -> None:
        """None."""
        return

    def result(self) -> list[Tensor]:
        """The output tensors, after `wait`."""
        self.wait()
        return self._outputs

    def source_rank(self) -> int:
        """The rank (of the default group) that a message came from."""
        self.wait()
        return int(self._post.source)

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        """A future that is done already: C++ code (DDP) would wait for it where the other ranks could not run."""
        self.wait()
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        future.set_result(self._outputs)
        return future


class SimulatedProcessGroup(dist.ProcessGroup):
    """One rank's end of a group."""

    def __init__(self, rank: Rank, place: int, group: Group, exchange: Exchange) -> None:
        super().__init__(place, len(group.ranks))
        self._rank, self._place, self._group, self._exchange = rank, place, group, exchange
        self._works: set[SimulatedWork] = set()  # not waited for

    def getBackendName(self) -> str:  # noqa: N802 (PyTorch's name)
        """The backend's name."""
        return BACKEND

    def name(self) -> str:
        """The backend's name."""
        return BACKEND

    def _get_backend(self, device: torch.device) -> SimulatedProcessGroup:
        """Itself: PyTorch 2.15 asks whether the backend of a device coalesces messages."""
        return self

    @property
    def group_name(self) -> str:
        """The name of the group, the same on all ranks."""
        return self._group.name

    @property
    def group_desc(self) -> str:
        """The group in words."""
        return str(self._group)

    def _call(
        self,
        operation: str,
        inputs: list[list[Tensor]],
        outputs: list[list[Tensor]],
        chunks: list[int],
        options: Any = None,
    ) -> SimulatedWork:
        reduces = operation in ("all_reduce", "reduce", "reduce_scatter")
        rooted = operation in ("broadcast", "reduce", "gather", "scatter")
        call = Call(
            operation,
            self._place,
            inputs,
            outputs,
            chunks,
            reduce_op=_reduce_op(options) if reduces else None,
            root=options.rootRank if rooted else None,
        )
        event = self._exchange.collective(self._rank, self._group, call)
        return SimulatedWork(self._rank, event, [tensor for part in outputs for tensor in part], self._works)

    def _cut(self, tensors: list[Tensor]) -> list[int]:
        """Bytes of each rank's chunk of these tensors, as `torch.tensor_split` cuts them."""
        n, chunks = self.size(), [0] * self.size()
        for tensor in tensors:
            each, rest = divmod(tensor.numel(), n)
            for place in range(n):
                chunks[place] += (each + (place < rest)) * tensor.element_size()
        return chunks

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> SimulatedWork:
        """Also all_reduce_coalesced."""
        return self._call("all_reduce", [tensors], [tensors], self._cut(tensors), opts or AllreduceOptions())

    def reduce(self, tensors: list[Tensor], opts: Any) -> SimulatedWork:
        return self._call("reduce", [tensors], [tensors], self._cut(tensors), opts)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> SimulatedWork:
        return self._call("broadcast", [], [tensors], self._cut(tensors), opts)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> SimulatedWork:
        chunks = [sum(part[place].nbytes for part in outputs) for place in range(self.size())]
        return self._call("all_gather", [[tensor] for tensor in inputs], outputs, chunks)

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> SimulatedWork:
        """Outputs come one list a rank here, not one list a tensor."""
        return self.allgather([list(part) for part in zip(*outputs, strict=True)], inputs)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> SimulatedWork:
        return self.allgather([self._pieces(output) for output in outputs], inputs)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> SimulatedWork:
        return self.allgather([self._pieces(output)], [input])

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> SimulatedWork:
        chunks = [sum(part[place].nbytes for part in inputs) for place in range(self.size())]
        options = opts or ReduceScatterOptions()
        return self._call("reduce_scatter", inputs, [[output] for output in outputs], chunks, options)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> SimulatedWork:
        return self.reduce_scatter(outputs, [self._pieces(input) for input in inputs], opts)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> SimulatedWork:
        return self.reduce_scatter([output], [self._pieces(input)], opts)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> SimulatedWork:
        chunks = [sum(tensor.nbytes for tensor in inputs)] * self.size()
        return self._call("gather", [[tensor] for tensor in inputs], outputs, chunks, opts)

    def gather_single(self, output: Tensor, input: Tensor, opts: Any) -> SimulatedWork:
        """New in PyTorch 2.15; `output` counts on the root only."""
        return self.gather([self._pieces(output)] if self._place == opts.rootRank else [], [input], opts)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> SimulatedWork:
        chunks = [sum(tensor.nbytes for tensor in outputs)] * self.size()
        return self._call("scatter", inputs, [[output] for output in outputs], chunks, opts)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> SimulatedWork:
        return self._call("all_to_all", [inputs], [outputs], [tensor.nbytes for tensor in inputs])

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], opts: Any = None
    ) -> SimulatedWork:
        """Splits count rows; none given means equal ones."""
        outputs = list(output.split(list(output_splits) or [output.shape[0] // self.size()] * self.size()))
        inputs = list(input.split(list(input_splits) or [input.shape[0] // self.size()] * self.size()))
        return self.alltoall(outputs, inputs)

    def barrier(self, opts: Any = None) -> SimulatedWork:
        """Blocks, as on gloo, unless it is asked not to."""
        work = self._call("barrier", [], [], [0] * self.size())
        if not getattr(opts, "asyncOp", False):
            work.wait()
        return work

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        self.barrier()

    def send(self, tensors: list[Tensor], destination: int, tag: int) -> SimulatedWork:
        post = self._exchange.send(self._rank, self._group, tensors[0], self._peer(destination), tag)
        return SimulatedWork(self._rank, post.event, tensors, self._works, post)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> SimulatedWork:
        post = self._exchange.receive(self._rank, self._group, tensors[0], self._peer(source), tag)
        return SimulatedWork(self._rank, post.event, tensors, self._works, post)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> SimulatedWork:
        post = self._exchange.receive(self._rank, self._group, tensors[0], None, tag)
        return SimulatedWork(self._rank, post.event, tensors, self._works, post)

    def _peer(self, place: int) -> int:
        """The name in the default group of a rank of this group."""
        if not 0 <= place < self.size():
            raise ValueError(f"a message goes to or comes from a rank of 0 ... {self.size() - 1}, got {place}")
        return self._group.ranks[place]

    def _pieces(self, tensor: Tensor) -> list[Tensor]:
        flat = tensor.detach().view(-1)
        if flat.numel() % self.size():
            raise ValueError(f"{flat.numel()} elements cannot be cut into {self.size()} equal parts")
        return list(flat.view(self.size(), -1).unbind()) if flat.numel() else [flat] * self.size()

    allreduce_coalesced = allreduce
    # The names up to PyTorch 2.12.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    gather_into_tensor = gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced


def _reduce_op(options: Any) -> dist.ReduceOp.RedOpType:
    operation = options.reduceOp
    kind: dist.ReduceOp.RedOpType = getattr(operation, "op", operation)  # a ReduceOp wraps its kind
    return kind


def _create(options: Any, _: Any) -> SimulatedProcessGroup:
    rank = current_rank()
    if rank is None:
        raise RuntimeError(f'the backend "{BACKEND}" works within minillm.distributed.simulate_ranks only')
    name, ranks = group_key(options)
    group = Group(name, ranks or tuple(range(options.group_size)))
    return SimulatedProcessGroup(rank, options.group_rank, group, rank.exchange)


dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu", "cuda"])
