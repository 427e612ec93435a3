"""Which parameters travel together: blocks of the model in stage 3, buckets of gradients in stages 1 and 2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minillm.distributed.zero_gradients import FlatGradients
from minillm.distributed.zero_mics import Ranks
from minillm.distributed.zero_shards import FlatParameters, Member


@dataclass
class Unit:
    """Parameters that travel together.

    Attributes:
        name: the block's, or that of the bucket's first parameter.
        module: in stage 3 the block, or the model for what is in no block.
        flats: their buffers, one for each dtype, device and `requires_grad`.
        gradients: of the trainable ones among these.
    """

    name: str
    module: nn.Module
    flats: list[FlatParameters]
    gradients: list[FlatGradients] = field(default_factory=list)


def blocks_of(model: nn.Module, blocks: Iterable[nn.Module] | None) -> list[nn.Module]:
    """The modules whose parameters are gathered one at a time; None: the elements of the outermost `nn.ModuleList`s.

    Raises:
        TypeError, ValueError: something that is not a module inside of the model, or that holds another one of them.
    """
    if blocks is None:
        found: list[nn.Module] = []
        inside: set[nn.Module] = set()
        for module in model.modules():
            if isinstance(module, nn.ModuleList) and module not in inside:
                for element in module:
                    if isinstance(element, nn.ModuleList):
                        continue  # it has no forward of its own, its elements have
                    if element not in found:
                        found.append(element)
                    inside.update(element.modules())
        return found
    chosen = list(dict.fromkeys(blocks))
    for block in chosen:
        if not isinstance(block, nn.Module):
            raise TypeError(f"blocks must be modules, got {type(block).__name__}")
        if block is model or block not in set(model.modules()):
            raise ValueError(f"blocks must be modules inside of the model, got {type(block).__name__}, which is not")
        nested = [other for other in chosen if other is not block and other in set(block.modules())]
        if nested:
            raise ValueError(f"blocks must not lie in each other: a {type(nested[0]).__name__} is in a block")
    return chosen


def cast_inputs(modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Have the floating-point inputs of these modules cast to `dtype` before each forward."""

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, dict):
            return {key: cast(element) for key, element in value.items()}
        if type(value) in (list, tuple):
            return type(value)(cast(element) for element in value)
        return value

    def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return cast(args), cast(kwargs)

    for module in modules:
        module.register_forward_pre_hook(hook, with_kwargs=True)


def units_of(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    group_of: Mapping[nn.Parameter, int],
    ranks: Ranks,
    *,
    dtype: torch.dtype | None,
    bucket_bytes: int | None,
) -> list[Unit]:
    """Divide the model's floating-point parameters.

    Args:
        group_of: the optimizer's group of each of its parameters.
        dtype: of computing; None is each parameter's own.
        bucket_bytes: None divides by blocks, the model itself first, and frees the buffers; else the trainable
            parameters are put into buckets of about that size, the last of the model first, since backward begins
            there, and frozen ones are left in every rank.
    """

    def member(name: str, parameter: nn.Parameter) -> Member:
        return Member(name, parameter, group_of.get(parameter) if parameter.requires_grad else None)

    members = [member(name, parameter) for name, parameter in model.named_parameters() if _divisible(parameter)]
    if bucket_bytes is None:
        owners: dict[nn.Parameter, list[int]] = {}
        for number, block in enumerate(blocks, start=1):
            for parameter in block.parameters():
                owners.setdefault(parameter, []).append(number)
        shares: list[list[Member]] = [[] for _ in range(len(blocks) + 1)]
        for found in members:
            owner = owners.get(found.parameter, [])
            shares[owner[0] if len(owner) == 1 else 0].append(found)
        names = {module: name for name, module in model.named_modules()}
        modules = [model, *blocks]
        return [
            Unit(names[module] or "the model", module, _flats(share, ranks, dtype, freed=True))
            for module, share in zip(modules, shares, strict=True)
            if share or module is model
        ]
    buckets: list[list[Member]] = []
    room = 0
    for found in reversed(members):
        if found.group is None:
            if dtype is not None:
                found.parameter.data = found.parameter.data.to(dtype)
            continue
        size = found.parameter.numel() * (dtype or found.parameter.dtype).itemsize
        if not buckets or room < size or _kind(buckets[-1][0]) != _kind(found):
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(found)
        room -= size
    return [Unit(bucket[-1].name, model, _flats(bucket, ranks, dtype, freed=False)) for bucket in buckets]


def _divisible(parameter: nn.Parameter) -> bool:
    # Whole numbers, such as quantized weights, have no NaN to show while they are freed: every rank keeps them.
    return parameter.dtype.is_floating_point


def _kind(member: Member) -> tuple[torch.dtype, torch.device, bool]:
    return member.parameter.dtype, member.parameter.device, member.parameter.requires_grad


def _flats(members: Sequence[Member], ranks: Ranks, dtype: torch.dtype | None, *, freed: bool) -> list[FlatParameters]:
    kinds: dict[tuple[torch.dtype, torch.device, bool], list[Member]] = {}
    for member in members:
        kinds.setdefault(_kind(member), []).append(member)
    return [
        FlatParameters(sorted(share, key=lambda member: member.group or 0), ranks, dtype or kind[0], freed=freed)
        for kind, share in kinds.items()
    ]
