"""What `Offload` accepts."""

from __future__ import annotations

import torch
from torch import nn


def check_arguments(
    bucket_bytes: int,
    delay_after: int | None,
    reduction: str,
    parameter_dtype: torch.dtype | None,
    link_bandwidth: float,
    host_speed: float,
) -> None:
    """Raise a TypeError or ValueError for a setting that :class:`minillm.distributed.Offload` does not know."""
    counts = {"bucket_bytes": (bucket_bytes, 1)}
    if delay_after is not None:
        counts["delay_after"] = (delay_after, 0)
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    if parameter_dtype is not None and not parameter_dtype.is_floating_point:
        raise ValueError(f"parameter_dtype must be None or a floating dtype, got {parameter_dtype}")
    for name, speed in (("link_bandwidth", link_bandwidth), ("host_speed", host_speed)):
        if not speed > 0:
            raise ValueError(f"{name} must be above 0, got {speed!r}")


def groups_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, int]:
    """The number of the optimizer's group that each of its parameters is in.

    Raises:
        TypeError: these are no model and no optimizer.
        ValueError: the optimizer's parameters are not the model's trainable ones, there are none, or they are on
            several devices.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    names = {parameter: name for name, parameter in model.named_parameters()}
    group_of = {p: number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    strange = [tuple(parameter.shape) for parameter in group_of if parameter not in names]
    if strange:
        raise ValueError(f"optimizer must be over model.parameters(), it also has some of the shapes {strange}")
    missing = [name for p, name in names.items() if p.requires_grad and p not in group_of]
    if missing:
        raise ValueError(f"optimizer must have every trainable parameter; freeze or add {', '.join(missing)}")
    devices = {parameter.device for parameter in group_of if parameter.requires_grad}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "none that is trainable"
        raise ValueError(f"model must have trainable parameters on one device, got {found}")
    return group_of
