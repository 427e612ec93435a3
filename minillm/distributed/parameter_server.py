"""A parameter server: some ranks keep the parameters, the others compute gradients for them.

Each worker *pushes* its gradient to the server and *pulls* the new parameters. What that costs for a model of b bytes
and n workers, on links with latency alpha and bandwidth beta: everything goes through the server's one port, so that it
receives n b bytes and sends n b bytes a step, in 2 n (alpha + b / beta). A ring all-reduce of as many bytes sends less
than 2 b on any link, whatever n is. Of several servers each keeps a part of the parameters, and carries its bytes.

In the log of messages a gradient bears "push c" (the worker's c-th, from 1) and parameters "pull v" (their version).

Li et al. 2014, "Scaling distributed machine learning with the parameter server" (OSDI); Dean et al. 2012, "Large scale
distributed deep networks", section 4.1 (asynchronous); Ho et al. 2013, "More effective distributed ML via a stale
synchronous parallel parameter server" (the bound).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.distributed.collectives import ring_all_gather
from minillm.distributed.collectives_broadcast import broadcast
from minillm.distributed.labels import annotate
from minillm.distributed.parts import Part, share_out
from minillm.distributed.simulator import now


@dataclass(frozen=True)
class Update:
    """One step of a server's optimizer.

    Attributes:
        version: the parameters' version after it; before the first they have version 0.
        workers: ranks whose gradients it used (of the default group): all, or in the asynchronous mode one.
        staleness: how many updates came between the pull that gave this worker its parameters, and this update. 0 in
            the synchronous mode.
        time: `now()` on the server.
    """

    version: int
    workers: tuple[int, ...]
    staleness: int
    time: float


class ParameterServer:
    """The same object on every rank; what a rank does with it depends on its part::

        server = ParameterServer(model, optimizer, servers=[0])
        if server.is_server:
            updates = server.serve(n_steps)
        else:
            for batch in batches:            # n_steps of them
                model.zero_grad()
                loss(model, batch).backward()
                server.push()
                server.pull()

    Synchronous: the server averages one gradient of each worker and steps once: training as in one process on all
    batches together. Asynchronous: it steps for each gradient in the order in which they arrive, and answers that
    worker alone; a gradient then belongs to parameters that have been updated since (`Update.staleness`).

    A parameter without a gradient counts as one with a gradient of zeros. What stands in the model's buffers is
    everybody's own after the start. A learning-rate schedule belongs to the server:
    `optimizer.register_step_post_hook(lambda *_: schedule.step())`.

    The asynchronous mode receives from whoever comes first, which gloo and simulated ranks can, NCCL not.

    Args:
        model: of the same architecture on each rank; all get the parameters and buffers that the first server has.
        optimizer: a `torch.optim.Optimizer` for its parameters; only the servers' step, and only they hold a state.
        servers: ranks of the default group; all others in the group are workers. Each of several servers keeps whole
            parameters of about the same number of bytes; its copy of the others' stays as it was.
        synchronous: see above.
        max_staleness: for the asynchronous mode, stale synchronous parallel: a worker gets its answer only when it has
            pushed at most this many more times than the slowest. Of n workers a gradient's `Update.staleness` is then
            at most (n - 1) (2 max_staleness + 1). None: no bound.
        group: the ranks that take part; None: all.

    Raises:
        ValueError: `servers` that are not different ranks of the group, or leave no worker, or are more than there are
            parameters; an optimizer for parameters that the model has not, or for none that train; `max_staleness`
            negative or in the synchronous mode; models of different sizes. TypeError: no optimizer, sparse parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        servers: Sequence[int] = (0,),
        synchronous: bool = True,
        max_staleness: int | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        ranks = dist.get_process_group_ranks(group)
        if dist.get_rank() not in ranks:
            raise ValueError(f"group must be one that this rank is in, got ranks {ranks} on rank {dist.get_rank()}")
        if not servers or len(set(servers)) < len(servers) or not set(servers) < set(ranks):
            raise ValueError(f"servers must be different ranks of {ranks}, not all of them, got {list(servers)}")
        if max_staleness is not None and (synchronous or max_staleness < 0):
            raise ValueError(f"max_staleness must be at least 0, and None in the synchronous mode, got {max_staleness}")
        parameters = _trained(model, optimizer)
        if len(parameters) < len(servers):
            raise ValueError(f"servers must be no more than the {len(parameters)} parameters, got {len(servers)}")
        self.optimizer, self.synchronous, self.max_staleness, self.group = optimizer, synchronous, max_staleness, group
        self.servers, self.workers = tuple(servers), tuple(rank for rank in ranks if rank not in servers)
        self.is_server = dist.get_rank() in self.servers
        self._parts = share_out(parameters, len(servers))
        self._n_pushes = 0
        self._sent: list[tuple[dist.Work, object]] = []  # with its message, which must live until it has arrived
        self._begin(Part([*model.parameters(), *model.buffers()]))

    def push(self) -> None:
        """Send this worker's gradients to the servers. Returns at once; `pull` waits.

        Raises:
            RuntimeError: on a server, or before the `pull` that belongs to the last push.
        """
        if self.is_server or self._sent:
            raise RuntimeError("push() is for workers, each followed by pull()")
        self._n_pushes += 1
        messages = [
            (part.pack([torch.zeros_like(p) if p.grad is None else p.grad for p in part.tensors]), server)
            for part, server in zip(self._parts, self.servers, strict=True)
        ]
        with annotate(f"push {self._n_pushes}"):
            self._sent = list(zip(self._start(dist.isend, messages), messages, strict=True))

    @torch.no_grad()
    def pull(self) -> None:
        """Wait for the servers' answer to the last push, and take its parameters into the model.

        Raises:
            RuntimeError: on a server, or without a push before.
        """
        if not self._sent:
            raise RuntimeError("pull() is for workers, each after push()")
        answers = [(part.buffer(), server) for part, server in zip(self._parts, self.servers, strict=True)]
        for work in [*(work for work, _ in self._sent), *self._start(dist.irecv, answers)]:
            work.wait()
        self._sent = []
        for part, (answer, _) in zip(self._parts, answers, strict=True):
            for parameter, values in zip(part.tensors, part.views(answer), strict=True):
                parameter.copy_(values)

    @torch.no_grad()
    def serve(self, n_steps: int | Sequence[int]) -> list[Update]:
        """Answer the workers until each has pushed `n_steps` times.

        Args:
            n_steps: at least 0; in the asynchronous mode also one number for each worker, in order of rank.

        Returns:
            This server's updates, in order.

        Raises:
            RuntimeError: on a worker. ValueError: `n_steps` as above it is not.
        """
        if not self.is_server:
            raise RuntimeError(f"serve() is for servers, ranks {list(self.servers)}, not for rank {dist.get_rank()}")
        steps = [n_steps] * len(self.workers) if isinstance(n_steps, int) else list(n_steps)
        if len(steps) != len(self.workers) or min(steps) < 0 or (self.synchronous and len(set(steps)) > 1):
            kind = "one number" if self.synchronous else f"a number, or one for each of {len(self.workers)} workers"
            raise ValueError(f"n_steps must be {kind}, at least 0, got {n_steps}")
        self.optimizer.zero_grad(set_to_none=True)  # of parameters without a gradient an optimizer touches nothing
        part = self._parts[self.servers.index(dist.get_rank())]
        if self.synchronous:
            updates = self._serve_all_at_once(part, steps[0])
        else:
            updates = self._serve_as_they_come(part, dict(zip(self.workers, steps, strict=True)))
        self.optimizer.zero_grad(set_to_none=True)
        return updates

    def _serve_all_at_once(self, part: Part, n_steps: int) -> list[Update]:
        updates = []
        for version in range(1, n_steps + 1):
            gradients = [part.buffer() for _ in self.workers]
            self._exchange(dist.irecv, gradients)
            total = part.views(gradients[0])
            for buffer in gradients[1:]:  # in order of rank, not of arrival: sums depend on the order
                for into, other in zip(total, part.views(buffer), strict=True):
                    into.add_(other)
            self._step(part, [gradient.div_(len(self.workers)) for gradient in total])
            updates.append(Update(version, self.workers, 0, now()))
            with annotate(f"pull {version}"):
                self._exchange(dist.isend, [part.pack(part.tensors)] * len(self.workers))
        return updates

    def _serve_as_they_come(self, part: Part, n_steps: dict[int, int]) -> list[Update]:
        updates: list[Update] = []
        n_pushes, pulled = dict.fromkeys(self.workers, 0), dict.fromkeys(self.workers, 0)
        unanswered: list[int] = []
        answers: dict[int, tuple[list[dist.Work], Tensor]] = {}
        while n_pushes != n_steps:
            gradients = part.buffer()
            worker = dist.recv(gradients, group=self.group)
            if worker in answers:  # it has arrived, or the worker would not have gone on: this waits for nothing
                answers.pop(worker)[0][0].wait()
            self._step(part, part.views(gradients))
            n_pushes[worker] += 1
            updates.append(Update(len(updates) + 1, (worker,), len(updates) - pulled[worker], now()))
            unanswered.append(worker)
            # Who has pushed all it will holds nobody up.
            slowest = min((n for other, n in n_pushes.items() if n < n_steps[other]), default=math.inf)
            ahead = math.inf if self.max_staleness is None else slowest + self.max_staleness
            for worker in [worker for worker in unanswered if n_pushes[worker] <= ahead]:
                unanswered.remove(worker)
                pulled[worker] = len(updates)
                with annotate(f"pull {len(updates)}"):
                    values = part.pack(part.tensors)
                    answers[worker] = self._start(dist.isend, [(values, worker)]), values
        for works, _ in answers.values():
            works[0].wait()
        return updates

    def _step(self, part: Part, gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(part.tensors, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()

    def _start(self, op: Callable[..., object], messages: Sequence[tuple[Tensor, int]]) -> list[dist.Work]:
        """Send (or receive, by `op`) each of these, to or from its rank of the default group."""
        return dist.batch_isend_irecv([dist.P2POp(op, tensor, peer, self.group) for tensor, peer in messages])

    def _exchange(self, op: Callable[..., object], messages: Sequence[Tensor]) -> None:
        """One with each worker, to the end."""
        for work in self._start(op, list(zip(messages, self.workers, strict=True))):
            work.wait()

    @torch.no_grad()
    def _begin(self, everything: Part) -> None:
        """Give every rank the first server's model."""
        device = everything.tensors[0].device
        sizes = ring_all_gather(torch.tensor([everything.n_bytes], device=device), group=self.group).tolist()
        if len(set(sizes)) > 1:
            raise ValueError(f"model must be the same on every rank, got models of {sizes} bytes")
        values = everything.pack(everything.tensors)
        broadcast(values, self.servers[0], group=self.group)
        for tensor, value in zip(everything.tensors, everything.views(values), strict=True):
            tensor.copy_(value)


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The optimizer's parameters that require a gradient, in the model's order."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not optimized <= {id(parameter) for parameter in model.parameters()}:
        raise ValueError("optimizer must be one for the model's parameters, got one that has others too")
    trained: list[Tensor] = [p for p in model.parameters() if id(p) in optimized and p.requires_grad]
    if not trained:
        raise ValueError("optimizer must have parameters that require a gradient, got none")
    return trained
