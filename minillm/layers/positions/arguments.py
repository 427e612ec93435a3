"""What the position schemes refuse at their door, by name."""

import torch
from torch import Tensor


def check_whole_numbers(**values: int | None) -> None:
    """TypeError for lengths and the like that are fractions or booleans (a compiler's symbolic integers pass)."""
    for name, value in values.items():
        if isinstance(value, bool | float):
            raise TypeError(f"{name} must be a whole number, got {value!r}")


def check_integer_tensor(name: str, tensor: Tensor) -> None:
    """TypeError unless ``tensor`` holds integers."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool:
        raise TypeError(f"{name} must be integers, got {tensor.dtype}")
