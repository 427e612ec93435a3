"""The way of ZeRO-Offload's gradients during backward: from `parameter.grad` through a bucket to the host.

A bucket that is full is reduce-scattered over the ranks (one may be on its way), and the rank's part is copied to the
host (one may be on its way). So the device holds one bucket that fills and at most two that travel.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.distributed.labels import annotate
from minillm.distributed.offload_bucket import OffloadBucket
from minillm.distributed.private_torch import after_backward
from minillm.distributed.tensor_collectives import reduce_scatter_tensor
from minillm.distributed.zero_mics import Ranks


class GradientShipping:
    """Hooks on the parameters of buckets; they do not keep this object alive, and go with it.

    Args:
        buckets: in the order in which backward is expected to fill them; with several ranks the order of sending.
        ranks: who shares them.

    Attributes:
        sync: whether backward passes send; otherwise gradients stay in `parameter.grad`.
    """

    def __init__(self, buckets: Sequence[OffloadBucket], ranks: Ranks) -> None:
        self.buckets, self.ranks, self.sync = list(buckets), ranks, True
        self._alone = ranks.n_parts == 1
        self._running = False
        self._kept = False  # gradients have stayed on the device that no backward has sent since
        self._turn = 0  # the bucket to send next, where all ranks send in one order
        self._reducing: tuple[OffloadBucket, dist.Work, Tensor, Tensor] | None = None
        self._travelling: OffloadBucket | None = None
        me, handles = weakref.ref(self), []
        for number, bucket in enumerate(self.buckets):
            for index, piece in enumerate(bucket.pieces):
                hook = partial(_take, me, number, index)
                parameter = piece.place.parameter
                handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        weakref.finalize(self, _remove, handles).atexit = False

    def gradients_on_device(self) -> list[Tensor]:
        """The buffers of gradients that are on the device now."""
        reducing = [] if self._reducing is None else [*self._reducing[2:]]
        return reducing + [tensor for bucket in self.buckets for tensor in bucket.gradients_on_device()]

    def take(self, bucket: OffloadBucket, index: int) -> None:
        """The backward has added to a parameter's `grad` all that it will."""
        if torch.is_grad_enabled():
            raise RuntimeError("Offload cannot send gradients that are part of a graph: backward(create_graph=True)")
        if not self.sync:
            self._kept = True
            return
        if not self._running:
            self._running = True
            after_backward(self._end)
        bucket.take(index)
        if self._alone:
            if bucket.complete:
                self._launch(bucket)
        else:
            while self._turn < len(self.buckets) and self.buckets[self._turn].complete:
                self._launch(self.buckets[self._turn])
                self._turn += 1

    def _end(self) -> None:
        """Backward is over: send what waits for gradients that did not come."""
        self._send_rest()
        self._running = False

    def _send_rest(self) -> None:
        if any(bucket.started for bucket in self.buckets[: self._turn]):
            raise RuntimeError(
                "a second gradient of a parameter came in one backward, after the first was sent: ranks could no "
                "longer agree on an order; checkpoint with use_reentrant=False"
            )
        for bucket in self.buckets[self._turn :]:
            for index, piece in enumerate(bucket.pieces):
                if piece.place.parameter.grad is not None:  # from a pass that sent nothing
                    bucket.take(index)
            if bucket.started or not self._alone:
                self._launch(bucket)
        self._turn, self._kept = 0, False
        self._pass_on()

    def _launch(self, bucket: OffloadBucket) -> None:
        """Send a bucket off."""
        buffer = bucket.seal()
        if self._alone:
            self._ship(bucket, buffer, buffer)
            return
        self._pass_on()
        part = buffer.new_empty(bucket.flat.part_size)
        with annotate(f"gradients of {bucket.name}"):
            work = reduce_scatter_tensor(part, buffer, group=self.ranks.partition, async_op=True)
        assert work is not None
        self._reducing = bucket, work, buffer, part

    def _pass_on(self) -> None:
        """Send the part that has been reduced to the host."""
        if self._reducing is None:
            return
        (bucket, work, buffer, part), self._reducing = self._reducing, None
        with bucket.link.stream("to host"):
            work.wait()  # on a GPU it is this stream that waits, and not the one that computes
        self._ship(bucket, part, buffer)

    def _ship(self, bucket: OffloadBucket, part: Tensor, keep: Tensor) -> None:
        if self._travelling is not None:
            self._travelling.gradient.let_go()
        bucket.gradient.receive(part, keep, f"gradients of {bucket.name}")
        self._travelling = bucket

    def finish(self) -> None:
        """Before a step: everything must be on its way.

        Raises:
            RuntimeError: a backward pass was broken off.
        """
        if self._running:
            raise RuntimeError("the last backward did not come to its end: zero_grad() forgets what it has left")
        if self._kept:
            self._send_rest()

    @torch.no_grad()
    def agree_on_used(self) -> None:
        """Which parameters have a gradient on any rank: the others must be left as they are, on all ranks.

        One byte a parameter tensor is all-reduced.
        """
        if self._alone:
            return
        own = [used for bucket in self.buckets for used in bucket.gradient.used]
        flags = torch.tensor(own, dtype=torch.uint8, device=self.buckets[0].link.device)
        with annotate("which parameters have gradients"):
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.ranks.partition)
        anywhere = iter(flags.tolist())
        for bucket in self.buckets:
            bucket.gradient.used = [bool(next(anywhere)) for _ in bucket.pieces]
            if not any(bucket.gradient.used):
                bucket.gradient.clear()

    def clear(self) -> None:
        """Forget all gradients, also those of a backward that was broken off."""
        if self._reducing is not None:
            self._reducing[1].wait()
        self._reducing = self._travelling = None
        self._running, self._kept, self._turn = False, False, 0
        for bucket in self.buckets:
            bucket.discard()
            for piece in bucket.pieces:
                piece.place.parameter.grad = None


def _take(shipping: weakref.ref[GradientShipping], number: int, index: int, _: Tensor) -> None:
    owner = shipping()
    if owner is not None:
        owner.take(owner.buckets[number], index)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
