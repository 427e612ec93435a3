"""One bucket of ZeRO-Offload: 16-bit parameters on the device; master weights, moments and gradients on the host.

A bucket is a :class:`~minillm.distributed.zero_shards.FlatParameters` whose master copy has moved to the host. Its
gradients gather in one buffer on the device, which lives until it has been sent. The host's buffer for them serves
twice: the update reads each 16-bit gradient and writes the new 16-bit parameter to the same place, and from there it
goes back to the device. So the host needs 12 + 2 bytes a parameter and no room of its own for parameters.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minillm.distributed.offload_link import Copy, Link
from minillm.distributed.zero_shards import FlatParameters, Piece
from minillm.optim.cpu_adam import CPUAdam


class HostGradient:
    """The gradients of a bucket's part on the host, as they arrive; after the update the new parameters.

    Attributes:
        buffer: (part_size,) in the dtype of the gradients.
        used: for each parameter of the bucket, whether a gradient of it has come.
        holds: whether anything has come.
    """

    def __init__(self, link: Link, flat: FlatParameters) -> None:
        self.link, self.buffer = link, link.host_memory(flat.part_size, flat.dtype)
        self.used = [False] * len(flat.places)
        self._arriving: list[tuple[Copy, Tensor | None]] = []
        self.holds = False

    @property
    def held(self) -> list[Tensor]:
        """What is kept on the device until it has been copied."""
        return [tensor for arrival, _ in self._arriving for tensor in arrival.held]

    def receive(self, part: Tensor, keep: Tensor, name: str) -> None:
        """Begin to copy a part of a bucket to the host; what comes after the first is added to it there.

        Args:
            part: (part_size,) on the device.
            keep: what `part` is still being made of.
            name: for the timeline.
        """
        target = self.link.host_memory(part.numel(), part.dtype) if self.holds else self.buffer
        arrival = self.link.copy(target, part, "to host", name, keep=keep)
        self._arriving.append((arrival, target if self.holds else None))
        self.holds = True

    def let_go(self) -> None:
        """Give the device's memory of what was sent back: before the next bucket goes off."""
        if any(addend is not None for _, addend in self._arriving):
            self.settle()  # and the host's memory of what is added
        for arrival, _ in self._arriving:
            arrival.wait_on_device()

    def settle(self) -> None:
        """Wait until everything has come, and add up."""
        for arrival, addend in self._arriving:
            arrival.wait()
            if addend is not None:
                self.buffer.add_(addend)
        self._arriving.clear()

    def clear(self) -> None:
        """Forget the gradients."""
        self.settle()  # a late copy would otherwise fall on the next gradients
        self.used = [False] * len(self.used)
        self.holds = False


