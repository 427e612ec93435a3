"""Devices, precisions and compilers: chosen by rule, refused by name."""

import shutil

import pytest
import torch

from minillm.training.precision import autocast, check_compiler, resolve_device, resolve_precision

CPU = torch.device("cpu")


def test_devices() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == (
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )
    for name in ("gpu", "xpu", "meta", "cpu:3", "cuda:", "cuda:-1", "cuda:99999999999999999999", "CPU", ""):
        with pytest.raises(ValueError, match=f"device must be .*'{name}'"):
            resolve_device(name)
    with pytest.raises(ValueError, match="'cuda:77' is not there"):
        resolve_device("cuda:77")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has an MPS device")
def test_a_missing_mps_device() -> None:
    with pytest.raises(ValueError, match="'mps' is not there"):
        resolve_device("mps")


def test_ranks_do_not_meet_on_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Mac's: neither gloo nor NCCL takes its tensors."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto", n_ranks=1).type == resolve_device("mps").type == "mps"
    assert resolve_device("auto", n_ranks=2) == CPU
    with pytest.raises(ValueError, match=r"device 'mps' is for one process, .* 2 ranks .*: take device='cpu'"):
        resolve_device("mps", n_ranks=2)


@pytest.mark.parametrize(("capabilities", "expected"), [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "fp32")])
def test_auto_on_a_cpu(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("fp32", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_on_cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision("auto", torch.device("cuda")) == expected


def test_autocast() -> None:
    matrix = torch.ones(2, 2)
    with autocast("bf16", CPU):
        assert (matrix @ matrix).dtype == torch.bfloat16
    with autocast("fp32", CPU):
        assert (matrix @ matrix).dtype == torch.float32


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler"):
        check_compiler(CPU)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    check_compiler(CPU)


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton"):
        check_compiler(torch.device("cuda"))
