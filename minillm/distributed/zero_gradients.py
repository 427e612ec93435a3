"""From every rank's own gradients to each rank's part of their mean: reduce-scatter, bucket by bucket.

Stage 1 collects the gradients of all micro-steps in a buffer as large as the parameters and reduce-scatters that once.
Stages 2 and 3 give a bucket's memory back as soon as its sum is on its way, so that a rank holds its own part and a
bucket or two (Rajbhandari et al. 2020, section 5.2).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.distributed.labels import annotate
from minillm.distributed.private_torch import after_backward
from minillm.distributed.tensor_collectives import reduce_scatter_tensor
from minillm.distributed.zero_shards import FlatParameters


class FlatGradients:
    """The gradients of one :class:`FlatParameters`, on their way from `own` by way of `partial` to `reduced`.

    Attributes:
        own: (size,) what this rank's backward passes gave, divided by the number of ranks for a mean; without storage
            while it holds nothing.
        partial: (part_size,) the sum over the partition group, not yet over the replicas; or None.
        reduced: (part_size,) the sum over all ranks; or None.
    """

    def __init__(self, flat: FlatParameters, *, keep_own: bool, scale: float, label: str) -> None:
        self.flat, self.scale, self.label = flat, scale, label
        # Alone, a rank's own gradients are the sum: there is nothing to move and nothing to give back.
        self.keep_own = keep_own or flat.ranks.n_parts == 1
        self.own = torch.empty(flat.size, dtype=flat.dtype, device=flat.full.device)
        self._views = [self.own[place.start : place.stop].view(place.shape) for place in flat.places]
        self._gaps = [self.own[gap] for gap in flat.gaps()]
        self.own.untyped_storage().resize_(0)
        self._written = [False] * len(flat.places)
        self.arrived = 0  # in the backward pass that is running
        self.partial: Tensor | None = None
        self.reduced: Tensor | None = None
        self._moving: tuple[dist.Work | None, Tensor] | None = None
        self._replicating: dist.Work | None = None

    def add(self, index: int) -> bool:
        """Take the `grad` of the parameter at `index` away from it; whether this pass has brought every one by now."""
        parameter = self.flat.places[index].parameter
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise TypeError(f"{self.flat.places[index].name} has a sparse gradient, Zero needs dense ones")
        gradient = gradient.detach()
        parameter.grad = None
        if not self.holds_own:
            self._open()
        view = self._views[index]
        if self._written[index]:
            view.add_(gradient, alpha=self.scale)
        elif self.scale == 1.0:
            view.copy_(gradient)
        else:
            torch.mul(gradient, self.scale, out=view)
        self._written[index] = True
        self.arrived += 1
        return self.arrived == len(self._views)

    @property
    def holds_own(self) -> bool:
        """Whether there are gradients that have not been sent off."""
        return any(self._written)

    def _open(self) -> None:
        self.finish_reduce_scatter()
        if self._replicating is not None:
            self.finish_replication()
        if self.keep_own:  # the sum of an earlier pass stands in the buffer that the new gradients need
            self.partial = None if self.partial is None else self.partial.clone()
            self.reduced = None if self.reduced is None else self.reduced.clone()
        self.own.untyped_storage().resize_(self.own.numel() * self.own.itemsize)

    def start_reduce_scatter(self) -> None:
        """Send the own gradients off; parameters without a gradient have given zeros."""
        if not self.holds_own:
            self._open()
        for view, written in zip(self._views, self._written, strict=True):
            if not written:
                view.zero_()
        for gap in self._gaps:
            gap.zero_()
        self._written, self.arrived = [False] * len(self._views), 0
        ranks = self.flat.ranks
        part = self.own[self.flat.own] if self.keep_own else self.own.new_empty(self.flat.part_size)
        work = None
        if ranks.n_parts > 1:
            with annotate(f"gradients of {self.label}"):
                work = reduce_scatter_tensor(part, self.own, group=ranks.partition, async_op=True)
        self._moving = (work, part)

    def finish_reduce_scatter(self) -> None:
        """Wait for what :meth:`start_reduce_scatter` began, and give its memory back."""
        if self._moving is None:
            return
        (work, part), self._moving = self._moving, None
        if self._replicating is not None:
            self.finish_replication()
        if work is not None:
            work.wait()
        self.partial = part if self.partial is None else self.partial.add_(part)
        if not self.keep_own:
            self.own.untyped_storage().resize_(0)

    def start_replication(self) -> None:
        """The second hop: sum `partial` over the replicas."""
        if self.partial is not None and self._replicating is None and self.flat.ranks.n_replicas > 1:
            with annotate(f"gradients of {self.label}, among replicas"):
                self._replicating = dist.all_reduce(self.partial, group=self.flat.ranks.replication, async_op=True)

    def finish_replication(self) -> None:
        """Wait for the second hop: from here on `reduced` is right."""
        if self._replicating is not None:
            self._replicating.wait()
            self._replicating = None
        if self.partial is not None:
            self.reduced = self.partial if self.reduced is None else self.reduced.add_(self.partial)
            self.partial = None

    def held(self) -> list[Tensor]:
        """The tensors that now hold gradients."""
        moving = None if self._moving is None else self._moving[1]
        return [tensor for tensor in (self.own, moving, self.partial, self.reduced) if tensor is not None]

    def clear(self) -> None:
        """Forget every gradient. The buffer of stage 1 stays: the next pass needs one of that size again."""
        self.finish_reduce_scatter()
        self.finish_replication()
        self._written, self.arrived = [False] * len(self._views), 0
        self.partial = self.reduced = None
        if not self.keep_own or self.flat.ranks.n_parts == 1:
            self.own.untyped_storage().resize_(0)


class GradientDivider:
    """Starts the reduce-scatters while the backward pass goes on, and has at most one on its way.

    Every rank must start the same ones in the same order. Gradients come in another order on a rank that has not used
    some parameter, therefore buckets wait for their turn; what has not come at the end of the pass counts as zero.

    Attributes:
        sync: False inside of `no_sync`: gradients stay with each rank (stage 1), or are reduce-scattered and wait only
            for the replicas (stages 2 and 3, where a rank has no room for all of its own).
        passes: how many backward passes have begun.
        at_end: called when a backward pass ends, before the gradients that are left are sent off.

    Args:
        buckets: in the order in which their gradients are expected.
        stage: 1, 2 or 3.
        in_turn: start each bucket when it is full; False leaves that to calls of :meth:`launch`.
    """

    def __init__(self, buckets: Sequence[FlatGradients], *, stage: int, in_turn: bool) -> None:
        self.buckets, self.stage, self.in_turn = list(buckets), stage, in_turn
        self.sync = True
        self.in_backward = False
        self.passes = 0
        self.at_end: Callable[[], None] | None = None
        self._full: set[int] = set()
        self._turn = 0
        self._latest: FlatGradients | None = None
        myself = weakref.ref(self)  # a parameter's C++ hooks hide from the garbage collector: they must hold nothing
        for number, bucket in enumerate(self.buckets):
            for index, place in enumerate(bucket.flat.places):
                place.parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    functools.partial(_take, myself, number, index)
                )

    @property
    def _moves(self) -> bool:
        return self.sync or self.stage > 1

    def begin(self) -> None:
        """From within a hook: a backward pass is running."""
        if not self.in_backward:
            self.in_backward = True
            self.passes += 1
            after_backward(self._end)

    def take(self, number: int, index: int) -> None:
        """From within a hook: a parameter of a bucket has its gradient."""
        self.begin()
        if self.buckets[number].add(index) and self.in_turn and self._moves:
            self._full.add(number)
            while self._turn in self._full:
                self.launch(self.buckets[self._turn])
                self._turn += 1

    def launch(self, bucket: FlatGradients) -> None:
        """Send a bucket's gradients off, after the one before has arrived."""
        self._settle()
        bucket.start_reduce_scatter()
        self._latest = bucket

    def _settle(self) -> None:
        if self._latest is not None:
            self._latest.finish_reduce_scatter()
            if self.sync:
                self._latest.start_replication()
            self._latest = None

    def _end(self) -> None:
        self.in_backward = False
        if self.at_end is not None:
            self.at_end()
        if self._moves:
            for number, bucket in enumerate(self.buckets):
                if bucket.holds_own or (self.in_turn and number >= self._turn):
                    self.launch(bucket)
        self._settle()
        self._full.clear()
        self._turn = 0
        for bucket in self.buckets:
            bucket.arrived = 0
            if self.sync:
                bucket.finish_replication()

    def finish(self) -> None:
        """Complete what `no_sync` has put off; a bucket that no pass has reached gets zeros if others have any.

        Raises:
            RuntimeError: a backward pass was broken off.
        """
        if self.in_backward:
            raise RuntimeError("the last backward did not come to its end: zero_grad() forgets what it has left")
        for bucket in self.buckets:
            if bucket.holds_own:
                self.launch(bucket)
        self._settle()
        for bucket in self.buckets:
            bucket.start_replication()
        for bucket in self.buckets:
            bucket.finish_replication()
        if any(bucket.reduced is not None for bucket in self.buckets):
            for bucket in self.buckets:
                if bucket.reduced is None:
                    bucket.reduced = torch.zeros_like(bucket.flat.shard)

    def clear(self) -> None:
        """Forget every gradient, and a backward pass that an exception has ended."""
        self.in_backward = False
        self._full.clear()
        self._turn, self._latest = 0, None
        for bucket in self.buckets:
            bucket.clear()


def _take(reducer: weakref.ref[GradientDivider], number: int, index: int, _: Tensor) -> None:
    alive = reducer()
    if alive is not None:
        alive.take(number, index)
