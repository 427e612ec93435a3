"""LayerNorm against torch's in float64: reference and kernels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from minillm.kernels import layer_norm
from minillm.kernels.layer_norm import launch
from minillm.kernels.rows import RowTile
from minillm.kernels.testing import TOLERANCE, assert_untouched, guarded, relative_error, watched_memory

BACKENDS = ("reference", "torch", "triton")
EPS = 1e-3
# Tiles smaller than a model's: rows side by side, one row, and rows longer than a tile.
TILES = (RowTile(4, 64, 1), RowTile(1, 64, 1), RowTile(1, 16, 1))


def oracle(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
    """In float64: y, and the gradients of x, the weight and the bias."""
    inputs = [t.detach().double().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = F.layer_norm(inputs[0], weight.shape, *inputs[1:], eps=EPS)
    return [y, *torch.autograd.grad(y, inputs, dy.double())]


def computed(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, *, backend: str) -> list[Tensor]:
    """What :func:`oracle` gives, by ours."""
    y = layer_norm(x, weight, bias, eps=EPS, backend=backend)
    return [y, *torch.autograd.grad(y, [t for t in (x, weight, bias) if t is not None], dy)]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """Normal numbers around 3: a mean that has to be taken away."""
    return guarded((torch.randn(shape, device=device) + 3).to(dtype)).requires_grad_()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_exact_and_gradcheck_passes(backend: str, bias: bool, device: torch.device) -> None:
    shapes = [(3, 2, 5), (5,), (5,)][: 3 if bias else 2]
    inputs = [drawn(*shape, dtype=torch.float64, device=device) for shape in shapes]
    shift, dy = inputs[2] if bias else None, torch.randn(3, 2, 5, dtype=torch.float64, device=device)
    actual = computed(*inputs[:2], shift, dy, backend=backend)
    for ours, theirs in zip(actual, oracle(*inputs[:2], shift, dy), strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE[torch.float64]
    assert torch.autograd.gradcheck(
        lambda x, w, b=None: layer_norm(x, w, b, eps=EPS, backend=backend), tuple(inputs), fast_mode=True
    )


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_values_and_gradients(
    dtype: torch.dtype, bias: bool, tile: RowTile, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "row_tile", lambda n_columns, largest=0: tile)
    x, weight = drawn(3, 3, 39, dtype=dtype, device=device), drawn(39, dtype=dtype, device=device)
    shift = drawn(39, dtype=dtype, device=device) if bias else None
    dy = guarded(torch.randn(3, 3, 39, device=device).to(dtype))
    with watched_memory():
        actual = computed(x, weight, shift, dy, backend="triton")
    for ours, theirs in zip(actual, oracle(x, weight, shift, dy), strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, theirs) <= TOLERANCE[dtype]
    for tensor in (x, weight, dy, *([shift] if bias else [])):
        assert_untouched(tensor)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 19), st.integers(1, 80), st.sampled_from([1, 2, 8]), st.sampled_from([16, 32, 128]))
def test_kernel_takes_any_shape_and_tile(n_rows: int, n_columns: int, rows: int, columns: int) -> None:
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, weight, bias = (drawn(*shape, device=device) for shape in ((n_rows, n_columns), (n_columns,), (n_columns,)))
    dy = torch.randn(n_rows, n_columns, device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "row_tile", lambda n_columns, largest=0: RowTile(rows, columns, 1))
        actual = computed(x, weight, bias, dy, backend="triton")
    for ours, theirs in zip(actual, oracle(x, weight, bias, dy), strict=True):
        # dx is what is left of far larger numbers where a row is short
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-3)


def test_a_far_mean_does_not_cancel(device: torch.device) -> None:
    x = torch.randn(4, 300, device=device) + 10_000  # mean(x**2) - mean(x)**2 would be 0 within float32
    weight, bias = torch.randn(300, device=device), torch.randn(300, device=device)
    exact = F.layer_norm(x.double(), (300,), weight.double(), bias.double(), EPS)
    for backend in BACKENDS:
        assert relative_error(layer_norm(x, weight, bias, eps=EPS, backend=backend), exact) <= 1e-3


def test_long_rows_and_their_gradients(device: torch.device) -> None:
    x, weight, bias = (drawn(*shape, device=device) for shape in ((2, 16_400), (16_400,), (16_400,)))
    dy = torch.randn_like(x)
    actual = computed(x, weight, bias, dy, backend="triton")
    for ours, theirs in zip(actual, oracle(x, weight, bias, dy), strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE[torch.float32]


def test_other_dtype_of_weight_and_bias(device: torch.device) -> None:
    x, weight, bias = drawn(5, 24, dtype=torch.bfloat16, device=device), drawn(24, device=device), drawn(24).to(device)
    dy = torch.randn(5, 24, device=device).bfloat16()
    for backend in ("reference", "triton"):
        actual = computed(x, weight, bias.detach().requires_grad_(), dy, backend=backend)
        assert [t.dtype for t in actual] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
        for ours, theirs in zip(actual, oracle(x, weight, bias, dy), strict=True):
            assert relative_error(ours, theirs) <= TOLERANCE[torch.bfloat16]
    with pytest.raises(ValueError, match=r"F\.layer_norm needs a bias of the dtype of x, got torch\.float32 and"):
        layer_norm(x, weight.bfloat16(), bias, backend="torch")


def test_gradients_are_the_same_every_time(device: torch.device) -> None:
    x, weight, bias = drawn(300, 33, device=device), drawn(33, device=device), drawn(33, device=device)
    dy = torch.randn(300, 33, device=device)
    first, second = (computed(x, weight, bias, dy, backend="triton") for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_any_kind(backend: str, device: torch.device) -> None:
    base, vector = torch.randn(6, 5, 40, device=device), torch.randn(160, device=device)
    for x in (base.transpose(0, 2), base[:, ::2, ::3], base[:1, :1].expand(4, 5, 40)):
        n = x.size(-1)
        dy = torch.randn(x.shape[::-1], device=device).permute(2, 1, 0)
        x, weight, bias = (t.detach().requires_grad_() for t in (x, vector[: 2 * n : 2], vector[-2 * n :: 2]))
        actual = computed(x, weight, bias, dy, backend=backend)
        for ours, theirs in zip(actual, oracle(x, weight, bias, dy), strict=True):
            assert relative_error(ours, theirs) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("tile", [RowTile(2, 32, 1), RowTile(1, 16, 1)])
def test_offsets_beyond_two_billion(tile: RowTile, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "row_tile", lambda n_columns, largest=0: tile)
    far = 2**30 + 8  # a stride within int32, twice which is not; only the pages that are written become memory
    memory = torch.empty(2 * far + 64, dtype=torch.float16, device=device)
    x, dy = (memory.as_strided((3, 20), (far, 1), offset) for offset in (0, 24))
    for tensor in (x, dy):
        tensor.copy_(torch.randn(3, 20))
    weight, bias = (torch.randn(20, device=device).half().requires_grad_() for _ in range(2))
    with watched_memory():
        actual = computed(x.requires_grad_(), weight, bias, dy, backend="triton")
    for ours, theirs in zip(actual, oracle(x, weight, bias, dy), strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,), (1, 1)])
def test_no_rows_and_one(backend: str, shape: tuple[int, ...], device: torch.device) -> None:
    x, weight, bias = (torch.randn(s, device=device, requires_grad=True) for s in (shape, shape[-1:], shape[-1:]))
    expected = oracle(x, weight, bias, torch.ones_like(x))
    actual = computed(x, weight, bias, torch.ones((), device=device).expand(shape), backend=backend)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_keeps_two_numbers_a_row(device: torch.device) -> None:
    x, weight, bias = drawn(50, 64, device=device), drawn(64, device=device), drawn(64, device=device)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer_norm(x, weight, bias, backend="triton")
    assert sorted(tuple(t.shape) for t in kept) == [(50,), (50,), (50, 64), (64,)]


def test_torch_compile_traces_through(device: torch.device) -> None:
    x, weight, bias = (torch.randn(s, device=device, requires_grad=True) for s in ((4, 3, 19), (19,), (19,)))
    operators, mean = torch.ops.minillm, torch.ones(4, 3, device=device)
    torch.library.opcheck(operators.layer_norm.default, (x, weight, bias, EPS))
    torch.library.opcheck(operators.layer_norm.default, (x, weight, None, EPS))
    for shift in (False, True):
        inputs = (x.detach(), x.detach(), weight.detach(), mean, mean, shift)
        torch.library.opcheck(operators.layer_norm_backward.default, inputs)
        narrow, scale = x.detach().bfloat16(), weight.detach().half()
        torch.library.opcheck(operators.layer_norm.default, (narrow, scale, scale if shift else None, EPS))
        torch.library.opcheck(operators.layer_norm_backward.default, (narrow, narrow, scale, mean, mean, shift))
    compiled = torch.compile(
        lambda *args: layer_norm(*args, eps=EPS, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    dy = torch.randn(4, 3, 19, device=device)
    y = compiled(x, weight, bias)
    actual = [y, *torch.autograd.grad(y, (x, weight, bias), dy)]
    for ours, theirs in zip(actual, oracle(x, weight, bias, dy), strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE[torch.float32]


def test_wrong_input_is_refused() -> None:
    x, weight = torch.ones(2, 3), torch.ones(3)
    with pytest.raises(TypeError, match=r"bias must be floating point, got torch\.int64"):
        layer_norm(x, weight, weight.long())
    with pytest.raises(ValueError, match=r"x must have a last dimension of at least 1, got shape \(\)"):
        layer_norm(torch.tensor(1.0), weight)
    with pytest.raises(ValueError, match=r"bias must be \(3,\) for x \(2, 3\), got shape \(2, 3\)"):
        layer_norm(x, weight, x)
    with pytest.raises(ValueError, match="eps must be a finite number of at least 0, got nan"):
        layer_norm(x, weight, eps=float("nan"))
