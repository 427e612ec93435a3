"""The link between a device and its host: copies beside the computation, their bytes, their place on the virtual clock.

On a GPU a copy runs on a stream of its own, one for each direction, between page-locked ("pinned") memory and the
device; an event tells when it is done. Elsewhere device and host share one memory, and a copy is a plain copy. On a
simulated rank the lanes "to host" and "to device" carry every copy, each at the link's bandwidth (full duplex).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from minillm.distributed.simulator import Pending, start

Direction = Literal["to host", "to device"]


class Copy:
    """A copy that may still be under way.

    Attributes:
        held: the tensors that it keeps alive until somebody has waited for it.
    """

    def __init__(
        self, held: tuple[Tensor, ...], device: torch.device, event: torch.cuda.Event | None, pending: Pending
    ) -> None:
        self.held, self._device = held, device
        self._event, self._pending = event, pending

    def wait(self) -> None:
        """Hold the host until it is done."""
        if self._event is not None:
            self._event.synchronize()
        self._pending.wait()
        self.held = ()

    def wait_on_device(self) -> None:
        """Hold the device's current stream until it is done; the host goes on."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
        self._pending.wait()
        self.held = ()


class Link:
    """One device's link to its host.

    Args:
        device: the device.
        bandwidth: bytes per second in each direction, for the virtual clock alone.

    Attributes:
        sent: bytes that went "to host" and "to device" so far.
    """

    def __init__(self, device: torch.device, bandwidth: float) -> None:
        self.device, self.bandwidth = device, bandwidth
        self.sent: dict[Direction, int] = {"to host": 0, "to device": 0}
        self._streams: dict[Direction, torch.cuda.Stream] = {}
        if device.type == "cuda":
            self._streams = {
                direction: torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                for direction in self.sent
            }

    def stream(self, direction: Direction) -> torch.cuda.StreamContext:
        """A context in which this direction's stream is the current one; without streams it does nothing."""
        return torch.cuda.stream(self._streams.get(direction))

    def host_memory(self, size: int, dtype: torch.dtype) -> Tensor:
        """(size,) on the host, pinned where the device is a GPU: only from there can it copy while the host goes on."""
        return torch.empty(size, dtype=dtype, pin_memory=bool(self._streams))

    def synchronize(self) -> None:
        """Hold the host until every copy is done."""
        for stream in self._streams.values():
            stream.synchronize()

    def copy(
        self, target: Tensor, source: Tensor, direction: Direction, name: str, *, keep: Tensor | None = None
    ) -> Copy:
        """Begin to copy `source` into `target`: after all that the device's current stream has been given so far.

        Args:
            target, source: of one shape and dtype, one on the device, the other on the host.
            direction: which way.
            name: for the timeline.
            keep: what must stay in memory until then, besides `source`.
        """
        self.sent[direction] += source.nbytes
        event = None
        if self._streams:
            stream = self._streams[direction]
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
                event = stream.record_event()
        else:
            target.copy_(source)
        held = (source,) if keep is None or keep is source else (source, keep)
        return Copy(held, self.device, event, start(source.nbytes / self.bandwidth, name=name, lane=direction))
