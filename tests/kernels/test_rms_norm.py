"""RMSNorm against torch's in float64 and transformers' Llama: reference and kernels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from minillm.kernels import rms_norm
from minillm.kernels.rms_norm import launch
from minillm.kernels.rows import RowTile, row_tile, walkers
from minillm.kernels.testing import TOLERANCE, assert_untouched, guarded, relative_error, watched_memory

BACKENDS = ("reference", "torch", "triton")
EPS = 1e-3
# Tiles smaller than a model's: rows side by side, one row, and rows longer than a tile.
TILES = (RowTile(4, 64, 1), RowTile(1, 64, 1), RowTile(1, 16, 1))


def oracle(x: Tensor, weight: Tensor, residual: Tensor | None = None, *upstream: Tensor) -> list[Tensor]:
    """In float64: y, the sum if there is a residual, and the gradients of x, the weight and the residual."""
    inputs = [t.detach().double().requires_grad_() for t in (x, weight, residual) if t is not None]
    summed = inputs[0] if residual is None else inputs[0] + inputs[2]
    outputs = [F.rms_norm(summed, weight.shape, inputs[1], EPS)] + ([] if residual is None else [summed])
    return outputs + list(torch.autograd.grad(outputs, inputs, [t.double() for t in upstream]) if upstream else [])


def computed(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, *upstream: Tensor, backend: str
) -> list[Tensor]:
    """What :func:`oracle` gives, by ours."""
    outputs = rms_norm(x, weight, eps=EPS, residual=residual, backend=backend)
    outputs = [outputs] if residual is None else list(outputs)
    inputs = [t for t in (x, weight, residual) if t is not None]
    return outputs + list(torch.autograd.grad(outputs, inputs, upstream) if upstream else [])


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    return guarded(torch.randn(shape, device=device).to(dtype)).requires_grad_()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_exact_and_gradcheck_passes(backend: str, residual: bool, device: torch.device) -> None:
    shapes = [(3, 2, 5), (5,), (3, 2, 5)][: 3 if residual else 2]
    inputs = [drawn(*shape, dtype=torch.float64, device=device) for shape in shapes]
    upstream = [torch.randn(3, 2, 5, dtype=torch.float64, device=device) for _ in range(2 if residual else 1)]
    third = inputs[2] if residual else None
    expected = oracle(*inputs[:2], third, *upstream)
    for ours, theirs in zip(computed(*inputs[:2], third, *upstream, backend=backend), expected, strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE[torch.float64]
    assert torch.autograd.gradcheck(
        lambda x, w, r=None: rms_norm(x, w, eps=EPS, residual=r, backend=backend), tuple(inputs), fast_mode=True
    )


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_values_and_gradients(
    dtype: torch.dtype, residual: bool, tile: RowTile, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "row_tile", lambda n_columns, largest=0: tile)
    x, weight = drawn(3, 3, 39, dtype=dtype, device=device), drawn(39, dtype=dtype, device=device)
    other = drawn(3, 3, 39, dtype=dtype, device=device) if residual else None
    upstream = [guarded(torch.randn(3, 3, 39, device=device).to(dtype)) for _ in range(2 if residual else 1)]
    with watched_memory():
        actual = computed(x, weight, other, *upstream, backend="triton")
    for ours, theirs in zip(actual, oracle(x, weight, other, *upstream), strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, theirs) <= TOLERANCE[dtype]
    for tensor in (x, weight, *upstream, *([other] if residual else [])):
        assert_untouched(tensor)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 19), st.integers(1, 80), st.sampled_from([1, 2, 8]), st.sampled_from([16, 32, 128]))
def test_kernel_takes_any_shape_and_tile(n_rows: int, n_columns: int, rows: int, columns: int) -> None:
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, weight = drawn(n_rows, n_columns, device=device), drawn(n_columns, device=device)
    dy = torch.randn(n_rows, n_columns, device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "row_tile", lambda n_columns, largest=0: RowTile(rows, columns, 1))
        actual = computed(x, weight, None, dy, backend="triton")
    for ours, theirs in zip(actual, oracle(x, weight, None, dy), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_long_rows_and_their_gradients(device: torch.device) -> None:
    x, weight = drawn(2, 16_400, device=device), drawn(16_400, device=device)
    dy = torch.randn_like(x)
    for ours, theirs in zip(computed(x, weight, None, dy, backend="triton"), oracle(x, weight, None, dy), strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
def test_rounds_as_llama_does(weight_dtype: torch.dtype, device: torch.device) -> None:
    theirs = LlamaRMSNorm(48, eps=EPS).to(device, weight_dtype)
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(48))
    x = torch.randn(40, 48, device=device).half()
    expected = theirs(x)
    assert torch.equal(rms_norm(x, theirs.weight, eps=EPS, backend="reference"), expected)
    y = rms_norm(x, theirs.weight, eps=EPS, backend="triton")
    assert y.dtype == expected.dtype == weight_dtype
    assert (y == expected).double().mean() > 0.99  # a statistic's last bit may move a number over the edge
    once = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS) * theirs.weight).to(weight_dtype)
    assert (once == expected).double().mean() < 0.9  # what rounding after the weight would give


def test_other_dtype_of_the_weight(device: torch.device) -> None:
    x, weight = drawn(5, 24, dtype=torch.bfloat16, device=device), drawn(24, device=device)
    dy = torch.randn(5, 24, device=device)
    for backend in ("reference", "triton"):
        y, dx, dweight = computed(x, weight, None, dy, backend=backend)
        assert (y.dtype, dx.dtype, dweight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
        for ours, theirs in zip((y, dx, dweight), oracle(x, weight, None, dy), strict=True):
            assert relative_error(ours, theirs) <= TOLERANCE[torch.bfloat16]
    with pytest.raises(ValueError, match=r"F\.rms_norm needs a weight of the dtype of x, got torch\.float32 and"):
        rms_norm(x, weight, backend="torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_is_exact_and_either_output_may_go_unused(backend: str, device: torch.device) -> None:
    x, residual = (torch.randn(6, 20, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(20, device=device, requires_grad=True)
    y, summed = rms_norm(x, weight, eps=EPS, residual=residual, backend=backend)
    assert torch.equal(summed, x + residual)
    (dx,) = torch.autograd.grad(summed.sum(), x, retain_graph=True)
    assert torch.equal(dx, torch.ones_like(x))
    dx, dresidual = torch.autograd.grad(y.sum(), (x, residual))
    assert relative_error(dx, oracle(summed, weight, None, torch.ones_like(y))[1]) <= TOLERANCE[torch.float32]
    assert torch.equal(dx, dresidual)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_normed_is_the_sum_as_it_is_returned(backend: str, device: torch.device) -> None:
    x, residual = torch.randn(2, 30, 24, device=device).half()  # the interpreter cuts bfloat16 off, it does not round
    weight = torch.ones(24, dtype=torch.float16, device=device)
    y, summed = rms_norm(x, weight, residual=residual, backend=backend)
    assert torch.equal(summed, x + residual)
    assert torch.equal(y, rms_norm(summed, weight, backend=backend))  # of the sum in float32 some would differ


def test_gradients_are_the_same_every_time(device: torch.device) -> None:
    x, weight, dy = drawn(500, 33, device=device), drawn(33, device=device), torch.randn(500, 33, device=device)
    first, second = (computed(x, weight, None, dy, backend="triton") for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    assert walkers(10**6, device) < 10**6  # each of them summed many rows


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_any_kind(backend: str, device: torch.device) -> None:
    base, weight = torch.randn(6, 5, 40, device=device), torch.randn(80, device=device)
    for x in (base.transpose(0, 2), base[:, ::2, ::3], base[:1, :1].expand(4, 5, 40)):
        w = weight[: 2 * x.size(-1) : 2]
        dy = torch.randn(x.shape[::-1], device=device).permute(2, 1, 0)
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        actual = computed(x, w, None, dy, backend=backend)
        for ours, theirs in zip(actual, oracle(x, w, None, dy), strict=True):
            assert relative_error(ours, theirs) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("tile", [RowTile(2, 32, 1), RowTile(1, 16, 1)])
def test_offsets_beyond_two_billion(tile: RowTile, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "row_tile", lambda n_columns, largest=0: tile)
    far = 2**30 + 8  # a stride within int32, twice which is not; only the pages that are written become memory
    memory = torch.empty(2 * far + 64, dtype=torch.float16, device=device)
    x, dy = (memory.as_strided((3, 20), (far, 1), offset) for offset in (0, 24))
    for tensor in (x, dy):
        tensor.copy_(torch.randn(3, 20))
    weight = torch.ones(20, dtype=torch.float16, device=device, requires_grad=True)
    x.requires_grad_()
    with watched_memory():
        actual = computed(x, weight, None, dy, backend="triton")
    for ours, theirs in zip(actual, oracle(x, weight, None, dy), strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,), (1, 1)])
def test_no_rows_and_one(backend: str, shape: tuple[int, ...], device: torch.device) -> None:
    x, weight = torch.randn(shape, device=device, requires_grad=True), torch.ones(shape[-1], device=device)
    weight.requires_grad_()
    y = rms_norm(x, weight, eps=EPS, backend=backend)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    torch.testing.assert_close(weight.grad.double(), oracle(x, weight, None, torch.ones_like(y))[2], check_device=False)


@pytest.mark.parametrize("residual", [False, True])
def test_keeps_one_number_a_row(residual: bool, device: torch.device) -> None:
    x, weight, other = drawn(50, 64, device=device), drawn(64, device=device), drawn(50, 64, device=device)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, residual=other if residual else None, backend="triton")
    assert sorted(tuple(t.shape) for t in kept) == [(50,), (50, 64), (64,)]


def test_torch_compile_traces_through(device: torch.device) -> None:
    x, residual = (torch.randn(4, 3, 19, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(19, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.minillm.rms_norm.default, (x, weight, EPS))
    torch.library.opcheck(torch.ops.minillm.add_rms_norm.default, (x, residual, weight, EPS))
    inputs = [t.detach() for t in (x, residual, x, weight)]
    rstd = torch.ones(4, 3, device=device)
    torch.library.opcheck(torch.ops.minillm.rms_norm_backward.default, (*inputs, rstd))
    for dtypes in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        narrow, scale = x.detach().to(dtypes[0]), weight.detach().to(dtypes[1])
        torch.library.opcheck(torch.ops.minillm.rms_norm.default, (narrow, scale, EPS))
        torch.library.opcheck(torch.ops.minillm.add_rms_norm.default, (narrow, narrow, scale, EPS))
        torch.library.opcheck(torch.ops.minillm.rms_norm_backward.default, (narrow, narrow, narrow, scale, rstd))
    compiled = torch.compile(lambda *args: computed(*args, backend="triton"), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(x, weight, residual), oracle(x, weight, residual), strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE[torch.float32]


def test_wrong_input_is_refused() -> None:
    x, weight = torch.ones(2, 3), torch.ones(3)
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.int64"):
        rms_norm(torch.ones(3, dtype=torch.int64), weight)
    with pytest.raises(TypeError, match=r"weight must be floating point, got torch\.int64"):
        rms_norm(x, weight.long())
    with pytest.raises(ValueError, match=r"x must have a last dimension of at least 1, got shape \(2, 0\)"):
        rms_norm(torch.ones(2, 0), torch.ones(0))
    with pytest.raises(ValueError, match=r"weight must be \(3,\) for x \(2, 3\), got shape \(1,\)"):
        rms_norm(x, torch.ones(1))
    with pytest.raises(ValueError, match="eps must be a finite number of at least 0, got -1"):
        rms_norm(x, weight, eps=-1)
    with pytest.raises(TypeError, match="eps must be a number, got '1e-5'"):
        rms_norm(x, weight, eps="1e-5")
    with pytest.raises(ValueError, match="residual must be of the shape and dtype of x"):
        rms_norm(x, weight, residual=torch.ones(3))


def test_tiles() -> None:
    assert row_tile(4096) == RowTile(1, 4096, 8)
    assert row_tile(100_000) == RowTile(1, 16384, 16)
    assert row_tile(128) == RowTile(8, 128, 4)  # a head: eight rows, or most threads would have nothing to do
