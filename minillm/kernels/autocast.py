"""What autocast does to the operands of a matrix product: torch knows its own products only, not these operators."""

import torch
from torch import Tensor


def autocast_dtype(*operands: Tensor) -> torch.dtype | None:
    """The type to which all operands are to be brought, as ``F.linear`` does it; None: they stay as they are.

    They do where autocast is off or there is none for the device ("meta"), and where one of them is float64 or not
    floating point at all: autocast leaves these alone, and then the types differ or do not fit, which is for the
    operator to refuse.
    """
    device = operands[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    if any(not operand.is_floating_point() or operand.dtype is torch.float64 for operand in operands):
        return None
    return torch.get_autocast_dtype(device)
