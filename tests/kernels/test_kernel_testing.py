"""The detectors detect: planted faults that the interpreter lets through are found, correct kernels pass."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.kernels.testing import (
    BadAccessError,
    as_on_a_gpu,
    assert_untouched,
    guarded,
    relative_error,
    watched_memory,
)

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, which has wheels for Linux only", allow_module_level=True)

import triton
import triton.language as tl


@triton.jit
def double(x_ptr, y_ptr, n, SHIFT: tl.constexpr, SHARE: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr):
    places = (tl.program_id(0) // SHARE) * BLOCK + tl.arange(0, BLOCK)
    if MASK:
        x = tl.load(x_ptr + places + SHIFT, mask=places < n, other=0.0)
        tl.store(y_ptr + places, 2 * x, mask=places < n)
    else:
        tl.store(y_ptr + places, 2 * tl.load(x_ptr + places + SHIFT))


@triton.jit
def count(total_ptr):
    tl.atomic_add(total_ptr, 1)


@triton.jit
def hand_over(x_ptr):
    place = tl.program_id(0)
    tl.store(x_ptr + place + 1, tl.load(x_ptr + place) + 1)


@triton.jit
def add_up(x_ptr, total_ptr, n, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(total_ptr, tl.sum(tl.load(x_ptr + places, mask=places < n).to(tl.float32), 0))


@triton.jit
def multiply(x_ptr, y_ptr, PRECISION: tl.constexpr):
    places = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + places)
    tl.store(y_ptr + places, tl.dot(x, x, input_precision=PRECISION))


def run(x: Tensor, y: Tensor, *, shift: int = 0, share: int = 1, mask: bool = True) -> Tensor:
    double[(2 * share,)](x, y, 20, SHIFT=shift, SHARE=share, MASK=mask, BLOCK=16)
    return y


needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="addresses are seen under the interpreter only"
)


@needs_interpreter
def test_a_correct_kernel_passes() -> None:
    x = guarded(torch.randn(20))
    with watched_memory():
        assert torch.equal(run(x, torch.empty(20)), 2 * x)
        count[(5,)](total := torch.zeros((), dtype=torch.int32))
    assert total == 5


@needs_interpreter
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"mask": False}, "a load touches 12 addresses outside"),
        ({"shift": 1}, "a load touches 1 addresses outside"),
        ({"shift": -1}, "a load touches 1 addresses outside"),
        ({"share": 2}, r"double: programs \(0, 0, 0\) and \(1, 0, 0\) store to the same address"),
    ],
)
def test_planted_faults_are_found(fault: dict[str, int], words: str) -> None:
    with pytest.raises(BadAccessError, match=words), watched_memory():
        run(guarded(torch.randn(20)), torch.empty(20), **fault)


@needs_interpreter
def test_a_program_that_reads_what_another_stores_is_found() -> None:
    words = r"hand_over: program \(1, 0, 0\) reads what program \(0, 0, 0\) stores"
    with pytest.raises(BadAccessError, match=words), watched_memory():
        hand_over[(3,)](torch.zeros(4))
    with watched_memory(races=False):
        hand_over[(3,)](torch.zeros(4))


@needs_interpreter
def test_the_gaps_of_a_strided_tensor_are_outside() -> None:
    rows = guarded(torch.randn(2, 10), gap=2)
    with pytest.raises(BadAccessError, match="outside"), watched_memory():
        run(rows, torch.empty(20))


@needs_interpreter
def test_other_errors_of_a_kernel_are_left_alone() -> None:
    with pytest.raises(triton.runtime.errors.InterpreterError), watched_memory():
        double[(1,)](torch.zeros(20), None, 20, SHIFT=0, SHARE=1, MASK=True, BLOCK=16)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("context", [as_on_a_gpu, watched_memory])
def test_a_masked_load_without_other_is_undefined(dtype: torch.dtype, context: Callable[[], Any]) -> None:
    x, total = torch.ones(16, dtype=dtype), torch.empty(1)
    add_up[(1,)](x, total, 9, BLOCK=16)
    assert total == 9  # the interpreter's kindness
    with context():
        add_up[(1,)](x, total, 9, BLOCK=16)
        assert total.isnan()
        add_up[(1,)](x, total, 16, BLOCK=16)
    assert total == 16


@needs_interpreter
def test_products_are_rounded_to_tf32_unless_told_otherwise() -> None:
    x, y = torch.randn(16, 16), torch.empty(16, 16)
    for precision, least, most in (("tf32", 1e-5, 1e-3), ("ieee", 0.0, 1e-6)):
        with as_on_a_gpu():
            multiply[(1,)](x, y, PRECISION=precision)
        assert least <= relative_error(y, x.double() @ x.double()) <= most


def test_guards_poison_what_is_loaded_from_outside(device: torch.device) -> None:
    x = guarded(torch.randn(20, device=device))
    y = torch.empty(20, device=device)
    assert not run(x, y).isnan().any()
    assert run(x, y, shift=1)[-1].isnan()


def test_guards_show_a_store_outside(device: torch.device) -> None:
    for dtype in (torch.float32, torch.int32):
        y = guarded(torch.zeros(20, dtype=dtype, device=device))
        run(torch.ones(32, dtype=dtype, device=device), y)
        assert_untouched(y)
        run(torch.ones(32, dtype=dtype, device=device), y, mask=False)
        with pytest.raises(BadAccessError, match=r"12 numbers beside a tensor of shape \(20,\) were overwritten"):
            assert_untouched(y)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (2, 0, 4), (3, 0), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_guarded_tensors_hold_the_same_numbers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = (4 * torch.randn(shape)).to(dtype)
    copy = guarded(tensor)
    assert torch.equal(copy, tensor)
    assert copy.dtype == dtype
    assert_untouched(copy)
    if copy.numel():
        copy.zero_()
        assert_untouched(copy)
    if copy.dim() > 1 and copy.numel():
        assert not copy.is_contiguous()
        assert guarded(tensor, gap=0).is_contiguous()


def test_relative_error() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert relative_error(torch.tensor([0.5, 0.0]), torch.zeros(2)) == 0.5
    nan, infinity = float("nan"), float("inf")
    assert relative_error(torch.tensor([1.0, nan]), torch.tensor([1.0, nan])) == 0.0
    assert relative_error(torch.tensor([1.0, -infinity]), torch.tensor([1.0, -infinity])) == 0.0
    for actual, wanted in (
        ([1.0, nan], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, nan]),
        ([infinity], [-infinity]),
        ([nan], [infinity]),
    ):
        assert relative_error(torch.tensor(actual), torch.tensor(wanted)) == infinity
    with pytest.raises(ValueError, match="shapes must be equal"):
        relative_error(torch.zeros(2), torch.zeros(3))
