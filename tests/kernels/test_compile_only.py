"""Compiling without a GPU: what is recorded is what the launch said, and limits and instructions are seen."""

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch

from minillm.kernels.compile_only import Launch, compile_only, recorded_launches

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, which has wheels for Linux only", allow_module_level=True)

import triton
import triton.language as tl

PRODUCT = """
import triton
import triton.language as tl

@triton.jit
def product(a_ptr, b_ptr, c_ptr, stride, scale, missing, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a = tl.load(a_ptr + rows * stride + columns)
    b = tl.load(b_ptr + rows * stride + columns)
    tl.store(c_ptr + rows * SIZE + columns, (scale * tl.dot(a, b)).to(DTYPE))
"""


@pytest.fixture
def launches(tmp_path, monkeypatch):
    """A product of two tiles of 64 and of 256, float16, recorded from an ordinary launch."""
    (tmp_path / "a_kernel_to_compile.py").write_text(PRODUCT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import a_kernel_to_compile

    with recorded_launches(90) as launches:
        for size in (64, 256):
            half = torch.empty(size, size, dtype=torch.float16)
            a_kernel_to_compile.product[(1, 2)](
                half, half, half, size, 0.5, None, DTYPE=tl.float16, SIZE=size, num_warps=8, num_stages=2
            )
    yield launches
    sys.modules.pop("a_kernel_to_compile")


def test_launches_are_recorded_as_the_compiler_sees_them(launches: list[Launch]) -> None:
    assert launches[0] == Launch(
        capability=90,
        kernel="a_kernel_to_compile:product",
        grid=(1, 2),
        signature={"a_ptr": "*fp16", "b_ptr": "*fp16", "c_ptr": "*fp16", "stride": "i32", "scale": "fp32"},
        divisible=("a_ptr", "b_ptr", "c_ptr", "stride"),
        constants={"missing": None, "DTYPE": {"dtype": "fp16"}, "SIZE": 64},
        options={"num_warps": 8, "num_stages": 2},
    )


def test_tensor_cores_are_seen(launches: list[Launch]) -> None:
    ampere, hopper = compile_only([replace(launches[0], capability=80), launches[0]])
    assert (ampere.capability, hopper.capability) == (80, 90)
    assert ampere.count("mma.sync") > 0
    assert ampere.count("wgmma.mma_async") == 0
    assert hopper.count("wgmma.mma_async") > 0
    assert 0 < hopper.registers <= 255
    assert ampere.spilled == hopper.spilled == 0
    assert hopper.shared >= 2 * 64 * 64 * 2  # both operands stand in shared memory


def test_too_much_shared_memory_and_spills_are_seen(launches: list[Launch]) -> None:
    (compiled,) = compile_only(launches[1:])
    assert compiled.shared > 232_448 or compiled.spilled > 0


def test_what_cannot_be_compiled_is_told(launches: list[Launch]) -> None:
    broken = replace(launches[0], constants=launches[0].constants | {"SIZE": 60})
    with pytest.raises(RuntimeError, match=r"(?s)compiling failed.*power of 2"):
        compile_only([broken])


def test_nothing_runs_while_launches_are_recorded() -> None:
    @triton.jit
    def fill(x_ptr):
        tl.store(x_ptr, 1.0)

    x = torch.zeros(1)
    with recorded_launches(80) as launches:
        fill[(1,)](x)
    assert x.item() == 0.0
    assert len(launches) == 1
