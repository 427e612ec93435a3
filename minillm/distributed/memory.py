"""Where this rank's bytes are: live and peak memory of tensors, by what they hold.

A tensor's bytes are those of its storage, counted once however many views it has, from the operator that makes it to
the moment at which nothing refers to it. Counting is exact and needs no GPU: a `TorchDispatchMode` sees every operator,
a weak reference on the storage tells of its end. What a kernel borrows for itself while it runs is not seen.

Memory that code gives back by `storage.resize_(0)` (FSDP2's and ZeRO's gathered parameters) is seen to be gone: sizes
are read again before a peak is believed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# What a storage holds is the first of these that fits it, once it has fitted.
KINDS = ("parameters", "gradients", "optimizer state", "buffers", "activations", "other")
_RANK = {kind: place for place, kind in enumerate(KINDS)}


@runtime_checkable
class KnowsItsTensors(Protocol):
    """A model or an optimizer that keeps tensors where `measure_memory` would not look for them."""

    def tensors_by_kind(self) -> Mapping[str, Iterable[Tensor | None]]:
        """Tensors by kind, one of :data:`KINDS`: called often, so it should be quick."""


class Memory:
    """Bytes of this rank's tensors; it may be read while `measure_memory` goes on, and after.

    Every reading is a dict with a number of bytes for each of :data:`KINDS`.

    Attributes:
        peak_bytes: the most that there has been at one time.
        marks: what `mark` has written down.
    """

    def __init__(self, owners: _Owners, device: torch.device | None) -> None:
        self.peak_bytes = 0
        self.marks: dict[str, dict[str, int]] = {}
        self._owners, self._device = owners, device
        self._records: dict[int, _Record] = {}
        self._total = 0
        self._at_peak: list[tuple[_Record, int]] = []
        self._final: dict[str, int] | None = None
        self._in_backward = False
        self.reset_peak()

    @property
    def live(self) -> dict[str, int]:
        """Now; after the end of `measure_memory`, as it was there."""
        if self._final is not None:
            return dict(self._final)
        self._look(self._owners.all())
        self._read_sizes()
        return _by_kind((record, record.n_bytes) for record in self._records.values())

    @property
    def live_bytes(self) -> int:
        """Of all kinds together."""
        return sum(self.live.values())

    @property
    def peak(self) -> dict[str, int]:
        """What there was when there was most: it adds up to `peak_bytes`."""
        if self._final is None:
            self._look(self._owners.all())
        return _by_kind(self._at_peak)

    def mark(self, name: str) -> dict[str, int]:
        """Write down what there is now, under a name such as "after backward"."""
        self.marks[name] = self.live
        return dict(self.marks[name])

    def reset_peak(self) -> None:
        """Let the peak be what there is now."""
        self.peak_bytes = 0
        self._look(self._owners.all())
        self._read_sizes()
        self._may_be_peak()

    def __repr__(self) -> str:
        return f"Memory({self.live_bytes:,} bytes live, {self.peak_bytes:,} at the peak)"

    def _close(self) -> None:
        self._final = self.live
        self._records.clear()

    def _look(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Say of what kind the storages of these tensors are, also of those that were there before."""
        for kind, tensor in tensors:
            for plain in _plain(tensor):
                record = self._record(plain) or self._add(plain, kind)
                if record is not None and _RANK[kind] < _RANK[record.kind]:
                    record.kind = kind

    def _record(self, tensor: Tensor) -> _Record | None:
        record = self._records.get(id(tensor.untyped_storage()))
        return record if record is not None and record.storage() is not None else None

    def _add(self, tensor: Tensor, kind: str) -> _Record | None:
        if tensor.device.type == "meta" or (self._device is not None and tensor.device != self._device):
            return None
        storage = tensor.untyped_storage()
        key, records = id(storage), self._records

        def gone(_: Any) -> None:
            if records.get(key) is record:
                del records[key]
                self._total -= record.n_bytes

        record = _Record(kind, storage.nbytes(), weakref.ref(storage, gone))
        records[key] = record
        self._total += record.n_bytes
        return record

    def _read_sizes(self) -> None:
        for record in list(self._records.values()):
            self._read_size(record)

    def _read_size(self, record: _Record) -> None:
        storage = record.storage()
        if storage is not None and storage.nbytes() != record.n_bytes:
            self._total += storage.nbytes() - record.n_bytes
            record.n_bytes = storage.nbytes()

    def _may_be_peak(self) -> None:
        if self._total > self.peak_bytes:
            self._read_sizes()
        if self._total > self.peak_bytes:
            self._look(self._owners.passing())
            self.peak_bytes = self._total
            self._at_peak = [(record, record.n_bytes) for record in self._records.values()]

    def _before(self, inputs: list[Tensor]) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward or self._in_backward:
            self._look(self._owners.gradients())  # they may be gone soon after
        self._in_backward = in_backward
        before = self._total
        for tensor in inputs:
            record = self._record(tensor)
            if record is not None:
                self._read_size(record)
        if self._total > before:
            self._may_be_peak()

    def _after(self, inputs: list[Tensor], outputs: list[Tensor], recorded: bool) -> None:
        known = {id(tensor.untyped_storage()) for tensor in inputs}
        before = self._total
        for tensor in outputs:
            if id(tensor.untyped_storage()) in known:  # a view, or changed in place
                record = self._record(tensor)
                if record is not None:
                    self._read_size(record)
            elif self._record(tensor) is None:
                self._add(tensor, "activations" if recorded else "other")
        if self._total > before:
            self._may_be_peak()


