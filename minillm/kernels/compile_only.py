"""Compile kernels for a GPU that is not there, and look at what came out.

The interpreter accepts kernels that the compiler refuses, and says nothing of shared memory, registers and tensor
cores. Compiling needs no GPU: :func:`recorded_launches` writes down which kernels an operator would start and with
what, and :func:`compile_only` compiles exactly these, in a process of its own: in one process Triton either interprets
or compiles.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from minillm.kernels import runtime

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}  # bytes that a block may have, by capability

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One start of a kernel, as the compiler would see it.

    capability: of the GPU it is meant for: 80, 86, 89, 90 ... kernel: "module:function". grid: programs along each
    axis. signature: type by argument, such as "*bf16" or "i32"; divisible: the arguments that the compiler may take for
    multiples of 16 (addresses in bytes). constants: values by argument, a Triton dtype as {"dtype": name}. options:
    num_warps, num_stages and the like.
    """

    capability: int
    kernel: str
    grid: tuple[int, ...]
    signature: dict[str, str]
    divisible: tuple[str, ...]
    constants: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch for a GPU of that capability.

    shared: bytes of shared memory a block; registers, and spilled bytes, a thread; ptx: the program.
    """

    capability: int
    kernel: str
    shared: int
    registers: int
    spilled: int
    ptx: str

    def count(self, instruction: str) -> int:
        """How often an instruction, such as "wgmma.mma_async", "mma.sync" or "cp.async", stands in the PTX."""
        return len(re.findall(rf"\b{re.escape(instruction)}", self.ptx))


@contextmanager
def recorded_launches(capability: int) -> Iterator[list[Launch]]:
    """A list that gets every launch in this block, with the tile sizes for a GPU of that compute capability.

    Nothing is run, so results are whatever memory held. Inside, the tensors may be of any size (``torch.empty``), on a
    CPU, forward and backward.
    """
    import triton.runtime.jit as jit

    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...]) -> Any:
        return lambda *args, **keywords: launches.append(_launch(capability, kernel, grid, args, keywords))

    with (
        mock.patch.object(jit.KernelInterface, "__getitem__", record),
        mock.patch.object(runtime, "compute_capability", return_value=capability),
    ):
        yield launches


def _launch(
    capability: int, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], keywords: dict[str, Any]
) -> Launch:
    names = list(kernel.arg_names)
    values = dict(zip(names, args, strict=False))
    values.update({name: value for name, value in keywords.items() if name in names})
    options = {name: value for name, value in keywords.items() if name not in names}
    annotations = kernel.fn.__annotations__
    signature, divisible, constants = {}, [], {}
    for name in names:
        value = values[name]
        if "constexpr" in str(annotations.get(name, "")):
            constants[name] = {"dtype": str(value)} if type(value).__name__ == "dtype" else value
        elif isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                divisible.append(name)
        elif value is None or (isinstance(value, int) and value == 1):  # the compiler makes these constants too
            constants[name] = value
        elif isinstance(value, int):
            signature[name] = "i1" if isinstance(value, bool) else "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
        else:
            signature[name] = "fp32"
    if "UPCAST" in constants:  # what only the interpreter needs
        constants["UPCAST"] = False
    module = f"{kernel.fn.__module__}:{kernel.fn.__name__}"
    return Launch(capability, module, tuple(grid), signature, tuple(divisible), constants, options)


def compile_only(launches: Iterable[Launch]) -> list[Compiled]:
    """Compile each launch for the GPU it is meant for: one process for all of them, no GPU needed.

    Raises RuntimeError with the compiler's last words if one cannot be compiled.
    """
    launches = list(launches)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        done = subprocess.run(
            [sys.executable, "-m", "minillm.kernels.compile_only"],
            input=json.dumps([asdict(launch) for launch in launches]),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(f"compiling failed:\n{done.stderr[-3000:]}")
    return [Compiled(**compiled) for compiled in json.loads(done.stdout.splitlines()[-1])]


def _compile(launch: Launch) -> Compiled:
    import importlib

    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = launch.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    constants = {
        name: tl.dtype(value["dtype"]) if isinstance(value, dict) else value for name, value in launch.constants.items()
    }
    signature = {name: launch.signature.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", launch.capability, 32),
        options=launch.options,
    )
    registers, stack = _resources(compiled.asm["cubin"])
    return Compiled(launch.capability, launch.kernel, compiled.metadata.shared, registers, stack, compiled.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of its stack: what did not fit into registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    return max(int(registers) for registers, _ in usage), max(int(stack) for _, stack in usage)


@lru_cache
def _cuobjdump() -> str:
    import triton

    path: str = triton.knobs.nvidia.cuobjdump.path
    return path


if __name__ == "__main__":
    results = [_compile(Launch(**launch)) for launch in json.load(sys.stdin)]
    print(json.dumps([asdict(compiled) for compiled in results]))
