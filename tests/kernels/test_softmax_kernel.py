"""The softmax operator against torch.softmax in float64: reference, kernels, and what the compiler makes of them."""

import math

import pytest
import torch
from torch import Tensor

from minillm.kernels import softmax
from minillm.kernels.compile_only import SHARED_MEMORY, compile_only, recorded_launches
from minillm.kernels.testing import TOLERANCE, assert_untouched, guarded, relative_error, watched_memory

BACKENDS = ("reference", "torch", "triton")


def oracle(x: Tensor) -> Tensor:
    return x.double().softmax(-1)


def gradient(x: Tensor, dy: Tensor) -> Tensor:
    x = x.detach().double().requires_grad_()
    return torch.autograd.grad(x.softmax(-1), x, dy.double())[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 33), (2, 5, 128), (1, 1), (7,), (2, 16400)])
def test_values_and_gradients(backend: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    x = guarded((torch.randn(shape, device=device) * 4).to(dtype)).requires_grad_()
    dy = guarded(torch.randn(shape, device=device).to(dtype))
    with watched_memory():
        y = softmax(x, backend=backend)
        (dx,) = torch.autograd.grad(y, x, dy)
    assert y.dtype == dx.dtype == dtype
    assert relative_error(y, oracle(x)) <= TOLERANCE[dtype]
    # the gradient is made from the rounded result, as torch's own is
    assert (dx.double() - gradient(x, dy)).norm() <= 2 * TOLERANCE[dtype] * (dy.double() * oracle(x)).norm()
    assert_untouched(x)
    assert_untouched(dy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_minus_infinity_are_zeros_and_have_no_gradient(backend: str, device: torch.device) -> None:
    x = torch.randn(4, 37, device=device)
    x[1] = -math.inf
    x[2, 5:] = -math.inf
    x.requires_grad_()
    y = softmax(x, backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert torch.equal(y[1], torch.zeros(37, device=device))
    assert torch.equal(dx[1], torch.zeros(37, device=device))
    assert not dx.isnan().any()
    torch.testing.assert_close(y[2, :5], x[2, :5].softmax(0))


def test_a_long_row_of_minus_infinity(device: torch.device) -> None:
    x = torch.full((2, 20_000), -math.inf, device=device)
    x[1, 19_999] = 3.0
    y = softmax(x, backend="triton")
    assert y.sum().item() == 1.0
    assert y[1, -1].item() == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_any_kind(backend: str, device: torch.device) -> None:
    x = torch.randn(6, 5, 40, device=device)
    for view in (x.transpose(0, 2), x[:, ::2, ::3], x[:1, :1].expand(4, 5, 40), x.flip(0)):
        assert relative_error(softmax(view, backend=backend), oracle(view)) <= TOLERANCE[torch.float32]


def test_offsets_beyond_two_billion(device: torch.device) -> None:
    far = 2**30 + 8  # a stride within int32, twice which is not; only the pages that are written become memory
    memory = torch.empty(2 * far + 64, dtype=torch.float16, device=device)
    x, dy = (memory.as_strided((3, 20), (far, 1), offset) for offset in (0, 24))
    for tensor in (x, dy):
        tensor.copy_(torch.randn(3, 20))
    x.requires_grad_()
    with watched_memory():
        y = softmax(x, backend="triton")
        dx = torch.ops.minillm.softmax_backward(dy, y.detach())
    assert relative_error(y, oracle(x)) <= TOLERANCE[torch.float16]
    assert relative_error(dx, gradient(x, dy)) <= 2 * TOLERANCE[torch.float16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,)])
def test_nothing_to_do(backend: str, shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.empty(shape, device=device, requires_grad=True)
    y = softmax(x, backend=backend)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, device: torch.device) -> None:
    x = torch.randn(2, 9, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: softmax(x, backend=backend), (x,))


def test_torch_compile_traces_through(device: torch.device) -> None:
    x = torch.randn(4, 19, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.minillm.softmax.default, (x,))
    compiled = torch.compile(lambda x: softmax(2 * x, backend="triton"), fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert relative_error(y, oracle(2 * x)) <= TOLERANCE[torch.float32]
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert relative_error(dx, 2 * gradient(2 * x, dy)) <= TOLERANCE[torch.float32]


def test_wrong_input_is_refused() -> None:
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.int64"):
        softmax(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one dimension"):
        softmax(torch.tensor(1.0))


def test_the_compiler_accepts_it(device: torch.device) -> None:
    launches = []
    for capability, dtype in ((80, torch.float32), (80, torch.float16), (90, torch.bfloat16)):
        for n_columns in (1000, 100_000):
            x = torch.empty(64, n_columns, dtype=dtype, requires_grad=True)
            with recorded_launches(capability) as recorded:
                torch.autograd.grad(softmax(x, backend="triton"), x, torch.empty_like(x))
            launches += recorded
    assert len(launches) == 12
    for compiled in compile_only(launches):
        assert compiled.spilled == 0
        assert compiled.shared <= min(SHARED_MEMORY.values())
