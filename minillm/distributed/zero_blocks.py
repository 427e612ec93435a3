"""Stage 3: the parameters of a block are there while it works, and nowhere else.

Hooks gather a block's parameters before its forward and before its backward and free them afterwards (Rajbhandari et
al. 2020, section 5.3; Zhao et al. 2023, "PyTorch FSDP", section 3.2)::

    forward:   gather 0 | compute 0, gather 1 | free 0, compute 1, gather 2 | ...
    backward:  gather n | compute n, gather n-1 | free n, send its gradients off, compute n-1, ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minillm.distributed.labels import annotate
from minillm.distributed.zero_gradients import GradientDivider
from minillm.distributed.zero_units import Unit


class _Order:
    """The order in which blocks were gathered in the last pass: what is likely to come after a block in this one."""

    def __init__(self, expected: Sequence[Unit] = ()) -> None:
        self.last = list(expected)
        self.now: list[Unit] = []

    def begin(self) -> None:
        if self.now:
            self.last, self.now = self.now, []

    def visit(self, unit: Unit) -> Unit | None:
        place = len(self.now)
        self.now.append(unit)
        if place + 1 < len(self.last) and self.last[place] is unit:
            return self.last[place + 1]
        return None


@dataclasses.dataclass
class _Call:
    """One forward of a block, and how far its backward has come: in which pass it was begun last, and ended."""

    unit: Unit
    started: int = 0
    ended: int = 0


class BlockGatherer:
    """Gathers and frees the units' parameters, from hooks on their modules.

    What a block's parameters are used for must lie in its forward: the root unit, which is first, is there for the
    whole of the model's. Recomputed blocks (activation checkpointing) find their parameters gathered for backward.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        reducer: GradientDivider,
        *,
        reshard_after_forward: bool,
        prefetch: bool,
    ) -> None:
        self._units, self._reducer = list(units), reducer
        self._reshard, self._prefetch = reshard_after_forward, prefetch
        self._forward, self._backward = _Order(), _Order()
        self._coming: dict[int, list[tuple[Any, Any]]] = {}  # by id of the unit: the handle of each buffer's gather
        self._running = {id(unit): 0 for unit in units}  # calls whose backward has begun and not ended
        self._call: dict[int, _Call] = {}
        self._held = False
        self._guarded = True
        reducer.at_end = self._end_backward
        root = self._units[0]
        for unit in self._units:
            begin = self._begin_model if unit is root else self._before_forward
            unit.module.register_forward_pre_hook(partial(begin, unit), with_kwargs=True)
            unit.module.register_forward_hook(partial(self._after_forward, unit))
        self._guard(model)

    def _guard(self, model: nn.Module) -> None:
        """Refuse, in words, what would find freed parameters."""
        names = {parameter: name for name, parameter in model.named_parameters()}
        owner = {place.parameter: unit for unit in self._units for flat in unit.flats for place in flat.places}

        def check_forward(units: list[Unit], name: str, _: nn.Module, __: Any) -> None:
            for unit in units:
                if not all(flat.is_full for flat in unit.flats):
                    raise RuntimeError(
                        f"the parameters of {name or 'the model'} are freed (stage 3): they are there in the forward "
                        f"of {unit.name}, and in `with zero.gathered():`"
                    )

        def check_state(module: nn.Module, *_: Any) -> None:
            for parameter in module.parameters():
                if self._guarded and parameter in owner and not all(flat.is_full for flat in owner[parameter].flats):
                    raise RuntimeError(
                        f"{names[parameter]} is freed (stage 3), the module's own state has nothing to hold: use "
                        "zero.state_dict() and zero.load_state_dict(), or `with zero.gathered():`"
                    )

        for name, module in model.named_modules():
            own = {id(owner[p]): owner[p] for p in module.parameters(recurse=False) if p in owner}
            if own:
                module.register_forward_pre_hook(partial(check_forward, list(own.values()), name))
            module.register_state_dict_pre_hook(check_state)
            module.register_load_state_dict_pre_hook(check_state)

    @contextmanager
    def unguarded(self) -> Iterator[None]:
        """In here `model.state_dict()` is not refused: for the names of what is freed, not for its numbers."""
        self._guarded = False
        try:
            yield
        finally:
            self._guarded = True

    # -- gathering and freeing

    def _start(self, unit: Unit) -> None:
        if id(unit) not in self._coming:
            with annotate(f"parameters of {unit.name}"):
                missing = [flat for flat in unit.flats if not flat.is_full]
                self._coming[id(unit)] = [(flat, flat.start_gather()) for flat in missing]

    def _gather(self, unit: Unit, following: Unit | None = None) -> None:
        self._start(unit)
        if following is not None and self._prefetch:
            self._start(following)
        for flat, handle in self._coming.pop(id(unit)):
            handle.wait()
            flat.gathered()

    def _free(self, unit: Unit) -> None:
        if not self._held and not self._running[id(unit)]:
            for _, handle in self._coming.pop(id(unit), ()):
                handle.wait()
            for flat in unit.flats:
                flat.free()

    def free_all(self) -> None:
        """Free what a forward without a backward has left, or a wrong guess of what comes next has fetched."""
        if self._held:
            raise RuntimeError("the parameters are held by `with zero.gathered():`: leave that before this")
        self._running = dict.fromkeys(self._running, 0)
        for unit in self._units:
            self._free(unit)

    def hold_all(self) -> None:
        """Gather every unit, and free none until :meth:`release_all`."""
        if self._held:
            raise RuntimeError("zero.gathered() must not be entered twice")
        for unit in self._units:
            self._gather(unit)
        self._held = True

    def release_all(self) -> None:
        """Free every unit again."""
        self._held = False
        for unit in self._units:
            self._free(unit)

    # -- hooks

    def _begin_model(self, unit: Unit, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._reducer.in_backward:
            self._forward.begin()
        self._before_forward(unit, module, args, kwargs)

    def _before_forward(self, unit: Unit, _: nn.Module, args: Any, kwargs: Any) -> None:
        again = self._reducer.in_backward  # checkpointing runs a forward in backward, whose order is another one
        self._gather(unit, None if again else self._forward.visit(unit))
        call = self._call[id(unit)] = _Call(unit)
        if torch.is_grad_enabled() and unit is not self._units[0]:
            for tensor in _tensors_in((args, kwargs)):
                if tensor.requires_grad and not tensor.is_leaf:
                    # Autograd does what was computed last first: this gradient is next when nothing of the block is
                    # left to do. A leaf's comes as soon as it is whole, whatever the block has still to do.
                    tensor.register_hook(partial(self._after_backward, call))  # type: ignore[no-untyped-call]

    def _after_forward(self, unit: Unit, _: nn.Module, __: Any, output: Any) -> None:
        call = self._call[id(unit)]
        if torch.is_grad_enabled():
            for tensor in _tensors_in(output):
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._before_backward, call))  # type: ignore[no-untyped-call]
        # In a backward pass the block has been run for that: its parameters are needed at once.
        if (self._reshard or not torch.is_grad_enabled()) and not self._reducer.in_backward:
            self._free(unit)

    def _before_backward(self, call: _Call, _: Tensor) -> None:
        if not self._reducer.in_backward:
            self._backward.begin()
            if not self._backward.last:
                root, *blocks = self._forward.now
                self._backward.last = [root, *reversed(blocks)]
            self._reducer.begin()
        if call.started == self._reducer.passes:
            return
        call.started = self._reducer.passes  # a graph that is retained may come by here in several passes
        self._running[id(call.unit)] += 1
        self._gather(call.unit, self._backward.visit(call.unit))

    def _after_backward(self, call: _Call, _: Tensor) -> None:
        if call.started == self._reducer.passes and call.ended != self._reducer.passes:
            call.ended = self._reducer.passes
            self._running[id(call.unit)] -= 1
            self._release(call.unit)

    def _release(self, unit: Unit) -> None:
        self._free(unit)
        for gradients in unit.gradients:
            if gradients.holds_own:
                self._reducer.launch(gradients)

    def _end_backward(self) -> None:
        self._running = dict.fromkeys(self._running, 0)
        for unit in self._units:
            self._free(unit)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for element in value:
            yield from _tensors_in(element)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors_in([getattr(value, field.name) for field in dataclasses.fields(value)])
