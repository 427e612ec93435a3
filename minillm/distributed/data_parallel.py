"""Data parallelism: every rank holds the whole model and learns from its part of the batch; gradients are averaged.

The gradient of a sum over examples is the sum of the examples' gradients, so n ranks may compute it in n parts. Then
one all-reduce a step makes all ranks' gradients equal, and with equal weights and equal gradients every rank's
optimizer takes the same step. Each rank sends ``2 (n - 1) / n`` times the gradients' bytes (a ring).

Three ways to send the same bytes: a message a parameter, a message a bucket of parameters, and buckets that travel
while the backward pass still computes the gradients of earlier layers (:mod:`minillm.distributed.gradient_reducer`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minillm.distributed.gradient_reducer import GradientReducer
from minillm.distributed.labels import annotate
from minillm.distributed.owner import check_unclaimed, claim, release
from minillm.distributed.replicas import broadcast_from_first, check_replicas, state_buffers


class DataParallel(nn.Module):
    """The model, and after each ``backward()`` gradients that are the mean (or sum) of all ranks' gradients.

    Making one is a collective: it checks that all ranks bring the same model, and gives them the parameters and buffers
    of the group's first rank. Then call it as the model itself; ``.module`` is the model. NCCL on GPUs, gloo on a CPU.

    - **Accumulation**: a backward inside :meth:`no_sync` only adds to the rank's own gradients; the next one outside
      averages the whole of them. Gradients that are still there from an earlier, averaged backward stay averaged.
    - **Unused parameters**: a rank whose backward leaves a parameter out takes part in the reduction with zeros, so
      that nobody waits for it, and raises RuntimeError with the names; ``find_unused_parameters=True`` says that this
      is meant. A parameter that no rank used keeps what its ``grad`` was, as in DDP. That costs one byte a parameter
      more, and from the first bucket with such a parameter on, reduction waits for the end of the backward.
    - **Uneven batches**: a mean of means is not the mean. With ``reduction="sum"`` each rank divides its summed loss by
      the number of targets on *all* ranks (an all-reduce of the counts before the backward), and may have none itself.
    - **Buffers** of the state are sent from the first rank before a forward in training, once for each reduction;
      tables that are no part of the state (``persistent=False``) are each rank's own.
    - **Frozen parameters** are left out. Freezing or thawing one afterwards is refused at the next forward: call
      :meth:`unwrap` and wrap again, on all ranks.
    - **Names**: ``state_dict()`` and ``load_state_dict()`` are those of the model, without a prefix.
    - A deep copy holds a copy of the model, in the same group. Pickling is refused: a process group is no data.

    Each ``grad`` is a part of a bucket afterwards, and None while it is on its way. A backward under
    ``create_graph=True`` is refused; one that reaches no parameter (``torch.autograd.grad``) changes nothing, unless
    unused parameters are to be found.

    Args:
        model: with dense parameters that have values; not wrapped already.
        group: the ranks that share the batch; None is the default group.
        bucket_bytes: gradients are sent in buckets of about so many bytes, the last layers first, the first one at
            1 MiB so that it leaves early; None is naive: one all-reduce a parameter.
        overlap: send each bucket as soon as it is full, beside the backward; False: everything after it.
        reduction: "mean" over ranks or "sum". For the mean each rank divides before it sends, so that the sum stays in
            the range of half precision.
        find_unused_parameters, broadcast_buffers: see above.

    Raises:
        ValueError, TypeError: for a bad argument, or on every rank when models or settings differ between ranks.
        RuntimeError: without a process group.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        group: dist.ProcessGroup | None = None,
        bucket_bytes: int | None = 25 * 2**20,
        overlap: bool = True,
        reduction: Literal["mean", "sum"] = "mean",
        find_unused_parameters: bool = False,
        broadcast_buffers: bool = True,
    ) -> None:
        super().__init__()
        _check_arguments(model, group, bucket_bytes, reduction)
        self.module, self.group, self.broadcast_buffers = model, group, broadcast_buffers
        self._options: dict[str, Any] = {
            "bucket_bytes": bucket_bytes,
            "overlap": overlap,
            "mean": reduction == "mean",
            "find_unused": find_unused_parameters,
        }
        check_replicas(model, group, settings=f"DataParallel: {self._options | {'buffers': broadcast_buffers}}")
        buffers = state_buffers(model)
        self._buffer_names, self._buffers_due = list(buffers), True
        with annotate("the first rank's parameters and buffers"):
            broadcast_from_first([*model.parameters(), *buffers.values()], group)
        self._attach()

    def _attach(self) -> None:
        self._parameters_then = [(name, p, p.requires_grad) for name, p in self.module.named_parameters()]
        learned = {name: parameter for name, parameter, learns in self._parameters_then if learns}
        self._reducer = GradientReducer(learned, self.group, **self._options)
        claim(self.module.parameters(), self._reducer, "DataParallel")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives for these arguments."""
        if not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        changed = [name for name, parameter, learns in self._parameters_then if parameter.requires_grad is not learns]
        if changed:
            raise RuntimeError(
                f"parameters were frozen or thawed after DataParallel was made, and its buckets know nothing of it: "
                f"{', '.join(changed)}. On every rank: model = wrapped.unwrap(), then wrap it again"
            )
        if self.training and self.broadcast_buffers and not self._reducer.running:  # running: a checkpoint's recompute
            if self._buffers_due and self._buffer_names:
                with annotate("buffers"):
                    broadcast_from_first([self.module.get_buffer(name) for name in self._buffer_names], self.group)
            self._buffers_due = self._reducer.active
        output = self.module(*args, **kwargs)
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                # The outermost backward comes by here before any parameter; reentrant checkpoints run inner ones.
                tensor.register_hook(lambda _: self._reducer.begin())  # type: ignore[no-untyped-call]
        return output

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes that begin in here reduce nothing: their gradients add up on each rank."""
        before, self._reducer.active = self._reducer.active, False
        try:
            yield
        finally:
            self._reducer.active = before

    def unwrap(self) -> nn.Module:
        """The model without hooks, free to be wrapped again. This wrapper synchronises nothing from then on."""
        self._reducer.detach()
        release(parameter for _, parameter, _ in self._parameters_then)
        return self.module

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The model's; every rank loads the same. Raises ValueError for ``assign=True``: hooks hold the parameters."""
        if assign:
            raise ValueError("assign must be False: DataParallel's hooks are on the parameters that it was made with")
        return self.module.load_state_dict(state_dict, strict=strict)

    def __deepcopy__(self, memo: dict[int, Any]) -> DataParallel:
        new = DataParallel.__new__(DataParallel)
        nn.Module.__init__(new)
        memo[id(self)] = new
        new.module, new.group, new.broadcast_buffers = (
            copy.deepcopy(self.module, memo),
            self.group,
            self.broadcast_buffers,
        )
        new.training, new._options = self.training, self._options
        new._buffer_names, new._buffers_due = self._buffer_names, True
        new._attach()
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a DataParallel belongs to its process group and cannot be pickled: pickle .module instead")


def _tensors(output: Any) -> Iterator[Tensor]:
    """Those in what a model returned, through tuples, lists, mappings and dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, list | tuple | Mapping):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from _tensors(getattr(output, field.name))


def _check_arguments(
    model: nn.Module, group: dist.ProcessGroup | None, bucket_bytes: int | None, reduction: str
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not dist.is_initialized():
        raise RuntimeError("DataParallel needs a process group: dist.init_process_group under torchrun, or run_ranks")
    if dist.get_rank(group) < 0:
        raise ValueError("group must be one that this rank belongs to")
    if bucket_bytes is not None and (isinstance(bucket_bytes, bool) or not isinstance(bucket_bytes, int)):
        raise TypeError(f"bucket_bytes must be None or an int, got {bucket_bytes!r}")
    if bucket_bytes is not None and bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be None or at least 1, got {bucket_bytes}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    for name, module in model.named_modules():
        if isinstance(module, DataParallel | DistributedDataParallel):
            raise ValueError(f"model must not be wrapped already, got a {type(module).__name__} at {name!r}")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ValueError(f"model must have dense gradients, got sparse=True at {name!r}")
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter) or parameter.is_meta:
            raise ValueError(f"model must have values, got a parameter without: {name!r}")
    check_unclaimed(model)
