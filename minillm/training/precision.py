"""Where to compute, and in which number format.

bf16 autocast keeps the parameters, their gradients, the optimizer and every sum that needs it in float32 and computes
matrix products in bfloat16, which has float32's range and 8 bits of its mantissa: no loss scaling is needed.
Source: Micikevicius et al. 2017, "Mixed Precision Training"; Kalamkar et al. 2019, "A Study of BFLOAT16".
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
from collections.abc import Mapping

import torch


def resolve_device(name: str, n_ranks: int = 1) -> torch.device:
    """The device that a name stands for; "auto" is CUDA if there is one, else MPS, else the CPU.

    Several ranks cannot exchange tensors that are on MPS: for them "auto" is CUDA or the CPU.

    Raises:
        ValueError: not a device's name, a device that this machine (or this build of PyTorch) does not have, or MPS for
            several ranks.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if n_ranks == 1 and torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", name):  # and no other of PyTorch's: they are not tried
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda', 'cuda:<n>' or 'mps', got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count()
        raise ValueError(f"device {name!r} is not there: PyTorch {torch.__version__} sees {count} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device {name!r} is not there: PyTorch {torch.__version__} sees no MPS device")
    if device.type == "mps" and n_ranks > 1:
        raise ValueError(
            f"device 'mps' is for one process, and {n_ranks} ranks exchange tensors by gloo or NCCL, which do not take "
            "those of MPS: take device='cpu'"
        )
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """ "fp32" or "bf16" for "auto", "fp32" or "bf16" on a device.

    "auto" is bf16 on CUDA devices of capability 8.0 or more and on CPUs with AMX tiles for it, else fp32. AVX512-BF16
    alone does not pay: where it was measured, bfloat16 products ran at 0.6 of the speed of float32 ones.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if device.type == "cpu":
        # Older versions of PyTorch do not say: fp32 then.
        capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16" if capabilities.get("amx_bf16") else "fp32"
    return "fp32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context to run forward passes in."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def check_compiler(device: torch.device) -> None:
    """Say now, and not in the middle of the first step, that `torch.compile` cannot work here.

    Raises:
        RuntimeError: no C++ compiler (CPU), or no Triton (CUDA).
    """
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "c++", "g++", "clang++"))):
        raise RuntimeError("compile=True needs a C++ compiler (c++, g++ or clang++ on the PATH), and none was found")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise RuntimeError("compile=True on CUDA needs the triton package, and it is not installed")
