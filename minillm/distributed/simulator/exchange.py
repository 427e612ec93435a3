"""Where the ranks of a simulation meet: calls are matched here, data moved, ports taken, messages written down."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from minillm.costs.communication import bytes_sent_by_ring, communication_seconds
from minillm.distributed.errors import MismatchError
from minillm.distributed.labels import current_label
from minillm.distributed.private_torch import unobserved
from minillm.distributed.simulator.movement import Call, check_same, mark, move
from minillm.distributed.simulator.network import Network, Ports
from minillm.distributed.simulator.records import CallRecord, Message
from minillm.distributed.simulator.scheduler import Event, Rank, Scheduler


@dataclass(frozen=True)
class Group:
    """A process group: the same object of values on each of its ranks.

    Attributes:
        name: the same on all ranks, and no other group's.
        ranks: its ranks' names in the default group, in order.
    """

    name: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"group {self.name} of ranks {', '.join(map(str, self.ranks))}"


class _Meeting:
    """One collective operation while not all ranks have come."""

    def __init__(self, group: Group, operation: str) -> None:
        self.calls: dict[int, Call] = {}
        self.event = Event(operation, self._describe)
        self._group, self._operation = group, operation

    def _describe(self) -> str:
        missing = [str(rank) for place, rank in enumerate(self._group.ranks) if place not in self.calls]
        return f"{self._operation} on {self._group}; not come: {', '.join(missing)}"


class _Post:
    """One side of a message that waits for the other side."""

    def __init__(self, rank: Rank, tensor: Tensor, verb: str, peer: int | None, tag: int) -> None:
        self.rank, self.tensor, self.label, self.posted = rank, tensor, current_label(), rank.clock
        self.mark = mark(tensor) if verb == "send" else None  # a receive's is to be filled
        other = "any rank" if peer is None else f"rank {peer}"
        words = {"send": f"send to {other}", "recv": f"recv from {other}"}[verb]
        self.event = Event(verb, lambda: words + (f", tag {tag}" if tag else ""))
        self.source: int | None = None  # who sent it, once a receive is done


class Exchange:
    """Matches the calls of all ranks.

    The k-th collective that a rank calls on a group belongs together with the k-th of every other rank; a send belongs
    to the first receive of the same group, peer and tag that has none, and the other way round.
    """

    def __init__(self, scheduler: Scheduler, network: Network) -> None:
        self.messages: list[Message] = []
        self._scheduler, self._network, self._ports = scheduler, network, Ports(network)
        self._counts: dict[tuple[Group, int], int] = defaultdict(int)
        self._meetings: dict[tuple[Group, int], _Meeting] = {}
        self._sends: dict[tuple[Group, int, int], list[tuple[int, _Post]]] = defaultdict(list)
        self._receives: dict[tuple[Group, int, int], list[tuple[int | None, _Post]]] = defaultdict(list)

    def unanswered(self) -> list[str]:
        """The calls, in words, to which others never came."""
        meetings = [str(meeting.event) for meeting in self._meetings.values()]
        posts = [post for waiting in self._sends.values() for _, post in waiting]
        posts += [post for waiting in self._receives.values() for _, post in waiting]
        return meetings + [f"rank {post.rank.index}: {post.event}" for post in posts]

    @unobserved()
    def collective(self, rank: Rank, group: Group, call: Call) -> Event:
        """Take one rank's part in an operation; the last one to come sets it going."""
        self._scheduler.synchronise(rank)
        call.posted, call.label = rank.clock, current_label()
        call.marks = [mark(tensor) for part in call.inputs for tensor in part]
        count = self._counts[group, call.rank]
        self._counts[group, call.rank] += 1
        meeting = self._meetings.setdefault((group, count), _Meeting(group, call.operation))
        meeting.calls[call.rank] = call
        tensors = [tensor for part in call.inputs or call.outputs for tensor in part]
        self._tell(rank, group, call.operation, call.chunks, _bytes_sent(call), tensors)
        if len(meeting.calls) == len(group.ranks):
            del self._meetings[group, count]
            try:
                self._hold(group, [meeting.calls[place] for place in range(len(group.ranks))], meeting.event)
            except Exception as error:  # the others' calls would never be done
                self._scheduler.fail(rank, error)
            meeting.calls.clear()  # the event knows its meeting: in that circle the tensors would outlive their work
        return meeting.event

    def _hold(self, group: Group, calls: list[Call], event: Event) -> None:
        check_same(calls, group.ranks)
        for call in calls:
            if any(entry.changed() for entry in call.marks):
                raise MismatchError(_changed(group.ranks[call.rank], call.operation))
        try:
            move(calls)
        except MismatchError as error:
            raise MismatchError(f"{calls[0].operation} on {group}: {error}") from None
        operation, ready = calls[0].operation, max(call.posted for call in calls)
        sent = _pairs(calls)
        seconds = _seconds(calls, *self._network.link(group.ranks))
        begin = ready
        if seconds > 0:
            begin = self._ports.occupy(group.ranks, group.ranks, ready, seconds)
        event.end = begin + seconds
        for source, destination, n_bytes in sent:
            self._write(group.ranks[source], group.ranks[destination], n_bytes, operation, calls[source], begin, event)
        for call in calls:
            rank = self._scheduler.ranks[group.ranks[call.rank]]
            self._scheduler.span(rank, "communication", call.label or operation, begin, event.end)

    def _write(
        self, source: int, destination: int, n_bytes: int, operation: str, by: Call | _Post, begin: float, event: Event
    ) -> None:
        assert event.end is not None
        if n_bytes:
            self.messages.append(Message(source, destination, n_bytes, operation, by.label, begin, event.end))

    @unobserved()
    def send(self, rank: Rank, group: Group, tensor: Tensor, destination: int, tag: int) -> _Post:
        """Post a send to a rank of the default group."""
        self._scheduler.synchronise(rank)
        post = _Post(rank, tensor, "send", destination, tag)
        self._tell(rank, group, "send", [tensor.nbytes], tensor.nbytes, [tensor])
        waiting = self._receives[group, destination, tag]
        for place, (source, receive) in enumerate(waiting):
            if source is None or source == rank.index:
                del waiting[place]
                self._deliver(post, receive)
                return post
        self._sends[group, destination, tag].append((rank.index, post))
        return post

    @unobserved()
    def receive(self, rank: Rank, group: Group, tensor: Tensor, source: int | None, tag: int) -> _Post:
        """Post a receive from a rank of the default group, or from whoever sends first."""
        self._scheduler.synchronise(rank)
        post = _Post(rank, tensor, "recv", source, tag)
        self._tell(rank, group, "recv", [tensor.nbytes], 0, [tensor])
        waiting = self._sends[group, rank.index, tag]
        for place, (sender, send) in enumerate(waiting):
            if source is None or source == sender:
                del waiting[place]
                self._deliver(send, post)
                return post
        self._receives[group, rank.index, tag].append((source, post))
        return post

    def _deliver(self, send: _Post, receive: _Post) -> None:
        source, destination = send.rank.index, receive.rank.index
        if send.mark is not None and send.mark.changed():
            self._scheduler.fail(send.rank, MismatchError(_changed(source, "send")))
        sent, taken = send.tensor.detach(), receive.tensor.detach()
        if sent.numel() != taken.numel() or sent.dtype != taken.dtype:
            words = (
                f"rank {source} sends {sent.numel()} elements of {sent.dtype} to rank {destination}, which expects "
                f"{taken.numel()} of {taken.dtype}"
            )
            self._scheduler.fail(send.rank, MismatchError(words))
        taken.copy_(sent.reshape(taken.shape))
        receive.source = source
        latency, bandwidth = self._network.link([source, destination])
        seconds = latency + sent.nbytes / bandwidth if source != destination else 0.0
        begin = self._ports.occupy([source], [destination], max(send.posted, receive.posted), seconds)
        send.event.end = receive.event.end = begin + seconds
        self._write(source, destination, sent.nbytes, "send", send, begin, send.event)
        for post in (send, receive):
            self._scheduler.span(post.rank, "communication", send.label or post.event.name, begin, begin + seconds)

    def _tell(
        self, rank: Rank, group: Group, operation: str, chunks: list[int], sent: int, tensors: list[Tensor]
    ) -> None:
        if rank.listeners:
            dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
            place = group.ranks.index(rank.index)
            record = CallRecord(operation, len(group.ranks), place, sum(chunks), sent, current_label(), dtype)
            for listener in list(rank.listeners):
                listener(record)


