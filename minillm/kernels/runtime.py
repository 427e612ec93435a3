"""Which code computes a call, and how a Triton kernel is started: the one place where both are decided.

Every operator of :mod:`minillm.kernels` exists up to three times: as Triton kernels, as torch's own operator, and as a
reference in plain torch that is there to be read. :func:`choose_backend` chooses.
"""

import importlib.util
import math
import os
import sys
import threading
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backend = Literal["auto", "triton", "torch", "reference"]
Chosen = Literal["triton", "torch", "reference"]

OLDEST_CAPABILITY = (8, 0)  # Ampere: what Triton supports, and the first with bfloat16
_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETER = threading.Lock()  # the interpreter keeps the place of the running program in one object


def choose_backend(
    backend: Backend, *tensors: Tensor, triton_refuses: str | None = None, torch_refuses: str | None = None
) -> Chosen:
    """The dispatch rule of all operators.

    - A backend that is named is obeyed, or refused with the reason; never silently replaced.
    - "auto" takes Triton for tensors on a CUDA device, where Triton can be used and the kernels take the call; else
      torch's own operator, where it computes the same; else the reference. It never takes Triton's interpreter: that is
      for looking at a kernel, some thousand times slower than the reference.

    Args:
        tensors: what the call computes with; all on one device.
        triton_refuses, torch_refuses: why that backend cannot do this very call; None if it can. For example "head_dim
            must be at most 256, got 512".

    Raises ValueError for an unknown backend, tensors on different devices, and a named backend that cannot be used.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices))) or 'none'}")
    if backend == "reference":
        return "reference"
    if backend == "torch":
        if torch_refuses is not None:
            raise ValueError(f"backend='torch' cannot be used: {torch_refuses}")
        return "torch"
    (device,) = devices
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):  # type: ignore[no-untyped-call]
        # torch would take their tangents for zeros, and say nothing
        triton_refuses = triton_refuses or "the kernels have no forward-mode derivative"
    if backend == "triton":
        problem = triton_refuses or triton_problem(device)
        if problem is not None:
            raise ValueError(f"backend='triton' cannot be used: {problem}")
        return "triton"
    if device.type == "cuda" and triton_refuses is None and triton_problem(device) is None and not interpreted():
        return "triton"
    return "torch" if torch_refuses is None else "reference"


def triton_problem(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of this device, in words; None if they can."""
    if device.type not in ("cpu", "cuda"):
        return f"there is no Triton for tensors on {device.type!r}"
    if not _INSTALLED:
        return "Triton is not installed (it has wheels for Linux only: pip install triton)"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = (properties.major, properties.minor)
        if capability >= OLDEST_CAPABILITY:
            return None
        return f"the kernels need compute capability {OLDEST_CAPABILITY} (Ampere) or newer, {device} has {capability}"
    if interpreted():
        return None
    if "triton" in sys.modules:
        return (
            "tensors on a CPU need Triton's interpreter, and Triton was imported without it: restart Python with "
            "TRITON_INTERPRET=1 in the environment"
        )
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y"):
        return None
    return "tensors on a CPU need Triton's interpreter: TRITON_INTERPRET=1 must be set before Triton is imported"


def interpreted() -> bool:
    """Whether Triton, if it is there and imported, interprets kernels instead of compiling them.

    It decides that once, when it is imported: its own functions are then of another type.
    """
    language = sys.modules.get("triton.language")
    return language is not None and type(language.sum).__name__ == "InterpretedFunction"


def compute_capability(device: torch.device) -> int:
    """90 for a GPU of compute capability 9.0, and so on; 0 where kernels are interpreted. Tile sizes depend on it.

    To be called as ``runtime.compute_capability``: where launches are recorded for a GPU that is not there, that name
    stands for another function (:func:`minillm.kernels.compile_only.recorded_launches`).
    """
    if interpreted():
        return 0
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor


def upcast(dtype: torch.dtype) -> bool:
    """Whether a kernel has to bring this dtype to float32 before it calculates with it or multiplies matrices of it.

    The interpreter calculates on the bits of bfloat16 as if they were integers.
    """
    return dtype is torch.bfloat16 and interpreted()


def wide(dtype: torch.dtype) -> Any:
    """Triton's name for the dtype that kernels calculate in: float32, and float64 for float64."""
    import triton.language as tl

    return tl.float64 if dtype is torch.float64 else tl.float32


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)`` on the device of the first tensor; an empty grid starts nothing."""
    if 0 in grid:
        return
    if interpreted():
        with _INTERPRETER:
            kernel[grid](*args, **constants)
        return
    device = next(argument.device for argument in args if isinstance(argument, Tensor))
    with torch.cuda.device(device):
        kernel[grid](*args, **constants)


def as_rows(x: Tensor) -> Tensor:
    """``x`` (..., n_columns) as (n_rows, n_columns) with neighbouring columns side by side in memory.

    A view where the strides allow it, otherwise a copy.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.size(-1))
    return rows if rows.stride(1) == 1 else rows.contiguous()


def row_block(n_columns: int, largest: int = 16384) -> tuple[int, int]:
    """Columns that a program holds of one row at a time, a power of two up to ``largest``, and its warps."""
    block = min(largest, max(16, 1 << (n_columns - 1).bit_length()))
    return block, min(16, max(1, block // 512))
