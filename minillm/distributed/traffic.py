"""How much each rank sends: counted at the call of every collective and every send.

The convention (`minillm.costs.communication`): the bytes that this rank SENDS when the operation is done by the ring
algorithm, whatever the backend really does; gloo's reduce-scatter, for one, moves what an all-reduce moves. What a send
sends is all of it, what an all-to-all sends is all but the rank's own part, receiving and barriers are free. So the
numbers can be held against closed forms: n ranks all-reduce b bytes with 2 (n-1)/n b each.

Real ranks: every call passes PyTorch's dispatcher as an operator of the namespace `c10d` (DDP's reducer, which is C++,
included) or `_c10d_functional` (DTensor), where a `TorchDispatchMode` sees it. Simulated ranks: the simulator tells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode

from minillm.distributed.labels import current_label
from minillm.distributed.simulator import CallRecord, is_simulated, subscribe
from minillm.distributed.traffic_calls import calls_of_operator


class TrafficEvent(NamedTuple):
    """One call of this rank.

    Attributes:
        operation: "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "reduce", "gather",
            "scatter", "send", "recv" or "barrier".
        bytes_sent: by this rank, by the ring algorithm.
        n_bytes: of the whole buffer: what an all-reduce holds, an all-gather fills, a reduce-scatter is given.
        group_size: ranks of the group.
        label: what for, from `annotate`.
        dtype: as torch prints it ("bfloat16").
    """

    operation: str
    bytes_sent: int
    n_bytes: int
    group_size: int
    label: str
    dtype: str


class Traffic:
    """What one rank has sent since `count_traffic` began; it may be read while the count goes on.

    Attributes:
        events: the calls, in order.
    """

    def __init__(self) -> None:
        self.events: list[TrafficEvent] = []

    @property
    def bytes_sent(self) -> int:
        """Of all calls together."""
        return sum(event.bytes_sent for event in self.events)

    @property
    def calls(self) -> dict[str, int]:
        """How many calls, by operation."""
        return dict(Counter(event.operation for event in self.events))

    @property
    def by_operation(self) -> dict[str, int]:
        """Bytes sent, by operation."""
        return _sums(self.events, lambda event: event.operation)

    @property
    def by_label(self) -> dict[str, int]:
        """Bytes sent, by what they were for."""
        return _sums(self.events, lambda event: event.label)

    @property
    def by_group_size(self) -> dict[int, int]:
        """Bytes sent, by the number of ranks in the group."""
        return _sums(self.events, lambda event: event.group_size)

    def table(self) -> str:
        """The events as text, one line for those of one operation, label, group size and dtype."""
        lines: dict[tuple[str, str, int, str], list[int]] = {}
        for event in self.events:
            key = (event.operation, event.label, event.group_size, event.dtype)
            lines.setdefault(key, []).append(event.bytes_sent)
        rows = [["operation", "what for", "ranks", "dtype", "calls", "bytes sent"]]
        rows += [[a, b, str(c), d, f"{len(sent):,}", f"{sum(sent):,}"] for (a, b, c, d), sent in lines.items()]
        rows.append(["all", "", "", "", f"{len(self.events):,}", f"{self.bytes_sent:,}"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        right = (False, False, True, False, True, True)
        texts = (
            [cell.rjust(w) if at_right else cell.ljust(w) for cell, w, at_right in zip(row, widths, right, strict=True)]
            for row in rows
        )
        return "\n".join("  ".join(text).rstrip() for text in texts)

    def __repr__(self) -> str:
        return f"Traffic({len(self.events)} calls, {self.bytes_sent:,} bytes sent)"


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this rank sends while this is open, on real and on simulated ranks.

        with count_traffic() as traffic:
            loss.backward()
        traffic.bytes_sent

    Open it on the rank itself: in a simulation within the function that each rank runs. Counts may be nested.

    Raises:
        NotImplementedError: from a collective that this count does not know. (PyTorch's symmetric memory is not
            counted.)
    """
    traffic = Traffic()
    if is_simulated():

        def take(record: CallRecord) -> None:
            traffic.events.append(
                TrafficEvent(
                    record.operation,
                    record.bytes_sent,
                    record.n_bytes,
                    record.group_size,
                    record.label,
                    record.dtype,
                )
            )

        with subscribe(take):
            yield traffic
    else:
        with _Watch(traffic):
            yield traffic


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operator that communicates."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._traffic = traffic

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a DTensor then does its collectives on plain tensors, and under this mode
        for operation, sent, n_bytes, group_size, dtype in calls_of_operator(func, args):
            event = TrafficEvent(operation, sent, n_bytes, group_size, current_label(), dtype)
            self._traffic.events.append(event)
        return func(*args, **(kwargs or {}))


def _sums(events: Sequence[TrafficEvent], key: Callable[[TrafficEvent], Any]) -> dict[Any, int]:
    sums: dict[Any, int] = {}
    for event in events:
        sums[key(event)] = sums.get(key(event), 0) + event.bytes_sent
    return sums
