"""How kernels that work on whole rows share them out: what a program holds at a time, and how many programs walk."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.kernels.runtime import row_block

_HELD = 1024  # numbers a program should hold at least: a row of a query's head alone would leave most threads idle
_PROGRAMS_A_MULTIPROCESSOR = 4


class RowTile(NamedTuple):
    """``rows`` times ``columns`` numbers, powers of two, and the warps that hold them."""

    rows: int
    columns: int
    warps: int


def row_tile(n_columns: int, *, largest: int = 16384) -> RowTile:
    """The tile for rows of ``n_columns``: several short rows, one row, or ``largest`` columns of a longer one."""
    columns, warps = row_block(n_columns, largest)
    rows = max(1, _HELD // columns)
    return RowTile(rows, columns, warps if rows == 1 else 4)


def walkers(n_tiles: int, device: torch.device) -> int:
    """Programs that together walk over ``n_tiles``, each keeping one sum: enough to fill the device, but no more."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return min(n_tiles, _PROGRAMS_A_MULTIPROCESSOR * multiprocessors)


def check_row_parameter(name: str, parameter: Tensor, x: Tensor) -> None:
    """Refuse all but a floating-point ``x`` (..., n) with n >= 1, and a floating-point ``parameter`` (n,)."""
    for argument, tensor in (("x", x), (name, parameter)):
        if not tensor.is_floating_point():
            raise TypeError(f"{argument} must be floating point, got {tensor.dtype}")
    if x.dim() == 0 or x.size(-1) == 0:
        raise ValueError(f"x must have a last dimension of at least 1, got shape {tuple(x.shape)}")
    if parameter.shape != x.shape[-1:]:
        raise ValueError(f"{name} must be ({x.size(-1)},) for x {tuple(x.shape)}, got shape {tuple(parameter.shape)}")


def check_eps(eps: float) -> None:
    """Refuse what cannot stand under the root."""
    if not isinstance(eps, int | float) or isinstance(eps, bool):
        raise TypeError(f"eps must be a number, got {eps!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number of at least 0, got {eps}")


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the statistics of a row of ``x`` are taken and kept: float32, and float64 for float64."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32
