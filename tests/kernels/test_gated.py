"""SwiGLU and GeGLU against torch's activations in float64: references and kernels."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from minillm.kernels import geglu, swiglu
from minillm.kernels.testing import TOLERANCE, assert_untouched, guarded, relative_error, watched_memory

BACKENDS = ("reference", "torch", "triton")
TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def ours(activation: str, gate: Tensor, up: Tensor, *, backend: str) -> Tensor:
    if activation == "silu":
        return swiglu(gate, up, backend=backend)
    return geglu(gate, up, approximate="none" if activation == "gelu" else "tanh", backend=backend)


def computed(activation: str, gate: Tensor, up: Tensor, dy: Tensor, *, backend: str) -> list[Tensor]:
    y = ours(activation, gate, up, backend=backend)
    return [y, *torch.autograd.grad(y, (gate, up), dy)]


def oracle(activation: str, gate: Tensor, up: Tensor, dy: Tensor) -> list[Tensor]:
    """In float64: y, and the gradients of gate and up."""
    gate, up = (t.detach().double().requires_grad_() for t in (gate, up))
    y = TORCH[activation](gate) * up
    return [y, *torch.autograd.grad(y, (gate, up), dy.double())]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    return guarded((2 * torch.randn(shape, device=device)).to(dtype)).requires_grad_()


@pytest.mark.parametrize("activation", TORCH)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_exact_and_gradcheck_passes(backend: str, activation: str, device: torch.device) -> None:
    gate, up, dy = (drawn(3, 7, dtype=torch.float64, device=device) for _ in range(3))
    actual = computed(activation, gate, up, dy.detach(), backend=backend)
    for mine, theirs in zip(actual, oracle(activation, gate, up, dy), strict=True):
        assert relative_error(mine, theirs) <= TOLERANCE[torch.float64]
    assert torch.autograd.gradcheck(lambda *both: ours(activation, *both, backend=backend), (gate, up), fast_mode=True)


@pytest.mark.parametrize("activation", TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_values_and_gradients(dtype: torch.dtype, activation: str, device: torch.device) -> None:
    gate, up = drawn(2, 1100, dtype=dtype, device=device), drawn(2, 1100, dtype=dtype, device=device)
    dy = guarded(torch.randn(2, 1100, device=device).to(dtype))
    with watched_memory():
        actual = computed(activation, gate, up, dy, backend="triton")
    for mine, theirs in zip(actual, oracle(activation, gate, up, dy), strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, theirs) <= TOLERANCE[dtype]
    for tensor in (gate, up, dy):
        assert_untouched(tensor)


@pytest.mark.parametrize("activation", TORCH)
def test_contiguous_tensors_are_one_row(activation: str, device: torch.device) -> None:
    gate, up, dy = (torch.randn(3, 5, 100, device=device, requires_grad=True) for _ in range(3))
    with watched_memory():
        actual = computed(activation, gate, up, dy.detach(), backend="triton")
    for mine, theirs in zip(actual, oracle(activation, gate, up, dy), strict=True):
        assert relative_error(mine, theirs) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("activation", TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_far_from_zero(dtype: torch.dtype, activation: str, device: torch.device) -> None:
    gate = torch.tensor([-6e4, -1e3, -100, -20, -6, -1e-6, 0, 1e-6, 6, 20, 100, 1e3, 6e4], device=device).to(dtype)
    up = torch.ones_like(gate)
    for backend in BACKENDS:
        actual = computed(activation, gate.requires_grad_(), up.requires_grad_(), torch.ones_like(up), backend=backend)
        for mine, theirs in zip(actual, oracle(activation, gate, up, torch.ones_like(up)), strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=4 * TOLERANCE[dtype], atol=TOLERANCE[dtype])


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=2), st.sampled_from(list(TORCH)), st.booleans(), st.sampled_from([16, 1024])
)
def test_any_shape(shape: list[int], activation: str, halves: bool, block: int) -> None:
    pytest.importorskip("triton")
    from minillm.kernels.gated import launch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    both = torch.randn(*shape, 2 * 21, device=device)
    gate, up = (t.requires_grad_() for t in (both.chunk(2, -1) if halves else (both, both.clone())))
    dy = torch.randn_like(gate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_BLOCK", block)
        actual = computed(activation, gate, up, dy, backend="triton")
    for mine, theirs in zip(actual, oracle(activation, gate, up, dy), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_any_kind(backend: str, device: torch.device) -> None:
    base, fused = torch.randn(6, 5, 40, device=device), torch.randn(3, 4, 80, device=device)
    pairs = [
        fused.chunk(2, dim=-1),  # one projection for both
        (fused[..., 0::2], fused[..., 1::2]),
        (base.transpose(0, 2), torch.randn(40, 5, 6, device=device)),
        (base[:1].expand(6, 5, 40), base),
        (torch.tensor(1.5, device=device), torch.tensor(-2.0, device=device)),
    ]
    for gate, up in pairs:
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        dy = torch.randn(gate.shape[::-1], device=device).permute(tuple(reversed(range(gate.dim()))))
        actual = computed("silu", gate, up, dy, backend=backend)
        for mine, theirs in zip(actual, oracle("silu", gate, up, dy), strict=True):
            assert relative_error(mine, theirs) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,)])
def test_nothing_to_do(backend: str, shape: tuple[int, ...], device: torch.device) -> None:
    gate, up = torch.empty(shape, device=device, requires_grad=True), torch.empty(shape, device=device)
    y = swiglu(gate, up, backend=backend)
    y.sum().backward()
    assert y.shape == gate.grad.shape == shape


def test_offsets_beyond_two_billion(device: torch.device) -> None:
    far = 2**30 + 8  # a stride within int32, twice which is not; only the pages that are written become memory
    memory = torch.empty(2 * far + 64, dtype=torch.float16, device=device)
    gate, up, dy = (memory.as_strided((3, 20), (far, 1), offset) for offset in (0, 21, 42))
    for tensor in (gate, up, dy):
        tensor.copy_(torch.randn(3, 20))
    with watched_memory():
        actual = computed("silu", gate.requires_grad_(), up.requires_grad_(), dy, backend="triton")
    for mine, theirs in zip(actual, oracle("silu", gate, up, dy), strict=True):
        assert relative_error(mine, theirs) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize(("backend", "tensors"), [("triton", 2), ("torch", 3)])
@pytest.mark.parametrize("activation", TORCH)
def test_bytes_kept_for_the_backward_pass(activation: str, backend: str, tensors: int, device: torch.device) -> None:
    gate, up = (torch.randn(30, 40, device=device, requires_grad=True) for _ in range(2))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _result = ours(activation, gate, up, backend=backend)
    assert sum(kept.values()) == tensors * 30 * 40 * 4


def test_torch_compile_traces_through(device: torch.device) -> None:
    gate, up = (torch.randn(4, 19, device=device, requires_grad=True) for _ in range(2))
    for activation in TORCH:
        torch.library.opcheck(torch.ops.minillm.gated.default, (gate, up, activation))
    inputs = (gate.detach(), gate.detach(), up.detach(), "gelu")
    torch.library.opcheck(torch.ops.minillm.gated_backward.default, inputs)
    compiled = torch.compile(lambda g, u: swiglu(g, u, backend="triton"), fullgraph=True, backend="aot_eager")
    y, dy = compiled(gate, up), torch.randn(4, 19, device=device)
    actual = [y, *torch.autograd.grad(y, (gate, up), dy)]
    for mine, theirs in zip(actual, oracle("silu", gate, up, dy), strict=True):
        assert relative_error(mine, theirs) <= TOLERANCE[torch.float32]


def test_wrong_input_is_refused() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(TypeError, match=r"gate must be floating point, got torch\.int64"):
        swiglu(x.long(), x)
    with pytest.raises(TypeError, match=r"up must be of the dtype of gate, torch\.float32, got torch\.float64"):
        geglu(x, x.double())
    with pytest.raises(ValueError, match=r"up must be of the shape of gate, \(2, 3\), got \(3,\)"):
        swiglu(x, x[0])
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', got 'erf'"):
        geglu(x, x, approximate="erf")
