"""An optimizer over parts: each rank updates what it owns, and holds the optimizer's state for that alone.

This is stage 1 of ZeRO (Rajbhandari et al. 2020, section 5.1), "optimizer state partitioning". It is the same update
only for an optimizer that treats each number by itself, as SGD and the Adam family do: a part may begin in the middle
of a matrix. Whether a given optimizer is such a one is tried out on a small matrix, whole and in two parts.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minillm.distributed.zero_shards import FlatParameters

_SHAPE = (6, 8)  # of the matrix for the trial
_CUT = 19  # where it is cut: inside of a row


def elementwise_state(optimizer: torch.optim.Optimizer, dtype: torch.dtype, device: torch.device) -> frozenset[str]:
    """The names of the optimizer's state that hold a number for each number of a parameter ("exp_avg", ...).

    Args:
        optimizer: is left as it is: the trial runs in a copy with a learning rate of its own.
        dtype, device: of the parameters that it will update.

    Raises:
        ValueError: its update of a matrix is another one when that is cut in two, as with the trust ratio of LARS and
            LAMB, the factors of Adafactor or the orthogonal update of Muon; or it cannot update parts at all.
    """
    kind = type(optimizer).__name__
    names: set[str] = set()
    draw = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(_SHAPE, generator=draw, dtype=torch.float64).to(device, dtype) for _ in range(4))
    for group in optimizer.param_groups:
        try:
            (whole,), state = _trial(optimizer, group, [start], [[gradient] for gradient in gradients])
            pieces, _ = _trial(
                optimizer,
                group,
                [start.flatten()[:_CUT], start.flatten()[_CUT:]],
                [[gradient.flatten()[:_CUT], gradient.flatten()[_CUT:]] for gradient in gradients],
            )
        except Exception as error:
            raise ValueError(f"optimizer: {kind} cannot update parts of parameters: {error}") from error
        changed = (whole - start).abs().max()
        if (whole.flatten() - torch.cat(pieces)).abs().max() > 1e-3 * changed:
            raise ValueError(
                f"optimizer must be elementwise, but {kind} updates a matrix otherwise when it is cut into parts: it "
                "uses norms, rows or columns of whole parameters, which no rank has"
            )
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                if value.shape != start.shape:
                    raise ValueError(
                        f"optimizer: {kind} keeps {name!r} of shape {tuple(value.shape)} for a matrix {_SHAPE}; state "
                        "must have the parameter's shape or be a single number"
                    )
                names.add(name)
    return frozenset(names)


def _trial(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], starts: list[Tensor], gradients: list[list[Tensor]]
) -> tuple[list[Tensor], dict[str, Any]]:
    parameters = [nn.Parameter(start.clone()) for start in starts]
    trial = copy.copy(optimizer)  # without its hooks
    for name, value in vars(optimizer).items():
        trial.__dict__.setdefault(name, value)  # what a class of one's own keeps beside the groups
    trial.__dict__.pop("step", None)  # a learning rate schedule may have wrapped it
    trial.param_groups = [{**group, "params": parameters, "lr": 1e-2}]
    trial.state = defaultdict(dict)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        trial.step()
    return [parameter.detach() for parameter in parameters], dict(trial.state[parameters[0]])


@dataclass(frozen=True)
class ParameterState:
    """What an optimizer has learnt about one parameter.

    Attributes:
        single: the state that is not divided, by name ("step").
        divided: the names of the state that has a number for each number of the parameter ("exp_avg").
    """

    single: dict[str, Any]
    divided: tuple[str, ...]


class ShardedOptimizer:
    """The user's optimizer with this rank's segments in the place of its parameters.

    Attributes:
        optimizer: the user's own object, changed in place; schedules may go on to set its learning rates.
        elementwise: the names of its state that are divided.
        names: for each of its groups the names of the parameters that were in it, in order.

    Raises:
        ValueError: it holds a parameter that the model has not, lacks a trainable one, is not elementwise, or has a
            state that cannot be divided.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.group_of: dict[nn.Parameter, int] = {}
        self.names: list[list[str]] = []
        for number, group in enumerate(optimizer.param_groups):
            strange = [tuple(parameter.shape) for parameter in group["params"] if parameter not in names]
            if strange:
                raise ValueError(f"optimizer must be over model.parameters(), it also has some of the shapes {strange}")
            self.names.append([names[parameter] for parameter in group["params"]])
            self.group_of.update(dict.fromkeys(group["params"], number))
        missing = [name for p, name in names.items() if p.requires_grad and p not in self.group_of]
        if missing:
            raise ValueError(f"optimizer must have every trainable parameter; freeze or add {', '.join(missing)}")
        trainable = [parameter for parameter in self.group_of if parameter.requires_grad]
        if not trainable:
            raise ValueError("model must have a trainable parameter: every one is frozen, or there is none")
        dtype = trainable[0].dtype if trainable[0].dtype.itemsize >= 4 else torch.float32
        self.elementwise = elementwise_state(optimizer, dtype, trainable[0].device)

    def take(self, flats: Iterable[FlatParameters]) -> dict[str, dict[str, Any]]:
        """Put the segments in the parameters' place; what the optimizer has already learnt, by name of parameter."""
        by_group: list[list[nn.Parameter]] = [[] for _ in self.names]
        for flat in flats:
            for segment in flat.segments:
                by_group[segment.group].append(segment.parameter)
        learnt: dict[str, dict[str, Any]] = {}
        for group, names, segments in zip(self.optimizer.param_groups, self.names, by_group, strict=True):
            for name, parameter in zip(names, group["params"], strict=True):
                if self.optimizer.state.get(parameter):
                    learnt[name] = dict(self.optimizer.state[parameter])
            group["params"] = segments
        self.optimizer.state.clear()
        return learnt

    def describe(self, state: dict[str, Any]) -> ParameterState:
        """The same state, without the numbers that are divided."""
        divided = tuple(sorted(key for key in state if key in self.elementwise and state[key] is not None))
        return ParameterState({key: value for key, value in state.items() if key not in divided}, divided)

    def divide(self, flat: FlatParameters, learnt: dict[str, dict[str, Any]]) -> None:
        """Give a buffer's segments their part of what the optimizer knew about whole parameters."""
        states = {name: self.describe(state) for name, state in learnt.items()}
        self.fill(flat, states, lambda name, key, start, stop: learnt[name][key].reshape(-1)[start:stop])

    def fill(
        self,
        flat: FlatParameters,
        states: dict[str, ParameterState],
        piece: Callable[[str, str, int, int], Tensor],
    ) -> None:
        """Set the state of a buffer's segments.

        Args:
            states: by name of the parameter; one that is not in it has no state.
            piece: gives elements start to stop of a parameter's divided state: (parameter, name of state, start, stop).
                Called for every parameter and name in one order on all ranks, also for pieces of no elements.

        Raises:
            ValueError: parameters in one segment have taken different numbers of steps.
        """
        parts: dict[str, Tensor] = {}
        pieces = flat.pieces()
        for own in pieces:
            for key in states[own.place.name].divided if own.place.name in states else ():
                got = piece(own.place.name, key, own.start, own.stop)
                if got.numel() and key not in parts:
                    parts[key] = torch.zeros(flat.part_size, dtype=got.dtype, device=flat.full.device)
                if got.numel():
                    parts[key][own.in_part].copy_(got)
        for segment in flat.segments:
            group = self.optimizer.param_groups[segment.group]
            inside = [own for own in pieces if own.start < own.stop and own.place.group == segment.group]
            first, *others = [own.place.name for own in inside] or [""]
            for other in others:
                if not _same(states.get(first), states.get(other)):
                    raise ValueError(
                        f"the optimizer's state of {first} and {other} cannot be divided: they are neighbours in one "
                        f"buffer, and one has {states.get(first)}, the other {states.get(other)}"
                    )
            self.optimizer.state.pop(segment.parameter, None)
            if first in states:
                # Kernels that advance the step counts themselves want them on the parameters' device.
                device = flat.full.device if group.get("fused") or group.get("capturable") else "cpu"
                state = self.optimizer.state[segment.parameter]
                for key, value in states[first].single.items():
                    state[key] = value.to(device, copy=True) if isinstance(value, Tensor) else value
                state.update({key: parts[key][segment.in_part].clone() for key in states[first].divided})


def _same(one: ParameterState | None, other: ParameterState | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.divided != other.divided or one.single.keys() != other.single.keys():
        return False
    return all(bool(value == other.single[key]) for key, value in one.single.items())
