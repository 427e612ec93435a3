"""The host's side of a step of ZeRO-Offload: update bucket by bucket, send each back while the next is updated.

An ordinary update stands between two steps. A delayed one (Ren et al. 2021, section 5.2) runs beside the next step's
forward and backward, in a thread of its own: the loops of PyTorch's operators let other threads run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minillm.distributed.labels import annotate
from minillm.distributed.offload_bucket import HostGradient, OffloadBucket
from minillm.distributed.offload_link import Copy
from minillm.distributed.simulator import Pending, is_simulated, start


@dataclass
class Update:
    """An update of one bucket: `new` holds the parameters when it is done; `pending` is its end on the clock."""

    bucket: OffloadBucket
    new: HostGradient
    pending: Pending

    def upload(self) -> tuple[OffloadBucket, Copy]:
        """Wait for it, and begin to copy the new parameters to the device."""
        self.pending.wait()
        return self.bucket, self.bucket.upload(self.new)


class HostUpdates:
    """Updates of buckets.

    Args:
        buckets: all of them.
        host_speed: parameters a second, for the virtual clock.

    Attributes:
        beside: the delayed update whose result no step has fetched; None without one.
    """

    def __init__(self, buckets: Sequence[OffloadBucket], host_speed: float) -> None:
        self.buckets, self.host_speed = list(buckets), host_speed
        self.beside: list[Update] | None = None
        self._thread: Future[Any] | None = None

    def buffers(self) -> list[Tensor]:
        """The gradients that a delayed update reads, and the parameters that it has left in their place."""
        return [update.new.buffer for update in self.beside or []]

    def wait(self) -> None:
        """Hold the host until a delayed update is done; raises what that raised."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            thread.result()

    def make(self, ready: Sequence[OffloadBucket]) -> None:
        """An ordinary update of these buckets."""
        self._publish(self._update(bucket, bucket.gradient).upload() for bucket in ready)

    def begin(self, ready: Sequence[OffloadBucket]) -> None:
        """Show the parameters of the delayed update that is done, and begin one of these buckets."""
        done = self._fetch()
        uploads = [update.upload() for update in done]
        jobs = [(bucket, bucket.swap()) for bucket in ready]
        if is_simulated():  # at once, and only the time is put beside: a simulation has no threads but its ranks
            self.beside = [self._update(bucket, gradient) for bucket, gradient in jobs]
        else:
            worker = ThreadPoolExecutor(1, "delayed update")
            self._thread = worker.submit(lambda: [bucket.update(gradient) for bucket, gradient in jobs])
            worker.shutdown(wait=False)  # the thread ends when the update does
            self.beside = [Update(bucket, gradient, Pending(None, None)) for bucket, gradient in jobs]
        self._publish(uploads)

    def flush(self) -> None:
        """Show the parameters of the delayed update, if there is one."""
        self._publish(update.upload() for update in self._fetch())

    def forget(self) -> None:
        """Let a delayed update end, and never show it."""
        self._fetch()

    def show_later(self) -> None:
        """As if a delayed update had left the master weights as they are."""
        self.beside = [Update(bucket, bucket.rounded(), Pending(None, None)) for bucket in self.buckets]

    def _update(self, bucket: OffloadBucket, gradient: HostGradient) -> Update:
        bucket.update(gradient)
        seconds = bucket.master.numel() / self.host_speed
        return Update(bucket, gradient, start(seconds, name=f"update of {bucket.name}", lane="host compute"))

    def _fetch(self) -> list[Update]:
        self.wait()
        done, self.beside = self.beside or [], None
        for update in done:
            update.bucket.spare = update.new
        return done

    def _publish(self, uploads: Iterable[tuple[OffloadBucket, Copy]]) -> None:
        """Gather over the ranks what arrives on their devices, each bucket while the next one is made."""
        gathers, last = [], None
        for upload in uploads:
            if last is not None:
                gathers.append(self._gather(*last))
            last = upload
        if last is not None:
            gathers.append(self._gather(*last))
        for gather in gathers:
            if gather is not None:
                gather.wait()
        # A graph from before must notice, as with any optimizer, that the parameters are others now.
        torch.autograd.graph.increment_version([p.place.parameter for b in self.buckets for p in b.pieces])

    def _gather(self, bucket: OffloadBucket, upload: Copy) -> Any:
        upload.wait_on_device()
        with annotate(f"parameters of {bucket.name}"):
            return bucket.flat.publish()
