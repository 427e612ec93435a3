"""Memory for the gradients of large parameters on a CPU, used again from step to step."""

import weakref

import torch
from torch import Tensor

LEAST_BYTES = 2**22


class GradientBuffers:
    """Hands out memory, and takes it back when the last tensor in it is gone.

    On a CPU, memory of many megabytes comes from the operating system anew for each tensor, which clears every page at
    its first touch. For an expert's gradient that is work of the order of the product of a hundred rows that fills it,
    and the stack of 64 experts is such a tensor in each step. So one buffer for each parameter is kept when an
    optimizer's ``zero_grad`` drops the gradient. A gradient that is still in somebody's hands is never touched: the
    memory comes back only when its storage is freed, and until then others get memory of their own.

    A copied or pickled object starts empty.
    """

    def __init__(self) -> None:
        self._free: dict[int, Tensor] = {}

    def __reduce__(self) -> tuple[type["GradientBuffers"], tuple[()]]:
        return GradientBuffers, ()

    def empty_like(self, number: int, parameter: Tensor) -> Tensor:
        """Uninitialised, contiguous, of the shape and type of the module's parameter ``number``."""
        if parameter.device.type != "cpu" or parameter.nbytes < LEAST_BYTES:
            return torch.empty_like(parameter, memory_format=torch.contiguous_format)
        memory = self._free.pop(number, None)
        if memory is None or memory.nbytes != parameter.nbytes:
            memory = torch.empty(parameter.nbytes, dtype=torch.uint8)
        lease = memoryview(memory.numpy())  # type: ignore[arg-type]  # one a tensor; dies with its storage
        weakref.finalize(lease, self._free.setdefault, number, memory).atexit = False
        return torch.frombuffer(lease, dtype=parameter.dtype).view(parameter.shape)