def _changed(rank: int, operation: str) -> str:
    return f"rank {rank} changed a tensor between its {operation} and the wait for it: the others may get either value"


def _bytes_sent(call: Call) -> int:
    return bytes_sent_by_ring(call.operation, call.chunks, call.rank, call.root or 0)


def _pairs(calls: Sequence[Call]) -> list[tuple[int, int, int]]:
    """(source, destination, bytes) within the group."""
    n, operation, root = len(calls), calls[0].operation, calls[0].root or 0
    if operation == "all_to_all":
        return [(a, b, calls[a].chunks[b]) for a in range(n) for b in range(n) if a != b]
    if operation == "scatter":
        return [(root, b, calls[root].chunks[b]) for b in range(n) if b != root]
    if operation == "gather":
        return [(a, root, _bytes_sent(calls[a])) for a in range(n) if a != root]
    return [(a, (a + 1) % n, _bytes_sent(calls[a])) for a in range(n)]


def _seconds(calls: Sequence[Call], latency: float, bandwidth: float) -> float:
    """What the operation takes: each step as long as its largest message."""
    n, operation, chunks = len(calls), calls[0].operation, calls[0].chunks
    if operation == "all_to_all":  # in step k each rank sends to the k-th after it
        steps = [max(calls[a].chunks[(a + k) % n] for a in range(n)) for k in range(1, n)]
        return sum(latency + n_bytes / bandwidth for n_bytes in steps)
    n_bytes = sum(chunks) if operation in ("broadcast", "reduce") else n * max(chunks)
    return communication_seconds(operation, n_bytes, n, latency=latency, bandwidth=bandwidth)
