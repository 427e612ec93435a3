"""Linear + bias + activation against F.linear and torch's activations in float64; batch norm folded against torch's."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.kernels import fold_batch_norm, linear_activation, tile_sizes
from minillm.kernels.compile_only import SHARED_MEMORY, compile_only, recorded_launches
from minillm.kernels.linear_activation import launch
from minillm.kernels.testing import TOLERANCE, assert_untouched, guarded, relative_error, watched_memory

TORCH: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("reference", "torch", "triton")


def oracle(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, d_out: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The result and, for a gradient of it, those of x, weight and bias."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    out = TORCH[activation](F.linear(*inputs))
    return out, () if d_out is None else torch.autograd.grad(out, inputs, d_out.double())


def some(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> Tensor:
    return guarded(torch.randn(shape, device=device).to(dtype)).requires_grad_()


@pytest.mark.parametrize("activation", TORCH)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_reference_and_torch_are_exact_in_float64(backend: str, activation: str | None) -> None:
    x, weight, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (4, 5), 4))
    out = linear_activation(x, weight, bias, activation=activation, backend=backend)
    assert relative_error(out, oracle(x, weight, bias, activation)[0]) <= TOLERANCE[torch.float64]
    assert torch.autograd.gradcheck(
        lambda *inputs: linear_activation(*inputs, activation=activation, backend=backend), (x, weight, bias)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", TORCH)
def test_kernel_values_and_gradients(activation: str | None, dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias = (some(*shape, dtype=dtype, device=device) for shape in ((2, 35, 45), (40, 45), (40,)))
    d_out = guarded(torch.randn(2, 35, 40, device=device).to(dtype))
    with watched_memory(races=dtype is torch.float32):
        out = linear_activation(x, weight, bias, activation=activation, backend="triton")
        gradients = torch.autograd.grad(out, (x, weight, bias), d_out)
    expected, expected_gradients = oracle(x, weight, bias, activation, d_out)
    assert out.dtype == dtype
    assert relative_error(out, expected) <= TOLERANCE[dtype]
    for tensor, ours, theirs in zip((x, weight, bias), gradients, expected_gradients, strict=True):
        assert (ours.dtype, ours.shape) == (dtype, tensor.shape)
        assert relative_error(ours, theirs) <= TOLERANCE[dtype]
    for tensor in (x, weight, bias, d_out):
        assert_untouched(tensor)


def test_the_widest_tile_finishes_half_after_half(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = tile_sizes.HOPPER[0]._replace(num_stages=2)  # so that other GPUs can hold it
    monkeypatch.setattr(launch, "tile_sizes", lambda *_: tile)
    x, weight, bias = (some(*shape, dtype=torch.float16, device=device) for shape in ((130, 70), (300, 70), (300,)))
    d_out = torch.randn(130, 300, device=device).half()
    with watched_memory(races=False):
        out = linear_activation(x, weight, bias, activation="gelu", backend="triton")
        gradients = torch.autograd.grad(out, (x, weight, bias), d_out)
    expected, expected_gradients = oracle(x, weight, bias, "gelu", d_out)
    for ours, theirs in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE[torch.float16]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 70), st.integers(1, 70), st.integers(1, 70), st.sampled_from(list(TORCH)), st.booleans())
def test_kernel_takes_any_shape(rows: int, d_in: int, d_out: int, activation: str | None, with_bias: bool) -> None:
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, weight = some(rows, d_in, device=device), some(d_out, d_in, device=device)
    bias = some(d_out, device=device) if with_bias else None
    inputs = [x, weight] if bias is None else [x, weight, bias]
    gradient = torch.randn(rows, d_out, device=device)
    out = linear_activation(*inputs, activation=activation, backend="triton")
    gradients = torch.autograd.grad(out, inputs, gradient)
    expected, expected_gradients = oracle(x, weight, bias, activation, gradient)
    for ours, theirs in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert ours.shape == theirs.shape
        # what cancels is measured by what was added up
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5 * (1 + d_in**0.5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0, 5), (1, 1, 3, 5)])
def test_leading_dimensions(backend: str, shape: tuple[int, ...], device: torch.device) -> None:
    x, weight, bias = (torch.randn(s, device=device, requires_grad=True) for s in (shape, (4, 5), (4,)))
    out = linear_activation(x, weight, bias, activation="silu", backend=backend)
    expected, gradients = oracle(x, weight, bias, "silu", torch.ones_like(out))
    out.sum().backward()  # a gradient of stride 0
    assert out.shape == (*shape[:-1], 4)
    for ours, theirs in zip((out, x.grad, weight.grad, bias.grad), (expected, *gradients), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_strides_of_any_kind(device: torch.device) -> None:
    base = torch.randn(48, 3, 40, device=device)
    weight, bias = torch.randn(40, 33, device=device).T, torch.randn(99, device=device)[::3]
    for x in (base.transpose(0, 1)[:, ::2], base[:1, :3].expand(4, 3, 40), torch.randn(40, 37, device=device).T):
        for activation in ("gelu", "relu"):
            with watched_memory(races=False):
                out = linear_activation(x, weight, bias, activation=activation, backend="triton")
            assert relative_error(out, oracle(x, weight, bias, activation)[0]) <= TOLERANCE[torch.float32]
    x, weight = base[:, 0].T.requires_grad_(), torch.randn(30, 48, device=device).requires_grad_()
    d_out = torch.randn(30, 40, device=device).T
    gradients = torch.autograd.grad(
        linear_activation(x, weight, activation="gelu", backend="triton"), (x, weight), d_out
    )
    for ours, theirs in zip(gradients, oracle(x, weight, None, "gelu", d_out)[1], strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE[torch.float32]


def test_offsets_beyond_two_billion(device: torch.device) -> None:
    far = 2**30 + 8  # a stride within int32, twice which is not; only the pages that are written become memory
    memory = torch.empty(33 * (far // 15), dtype=torch.float16, device=device)
    x, weight, d_out = (memory.as_strided((3, 20), (far, 1), offset) for offset in (0, 20, 40))
    deep = [memory.as_strided((2, 33), (1, far // 15), offset) for offset in (100, 102)]
    for tensor in (x, weight, d_out, *deep):
        tensor.copy_(torch.randn(tensor.shape))
    before = torch.randn(3, 20, device=device).half().requires_grad_()
    with watched_memory(races=False):
        for factors in ((x, weight), deep):
            out = linear_activation(*factors, backend="triton")
            assert relative_error(out, oracle(*factors, None, None)[0]) <= TOLERANCE[torch.float16]
        d_before, _ = launch.triton_activation_backward(d_out, before.detach(), "silu", True)
    (expected,) = torch.autograd.grad(F.silu(before.double()), before, d_out.double())
    assert relative_error(d_before, expected) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_extreme_numbers_and_nan(activation: str, device: torch.device) -> None:
    numbers = [0.0, -0.0, 1e-30, 3.0, -3.0, 30.0, -30.0, 1e4, -1e4, float("nan")]
    x = torch.tensor(numbers, device=device).view(-1, 1).requires_grad_()
    one = torch.ones(1, 1, device=device)
    out = linear_activation(x, one, activation=activation, backend="triton")
    expected = TORCH[activation](x)
    torch.testing.assert_close(out, expected, equal_nan=True)
    slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (out, expected)]
    torch.testing.assert_close(*slopes, equal_nan=True, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_wanted_gradients(activation: str | None, wanted: tuple[int, ...], device: torch.device) -> None:
    inputs = [torch.randn(shape, device=device) for shape in ((33, 6), (7, 6), (7,))]
    for number in wanted:
        inputs[number].requires_grad_()
    out = linear_activation(*inputs, activation=activation, backend="triton")
    d_out = torch.randn_like(out)
    gradients = torch.autograd.grad(out, [inputs[number] for number in wanted], d_out)
    expected = oracle(*inputs, activation, d_out)[1]
    for number, ours in zip(wanted, gradients, strict=True):
        assert relative_error(ours, expected[number]) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(("activation", "numbers"), [(None, 0), ("relu", 24), ("gelu", 24), ("silu", 24)])
def test_what_is_kept_for_the_gradient(activation: str | None, numbers: int, device: torch.device) -> None:
    x, weight, bias = (torch.randn(s, device=device, requires_grad=True) for s in ((6, 3), (4, 3), (4,)))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = linear_activation(x, weight, bias, activation=activation, backend="triton")
    assert [tensor.shape for tensor in kept[:2]] == [x.shape, weight.shape]
    assert sum(tensor.numel() for tensor in kept[2:]) == numbers
    if activation == "relu":
        assert kept[2].data_ptr() == out.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str, device: torch.device) -> None:
    x, weight, bias = (torch.randn(s, device=device, requires_grad=True) for s in ((9, 16), (8, 16), (8,)))
    with torch.autocast(device.type, torch.bfloat16):
        out = linear_activation(x, weight, bias, activation="gelu", backend=backend)
        assert linear_activation(x.double(), weight.double(), backend="torch").dtype is torch.float64
    d_out = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (x, weight, bias), d_out)
    assert out.dtype is torch.bfloat16
    expected, expected_gradients = oracle(x, weight, bias, "gelu", d_out)
    for ours, theirs in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE[torch.bfloat16]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_torch_compile_traces_through(device: torch.device) -> None:
    x, weight, bias = (torch.randn(s, device=device, requires_grad=True) for s in ((5, 12), (8, 12), (8,)))
    torch.library.opcheck(torch.ops.minillm.linear_activation.default, (x, weight, bias, "gelu", True))
    kept = torch.randn(5, 8, device=device)
    torch.library.opcheck(torch.ops.minillm.activation_backward.default, (kept, kept, "silu", True))

    def run(*inputs: Tensor) -> Tensor:
        return linear_activation(*inputs, activation="gelu", backend="triton")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    d_out = torch.randn(5, 8, device=device)
    out = compiled(x, weight, bias)
    expected, expected_gradients = oracle(x, weight, bias, "gelu", d_out)
    gradients = torch.autograd.grad(out, (x, weight, bias), d_out)
    for ours, theirs in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_batch_norm_folded_is_torchs(kind: str, bias: bool, affine: bool) -> None:
    if kind == "linear":
        layers = nn.Sequential(nn.Linear(6, 5, bias=bias), nn.BatchNorm1d(5, eps=1e-3, affine=affine)).double()
        x = torch.randn(9, 6, dtype=torch.float64)
    else:
        layers = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=bias), nn.BatchNorm2d(6, affine=affine)).double()
        x = torch.randn(3, 4, 7, 7, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.normal_()
        layers(x)  # running mean and variance that are not 0 and 1
    layers.eval()
    first, norm = layers
    weight, new_bias = fold_batch_norm(
        first.weight, first.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )
    folded = F.linear(x, weight, new_bias) if kind == "linear" else F.conv2d(x, weight, new_bias, groups=2)
    assert relative_error(folded, layers(x)) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_batch_norm_activation_in_one_kernel(dtype: torch.dtype, device: torch.device) -> None:
    linear, norm = nn.Linear(20, 40, device=device), nn.BatchNorm1d(40, device=device)
    x = torch.randn(33, 20, device=device)
    with torch.no_grad():
        norm(linear(x) * 3 + 1)
        expected = F.relu(norm.double().eval()(linear.double()(x.double())))
    linear, norm = linear.to(dtype), norm.to(dtype)
    folded = fold_batch_norm(linear.weight, linear.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    assert {tensor.dtype for tensor in folded} == {dtype}
    out = linear_activation(x.to(dtype), *folded, activation="relu", backend="triton")
    assert relative_error(out, expected) <= 2 * TOLERANCE[dtype]


def test_wrong_input_is_refused() -> None:
    x, weight, bias = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)
    for arguments, message in (
        ((x, bias), r"weight must be \(d_out, d_in\), got \(4,\)"),
        ((x.T, weight), r"x must be \(\.\.\., d_in=5\) for a weight \(4, 5\), got \(5, 3\)"),
        ((x, weight, x), r"bias must be \(d_out=4,\), got \(3, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_activation(*arguments)
    with pytest.raises(ValueError, match="activation must be one of relu, gelu, gelu_tanh, silu or None, got 'tanh'"):
        linear_activation(x, weight, activation="tanh")
    with pytest.raises(TypeError, match=r"must have one type, got torch\.float32, torch\.float16"):
        linear_activation(x, weight.half())
    with pytest.raises(TypeError, match="x must be floating point"):
        linear_activation(x.long(), weight.long())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="x must be floating point"):
        linear_activation(x.long(), weight)
    with pytest.raises(ValueError, match=r"backend='triton' cannot be used: the kernel multiplies float32, float16"):
        linear_activation(x.double(), weight.double(), backend="triton")
    with pytest.raises(ValueError, match=r"running_var must be \(d_out=4,\), got \(5,\)"):
        fold_batch_norm(weight, bias, bias, torch.ones(5))
    with pytest.raises(ValueError, match="weight must be"):
        fold_batch_norm(bias, bias, bias, bias)


def test_shapes_without_numbers() -> None:
    x, weight = torch.empty(3, 5, device="meta"), torch.empty(4, 5, device="meta")
    assert linear_activation(x, weight, activation="gelu").shape == (3, 4)


def test_tiles_are_sorted_and_fit_into_shared_memory() -> None:
    for capability in (80, 86, 89, 90, 120):
        limit = SHARED_MEMORY.get(capability, SHARED_MEMORY[89])
        for dtype in DTYPES:
            table = tile_sizes.candidates(dtype, capability)
            for tile in table:
                held = (tile.block_m + tile.block_n) * tile.block_k * dtype.itemsize * tile.num_stages
                assert held <= limit
            assert all(one.block_m * one.block_n > other.block_m * other.block_n for one, other in pairwise(table))


def test_the_compiler_accepts_it(device: torch.device) -> None:
    x, weight, bias = (torch.empty(shape, dtype=torch.float16) for shape in ((4096, 4096), (4096, 4096), (4096,)))
    with recorded_launches(80) as ampere:
        launch.triton_linear_activation(x, weight, bias, "gelu", True)
        launch.triton_linear_activation(x[:, :100].float(), weight[:, :100].float(), None, "relu", False)
    with recorded_launches(90) as hopper:
        launch.triton_linear_activation(*(tensor.bfloat16() for tensor in (x, weight, bias)), "gelu", True)
        launch.triton_activation_backward(x, x, "gelu", True)  # numbers one by one: the same for every GPU
    for recorded in (ampere, hopper):
        largest = tile_sizes.candidates(torch.float16, recorded[0].capability)[0]
        assert recorded[0].constants["BLOCK_N"] == largest.block_n
    all_compiled = compile_only([*ampere, *hopper])
    assert not any(compiled.spilled for compiled in all_compiled)
    for compiled in all_compiled[::2]:
        assert compiled.count("wgmma.mma_async" if compiled.capability == 90 else "mma.sync") > 0
        assert compiled.count("cp.async") > 0
        assert compiled.shared <= SHARED_MEMORY[90 if compiled.capability == 90 else 89]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_error_at_most_twice_torchs(dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias = (torch.randn(s, dtype=dtype, device=device) for s in ((1000, 2000), (3000, 2000), (3000,)))
    expected = oracle(x, weight, bias, "gelu")[0]
    errors = [
        relative_error(linear_activation(x, weight, bias, activation="gelu", backend=backend), expected)
        for backend in ("triton", "torch")
    ]
    assert errors[0] <= 2 * errors[1]