class OffloadBucket:
    """Some parameters that travel together.

    Attributes:
        master: (part_size,) this rank's part of the parameters on the host, in float32 (float64 where they are that).
        pieces: what this rank owns of each parameter, in order of the bucket's places.
        weights: for each of these the view of `master` that the optimizer updates.
        optimizer: the user's optimizer in small, over these weights.
        gradient: what the host has of the step that is under way.
        spare: a second one, while the update of the step before reads the first; None until it is needed.

    Args:
        flat: the parameters; its master copy moves to the host.
        optimizer: what to update them with; it is copied.
        scale: what each gradient is multiplied with: 1, or 1/n for the mean of n ranks.
    """

    def __init__(
        self, flat: FlatParameters, link: Link, optimizer: torch.optim.Optimizer, scale: float, name: str
    ) -> None:
        self.flat, self.link, self.scale, self.name = flat, link, scale, name
        dtype = torch.promote_types(flat.dtype, torch.float32)
        self.master = flat.master.detach().to("cpu", dtype, copy=True)
        flat.master, flat.segments = flat.shard, []  # the device's copy of it goes
        self.pieces: list[Piece] = flat.pieces()
        self.weights = [self.master[piece.in_part] for piece in self.pieces]
        self.optimizer = _twin(optimizer)
        self._group_numbers = sorted({piece.place.group for piece in self.pieces if piece.place.group is not None})
        self.optimizer.param_groups = [{"params": self._owned(number)} for number in self._group_numbers]
        self.set_hyperparameters(optimizer.param_groups)
        self.gradient = HostGradient(link, flat)
        self.spare: HostGradient | None = None
        self._filling: Tensor | None = None
        self._filled = [False] * len(self.pieces)

    def _owned(self, number: int) -> list[Tensor]:
        return [
            weight
            for piece, weight in zip(self.pieces, self.weights, strict=True)
            if piece.place.group == number and weight.numel()
        ]

    def set_hyperparameters(self, groups: Sequence[dict[str, Any]]) -> None:
        """Take the settings of the user's groups over; not while an update runs."""
        for own, number in zip(self.optimizer.param_groups, self._group_numbers, strict=True):
            for key, value in groups[number].items():
                if key != "params":
                    own[key] = value.clone() if isinstance(value, Tensor) else value

    def gradients_on_device(self) -> list[Tensor]:
        """The buffer that gradients gather in, and what is kept until it has been copied."""
        return [*self.gradient.held, *([] if self._filling is None else [self._filling])]

    def gradients_on_host(self) -> list[Tensor]:
        """The buffers of the step that is under way, and of the next."""
        return [self.gradient.buffer, *([] if self.spare is None else [self.spare.buffer])]

    def optimizer_state(self) -> list[Tensor]:
        """Master weights and what the optimizer has learnt about them, single numbers left out."""
        states = [value for weight in self.weights for value in self.optimizer.state.get(weight, {}).values()]
        return [self.master, *(value for value in states if isinstance(value, Tensor) and value.dim() > 0)]

    @property
    def complete(self) -> bool:
        """Whether every parameter has put its gradient into the buffer."""
        return all(self._filled)

    @property
    def started(self) -> bool:
        """Whether any has."""
        return any(self._filled)

    def take(self, index: int) -> None:
        """Move the `grad` of the parameter at this place to the buffer on the device."""
        place = self.pieces[index].place
        gradient = place.parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise TypeError(f"{place.name} has a sparse gradient, Offload needs dense ones")
        place.parameter.grad = None
        if self._filling is None:
            self._filling = torch.empty(self.flat.size, dtype=self.flat.dtype, device=self.flat.full.device)
        view = self._filling[place.start : place.stop].view(place.shape)
        if self._filled[index]:
            view.add_(gradient, alpha=self.scale)
        elif self.scale == 1.0:
            view.copy_(gradient)
        else:
            torch.mul(gradient, self.scale, out=view)
        self._filled[index] = self.gradient.used[index] = True

    def seal(self) -> Tensor:
        """(size,) the buffer, zeros where no gradient came; the next gradient opens another one."""
        buffer, self._filling = self._filling, None
        if buffer is None:
            buffer = torch.zeros(self.flat.size, dtype=self.flat.dtype, device=self.flat.full.device)
        else:
            empty = [
                slice(piece.place.start, piece.place.stop)
                for piece, filled in zip(self.pieces, self._filled, strict=True)
                if not filled
            ]
            for gap in (*self.flat.gaps(), *empty):
                buffer[gap] = 0
        self._filled = [False] * len(self._filled)
        return buffer

    def discard(self) -> None:
        """Forget what has gathered on the device, and what the host has."""
        self._filling, self._filled = None, [False] * len(self._filled)
        self.gradient.clear()

    def swap(self) -> HostGradient:
        """Give what has come away, and go on with the spare buffer."""
        given = self.gradient
        self.gradient = HostGradient(self.link, self.flat) if self.spare is None else self.spare
        self.spare = None
        return given

    @torch.no_grad()
    def update(self, gradient: HostGradient) -> None:
        """Update the weights that have a gradient; then the buffer holds all of the bucket's part, rounded."""
        gradient.settle()
        parts = {
            weight: gradient.buffer[piece.in_part]
            for piece, weight, used in zip(self.pieces, self.weights, gradient.used, strict=True)
            if used and weight.numel()
        }
        if isinstance(self.optimizer, CPUAdam):
            self.optimizer.step(gradients=parts, copies=parts)
        else:
            for weight, part in parts.items():
                weight.grad = part.to(weight.dtype)
            self.optimizer.step()
            for weight, part in parts.items():
                weight.grad = None
                part.copy_(weight)
        for piece, weight in zip(self.pieces, self.weights, strict=True):
            if weight not in parts:
                gradient.buffer[piece.in_part] = weight

    def upload(self, updated: HostGradient) -> Copy:
        """Begin to copy the new parameters to this rank's part on the device."""
        updated.used, updated.holds = [False] * len(updated.used), False
        return self.link.copy(self.flat.shard, updated.buffer, "to device", f"parameters of {self.name}")

    def rounded(self) -> HostGradient:
        """The parameters as an update leaves them for `upload`."""
        given = self.swap()
        given.buffer.copy_(self.master)
        return given


def _twin(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer of the same kind and settings, without parameters, state, hooks and schedules."""
    twin = copy.copy(optimizer)  # knows nothing but groups, state and defaults
    for name, value in vars(optimizer).items():
        if name != "step":  # which a schedule may have wrapped
            twin.__dict__.setdefault(name, value)
    twin.state, twin.param_groups = defaultdict(dict), []
    return twin
