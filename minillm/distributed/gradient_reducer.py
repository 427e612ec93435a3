"""What happens to gradients during a backward pass under data parallelism: hooks, buckets, collectives, one wait.

Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", section 3.2 and algorithm 1.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.distributed.buckets import GradientBucket, assign_buckets
from minillm.distributed.labels import annotate
from minillm.distributed.private_torch import after_backward

_FIRST_BUCKET_BYTES = 2**20


class GradientReducer:
    """Makes each parameter's ``grad``, after a backward pass, the mean or sum over the ranks of a group.

    Every backward that reaches one of the parameters is reduced while `active`, so that forward passes may be many and
    need not go through anything. The work is done by hooks, which do not keep the reducer alive.

    Args:
        parameters: name to parameter, the same on every rank, in order of registration.
        group: None is the default group.
        bucket_bytes: None is one all-reduce a parameter.
        overlap: reduce during the backward, or after it.
        mean: or sum.
        find_unused: parameters without a gradient are no error.

    Attributes:
        active: while False, gradients add up on each rank.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        group: dist.ProcessGroup | None,
        *,
        bucket_bytes: int | None,
        overlap: bool,
        mean: bool,
        find_unused: bool,
    ) -> None:
        n_ranks = dist.get_world_size(group)
        self.active = True
        self._group, self._overlap, self._find_unused = group, overlap, find_unused
        self._scale = 1.0 / n_ranks if mean else 1.0
        self._scale_reduced = 1.0 / n_ranks  # gradients that are equal on all ranks come out as they went in
        # The last layers' gradients come first. A parameter alone fills a bucket of 1 byte.
        self._names, self._parameters = list(parameters)[::-1], list(parameters.values())[::-1]
        size = bucket_bytes or 1
        self._members = assign_buckets(self._parameters, size, first_bucket_bytes=min(size, _FIRST_BUCKET_BYTES))
        self._buckets = [GradientBucket([self._parameters[i] for i in members]) for members in self._members]
        self._home = {i: (b, place) for b, members in enumerate(self._members) for place, i in enumerate(members)}
        self._used = [False] * len(self._parameters)  # since the last reduction
        self._reduced = [False] * len(self._parameters)  # whether grad is what a reduction gave, and nothing since
        self._reset()
        me, handles = weakref.ref(self), []
        for index, parameter in enumerate(self._parameters):
            ready = partial(_call, me, GradientReducer._ready, index)
            handles.append(parameter.register_post_accumulate_grad_hook(ready))  # type: ignore[no-untyped-call]
            if not mean:
                split = partial(_call, me, GradientReducer._split_sum, index)
                handles.append(parameter.register_hook(split))  # type: ignore[no-untyped-call]
        self.detach = weakref.finalize(self, _remove, handles)
        """Take the hooks away: nothing is reduced from then on."""
        self.detach.atexit = False

    def _reset(self) -> None:
        """The state between backward passes."""
        self._callback: weakref.ref[Callable[[], None]] | None = None
        self._came = 0  # gradients in this backward
        self._launched: list[dist.Work] = []
        for bucket in self._buckets:
            bucket.release()

    @property
    def running(self) -> bool:
        """Whether a backward has begun and not ended. One that raised has dropped its callback."""
        return self._callback is not None and self._callback() is not None

    def begin(self) -> None:
        """A backward pass is running whose gradients are to be reduced when it ends."""
        if self.active and not self.running:
            self._reset()
            callback = self._finish
            self._callback = weakref.ref(callback)
            after_backward(callback)

    def _split_sum(self, index: int, gradient: Tensor) -> None:
        """Before something is added to a sum over ranks: divide it among them, for all of it is summed again."""
        grad = self._parameters[index].grad
        if self._reduced[index] and grad is not None:
            with torch.no_grad():
                grad.mul_(self._scale_reduced)
        self._reduced[index] = False

    def _ready(self, index: int, parameter: Tensor) -> None:
        """The backward has added to this parameter's grad all that it will."""
        if torch.is_grad_enabled():
            raise RuntimeError("gradients that are part of a graph cannot be reduced: backward(create_graph=True)")
        self._used[index] = True
        self.begin()
        if not self.running:
            return
        self._came += 1
        if not self._overlap:
            return
        number, place = self._home[index]
        bucket = self._buckets[number]
        if bucket.filled(place):
            raise RuntimeError(
                f"a second gradient of {self._names[index]!r} came in one backward, when the first was on its way: a "
                "parameter used inside and outside of checkpoint(..., use_reentrant=True) needs overlap=False, or "
                "use_reentrant=False"
            )
        bucket.fill(place, self._scale)
        parameter.grad = None  # its memory is free; and nothing may be added to what is on its way
        # In order: on each rank other buckets may be full first, and collectives must meet.
        while len(self._launched) < len(self._buckets) and not self._buckets[len(self._launched)].missing:
            self._launch()

    def _launch(self) -> None:
        """Start to reduce the next bucket, which is full."""
        number = len(self._launched)
        names, flat = [self._names[i] for i in self._members[number]], self._buckets[number].flat
        assert flat is not None
        with annotate(f"gradients of {names[0]}" + (f" ... {names[-1]}" if len(names) > 1 else "")):
            work = dist.all_reduce(flat, group=self._group, async_op=True)
        assert work is not None
        self._launched.append(work)

    def _finish(self) -> None:
        """The backward is over: reduce what is left, and wait."""
        try:
            if self._came or self._find_unused:
                self._reduce()
        finally:
            self._reset()

    def _reduce(self) -> None:
        left_out: list[int] = []
        for number in range(len(self._launched), len(self._buckets)):
            bucket = self._buckets[number]
            for place, index in enumerate(self._members[number]):
                if bucket.filled(place):
                    continue
                # Gradients of earlier backward passes count, whether they were this rank's own or reduced already.
                bucket.fill(place, self._scale_reduced if self._reduced[index] else self._scale)
                if self._used[index]:
                    self._parameters[index].grad = None
                else:
                    left_out.append(index)
            self._launch()
            if not self._overlap:
                self._launched[-1].wait()
        if self._overlap:
            for work in self._launched:
                work.wait()
        unused = self._unused_anywhere(left_out)
        for index, parameter in enumerate(self._parameters):
            if index not in unused:
                number, place = self._home[index]
                parameter.grad = self._buckets[number].place(place)
        self._used = [False] * len(self._parameters)
        self._reduced = [True] * len(self._parameters)
        if left_out and not self._find_unused:
            names = [self._names[index] for index in sorted(left_out, reverse=True)]
            listed = ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            raise RuntimeError(
                f"rank {dist.get_rank(self._group)} computed no gradient for {listed}, and the other ranks' were "
                "reduced with zeros: freeze what does not learn, or pass find_unused_parameters=True"
            )

    def _unused_anywhere(self, left_out: Sequence[int]) -> set[int]:
        """Those left out here that no other rank has used either; none where leaving one out is an error anyway."""
        if not self._find_unused or not self._parameters:
            return set()
        used = torch.tensor(self._used, dtype=torch.uint8, device=self._parameters[0].device)
        with annotate("which parameters were used"):
            dist.all_reduce(used, dist.ReduceOp.MAX, self._group)
        if not left_out:
            return set()  # without reading the answer: on a GPU that waits
        anywhere = used.tolist()
        return {index for index in left_out if not anywhere[index]}


def _call(
    reducer: weakref.ref[GradientReducer],
    method: Callable[[GradientReducer, int, Tensor], None],
    index: int,
    tensor: Tensor,
) -> None:
    """A hook that does not keep the reducer alive."""
    owner = reducer()
    if owner is not None:
        method(owner, index, tensor)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