@contextmanager
def measure_memory(
    model: nn.Module | None = None,
    optimizer: Any = None,
    *,
    device: torch.device | str | None = None,
) -> Iterator[Memory]:
    """Count the bytes of this rank's tensors while this is open, by what they hold.

        with measure_memory(model, optimizer) as memory:
            model(batch).sum().backward()
            memory.mark("after backward")
            optimizer.step()
        memory.peak, memory.marks

    Kinds:

        parameters        of `model`, in whatever dtype it computes
        gradients         `grad` of these, and of what the optimizer updates
        optimizer state   the optimizer's state, and what it updates beside the model's own parameters: the masters
        buffers           of `model`
        activations       what operators make that autograd records
        other             all else: inputs, what is made in backward and by the optimizer for a moment, buckets

    Tensors that were there before are counted if they belong to `model` or `optimizer`. Open it on the rank itself: on
    simulated ranks, each in its own thread, it counts the tensors of its own.

    Args:
        model: may be wrapped in whatever (DDP, FSDP2).
        optimizer: a `torch.optim.Optimizer`, or anything with `param_groups` and `state`. A model or an optimizer that
            keeps tensors elsewhere says so by a method `tensors_by_kind` (`KnowsItsTensors`).
        device: count only tensors there; None counts all.

    Yields:
        A :class:`Memory`.

    Raises:
        TypeError: `model` is no module.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module or None, got {type(model).__name__}")
    place = None if device is None else torch.empty(0, device=device).device  # "cuda" is the current one
    memory = Memory(_Owners(model, optimizer), place)
    try:
        with _Watch(memory):
            yield memory
    finally:
        memory._close()


class _Record:
    """One storage: of what kind it is, and how large."""

    __slots__ = ("kind", "n_bytes", "storage")

    def __init__(self, kind: str, n_bytes: int, storage: Callable[[], torch.UntypedStorage | None]) -> None:
        self.kind, self.n_bytes, self.storage = kind, n_bytes, storage


class _Owners:
    """The tensors of a model and an optimizer, by kind."""

    def __init__(self, model: nn.Module | None, optimizer: Any) -> None:
        self._model, self._optimizer = model, optimizer
        self._modules = [] if model is None else list(model.modules())
        self._telling = [owner for owner in (model, optimizer) if isinstance(owner, KnowsItsTensors)]

    def all(self) -> Iterator[tuple[str, Tensor]]:
        """Of a storage's kinds the first of `KINDS` counts: a model's parameter is no optimizer state."""
        yield from self.passing()
        for parameter in self._updated():
            yield "optimizer state", parameter
        for state in getattr(self._optimizer, "state", {}).values():
            for value in state.values() if isinstance(state, Mapping) else ():
                if isinstance(value, Tensor):
                    yield "optimizer state", value

    def passing(self) -> Iterator[tuple[str, Tensor]]:
        """Those that may change their place from one operator to the next."""
        for owner in self._telling:
            for kind, tensors in owner.tensors_by_kind().items():
                yield from ((kind, tensor) for tensor in tensors if tensor is not None)
        for module in self._modules:
            for parameter in module._parameters.values():
                if parameter is not None:
                    yield "parameters", parameter
            for buffer in module._buffers.values():
                if buffer is not None:
                    yield "buffers", buffer
        yield from self.gradients()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """`grad` of the model's parameters and of what the optimizer updates."""
        for module in self._modules:
            for parameter in module._parameters.values():
                if parameter is not None and parameter.grad is not None:
                    yield "gradients", parameter.grad
        for updated in self._updated():
            if updated.grad is not None:
                yield "gradients", updated.grad

    def _updated(self) -> Iterator[Tensor]:
        for group in getattr(self._optimizer, "param_groups", ()):
            yield from group["params"]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells a `Memory` of every operator."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = memory

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a DTensor then works on plain tensors, and under this mode
        kwargs = kwargs or {}
        # What torch.tensor(...) makes comes to light as the argument of this one.
        inputs = [] if func is torch.ops.aten.lift_fresh.default else _tensors((args, kwargs))
        self._memory._before(inputs)
        result = func(*args, **kwargs)
        recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        self._memory._after(inputs, _tensors(result), recorded)
        return result


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [tensor for value in values for tensor in _tensors(value)]


def _plain(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold the numbers of this one: of a DTensor, its local part."""
    if type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]  # of a DTensor also its mesh
    return [plain for part in parts if isinstance(part, Tensor) for plain in _plain(part)]


def _by_kind(records: Iterable[tuple[_Record, int]]) -> dict[str, int]:
    counts = dict.fromkeys(KINDS, 0)
    for record, n_bytes in records:
        counts[record.kind] += n_bytes
    return counts
