"""The grouped matrix product against a matrix gathered for every row, in float64: values, gradients, every counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minillm.kernels import grouped_matmul
from minillm.kernels.compile_only import SHARED_MEMORY, compile_only, recorded_launches
from minillm.kernels.grouped_matmul import launch
from minillm.kernels.testing import TOLERANCE, assert_untouched, guarded, relative_error, watched_memory

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("reference", "torch", "triton")
COUNTS = ([40, 0, 27], [0, 0, 0], [75, 0, 0], [0, 0, 75], [1, 33, 41])


def oracle(
    rows: Tensor, weights: Tensor, counts: Tensor, d_out: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Each row times the matrix of its group, gathered; the matrix of nobody is zero. And the gradients for d_out."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in (rows, weights)]
    group = torch.repeat_interleave(torch.arange(counts.size(0), device=counts.device), counts)
    group = torch.nn.functional.pad(group, (0, rows.size(0) - group.size(0)), value=counts.size(0))
    padded = torch.cat([inputs[1], torch.zeros_like(inputs[1][:1])])
    out = torch.einsum("ri,roi->ro", inputs[0], padded[group])
    return out, () if d_out is None else torch.autograd.grad(out, inputs, d_out.double())


@pytest.mark.parametrize(
    ("counts", "dtype"),
    [*((counts, torch.float32) for counts in COUNTS), *((COUNTS[0], dtype) for dtype in DTYPES[1:])],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend: str, counts: list[int], dtype: torch.dtype, device: torch.device) -> None:
    gap = 8 if backend == "torch" else 3  # torch's operator wants rows of whole 16 bytes
    rows, weights, d_out = (
        guarded(torch.randn(shape, device=device).to(dtype), gap=gap) for shape in ((75, 40), (3, 48, 40), (75, 48))
    )
    rows.requires_grad_()
    weights.requires_grad_()
    sizes = guarded(torch.tensor(counts, device=device))
    with watched_memory(races=dtype is torch.float32):
        out = grouped_matmul(rows, weights, sizes, backend=backend)
        gradients = torch.autograd.grad(out, (rows, weights), d_out)
    expected, expected_gradients = oracle(rows, weights, sizes, d_out)
    assert out.dtype == dtype
    for ours, theirs in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert (ours.dtype, ours.shape) == (dtype, theirs.shape)
        assert relative_error(ours, theirs) <= TOLERANCE[dtype]
    assert not out[sum(counts) :].any()
    assert not gradients[0][sum(counts) :].any()
    assert not gradients[1][sizes == 0].any()
    for tensor in (rows, weights, d_out, sizes):
        assert_untouched(tensor)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 40), st.integers(1, 40), st.integers(1, 40))
def test_any_counts(counts: list[int], beyond: int, d_in: int, d_out: int) -> None:
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = torch.randn(sum(counts) + beyond, d_in, device=device, requires_grad=True)
    weights = torch.randn(len(counts), d_out, d_in, device=device, requires_grad=True)
    gradient, sizes = torch.randn(rows.size(0), d_out, device=device), torch.tensor(counts, device=device)
    out = grouped_matmul(rows, weights, sizes, backend="triton")
    gradients = torch.autograd.grad(out, (rows, weights), gradient)
    expected, expected_gradients = oracle(rows, weights, sizes, gradient)
    for ours, theirs in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)


def test_gradcheck() -> None:
    rows, weights = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((7, 3), (3, 2, 3)))
    counts = torch.tensor([2, 0, 4])
    assert torch.autograd.gradcheck(lambda r, w: grouped_matmul(r, w, counts), (rows, weights))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_second_derivatives(backend: str, device: torch.device) -> None:
    rows, weights = (torch.randn(s, device=device, requires_grad=True) for s in ((9, 4), (3, 5, 4)))
    counts = torch.tensor([4, 0, 3], device=device)

    def penalty(out: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(out.pow(3).sum(), (rows, weights), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), (rows, weights))

    ours = penalty(grouped_matmul(rows, weights, counts, backend=backend), rows, weights)
    wide = [tensor.detach().double().requires_grad_() for tensor in (rows, weights)]
    theirs = penalty(grouped_matmul(*wide, counts), *wide)
    group = torch.tensor([0] * 4 + [2] * 3, device=device)
    by_hand = penalty(torch.einsum("ri,roi->ro", wide[0][:7], wide[1][group]), *wide)
    for one, two, three in zip(ours, theirs, by_hand, strict=True):
        assert relative_error(one, three) <= 1e-5
        assert relative_error(two, three) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_any_kind(backend: str, device: torch.device) -> None:
    counts = torch.tensor([5, 0, 9, 0, 3], device=device)[::2]
    views = (
        (torch.randn(16, 20, device=device).T, torch.randn(3, 16, 8, device=device).mT),
        (torch.randn(20, 2, 16, device=device)[:, 1], torch.randn(8, 3, 16, device=device).transpose(0, 1)),
        (torch.randn(1, 16, device=device).expand(20, 16), torch.randn(1, 8, 16, device=device).expand(3, 8, 16)),
    )
    for rows, weights in views:
        rows.requires_grad_()
        weights.requires_grad_()
        out = grouped_matmul(rows, weights, counts, backend=backend)
        expected, expected_gradients = oracle(rows, weights, counts, torch.ones_like(out))
        gradients = torch.autograd.grad(out.sum(), (rows, weights))  # a gradient of stride 0
        for ours, theirs in zip((out, *gradients), (expected, *expected_gradients), strict=True):
            assert relative_error(ours, theirs) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize(("n_rows", "d_in", "d_out"), [(0, 4, 4), (6, 0, 4), (6, 4, 0)])
def test_nothing_to_do(backend: str, n_rows: int, d_in: int, d_out: int, device: torch.device) -> None:
    rows = torch.randn(n_rows, d_in, device=device, requires_grad=True)
    weights = torch.randn(2, d_out, d_in, device=device, requires_grad=True)
    out = grouped_matmul(rows, weights, torch.tensor([n_rows // 2, 0], device=device), backend=backend)
    out.sum().backward()
    assert out.shape == (n_rows, d_out)
    assert not out.any()
    assert (rows.grad.shape, weights.grad.shape) == (rows.shape, weights.shape)
    assert not weights.grad.any()


def test_offsets_beyond_two_billion(device: torch.device) -> None:
    far = 2**30 + 8  # a stride within int32, twice which is not; only the pages that are written become memory
    memory = torch.empty(33 * (far // 15), dtype=torch.float16, device=device)
    rows, d_out = memory.as_strided((33, 20), (far // 15, 1), 0), memory.as_strided((33, 5), (far // 15, 1), 20)
    weights = memory.as_strided((3, 5, 20), (far, 20, 1), 64)
    for tensor in (rows, d_out, weights):
        tensor.copy_(torch.randn(tensor.shape))
    counts = torch.tensor([0, 0, 33], device=device)
    expected, gradients = oracle(rows, weights, counts, d_out)
    with watched_memory(races=False):
        out = grouped_matmul(rows, weights, counts, backend="triton")
        d_weights = launch.triton_grouped_outer_products(d_out, rows, counts)
    assert relative_error(out, expected) <= TOLERANCE[torch.float16]
    assert relative_error(d_weights, gradients[1]) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize("counts", [[-5, 3], [50, 50], [2**40, 1], [-(2**40), 2**40], [3, 2**62], [2**63 - 1] * 2])
def test_counts_that_cannot_be_lead_nowhere(counts: list[int], device: torch.device) -> None:
    # on a GPU nobody looks at them: the operators themselves must stay inside
    rows, weights, d_out = (guarded(torch.randn(s, device=device)) for s in ((40, 5), (2, 6, 5), (40, 6)))
    sizes = torch.tensor(counts, device=device)
    with watched_memory():
        launch.triton_grouped_matmul(rows, weights, sizes)
        launch.triton_grouped_outer_products(d_out, rows, sizes)


def test_autocast(device: torch.device) -> None:
    rows, weights = (torch.randn(s, device=device, requires_grad=True) for s in ((12, 16), (2, 8, 16)))
    counts = torch.tensor([5, 6], device=device)
    for backend in BACKENDS:
        with torch.autocast(device.type, torch.bfloat16):
            out = grouped_matmul(rows, weights, counts, backend=backend)
        gradients = torch.autograd.grad(out.float().pow(2).sum(), (rows, weights))
        assert out.dtype is torch.bfloat16
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        assert relative_error(out, oracle(rows, weights, counts)[0]) <= TOLERANCE[torch.bfloat16]


def test_torch_compile_traces_through(device: torch.device) -> None:
    rows, weights = (torch.randn(s, device=device, requires_grad=True) for s in ((9, 12), (2, 8, 12)))
    counts = torch.tensor([4, 3], device=device)
    torch.library.opcheck(torch.ops.minillm.grouped_matmul.default, (rows, weights, counts))
    left = torch.randn(9, 8, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.minillm.grouped_outer_products.default, (left, rows, counts))

    def run(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        return grouped_matmul(rows, weights, counts, backend="triton")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    d_out = torch.randn(9, 8, device=device)
    for stance, sizes in (("default", counts), ("fail_on_recompile", torch.tensor([0, 9], device=device))):
        with torch.compiler.set_stance(stance):  # other counts, the same program
            out = compiled(rows, weights, sizes)
            gradients = torch.autograd.grad(out, (rows, weights), d_out)
        expected, expected_gradients = oracle(rows, weights, sizes, d_out)
        for ours, theirs in zip((out, *gradients), (expected, *expected_gradients), strict=True):
            assert relative_error(ours, theirs) <= TOLERANCE[torch.float32]


def test_wrong_input_is_refused() -> None:
    rows, weights, counts = torch.randn(6, 4), torch.randn(2, 3, 4), torch.tensor([2, 3])
    for arguments, message in (
        ((rows, rows, counts), r"weights must be \(n_groups >= 1, d_out, d_in\), got \(6, 4\)"),
        ((rows, weights[:0], counts), r"weights must be \(n_groups >= 1"),
        ((rows.T, weights, counts), r"rows must be \(n_rows, d_in=4\) for weights \(2, 3, 4\), got \(4, 6\)"),
        ((rows, weights, counts.int()), r"counts must be int64 \(n_groups=2,\), got torch\.int32 \(2,\)"),
        ((rows, weights, counts[:1]), r"counts must be int64 \(n_groups=2,\), got torch\.int64 \(1,\)"),
        ((rows, weights, counts + 1), r"counts must be at least 0 and at most 6 rows in all, got \[3, 4\]"),
        ((rows, weights, counts - 3), r"counts must be at least 0 and at most 6 rows in all, got \[-1, 0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            grouped_matmul(*arguments)
    with pytest.raises(TypeError, match=r"one floating-point type, got torch\.float16 and torch\.float32"):
        grouped_matmul(rows.half(), weights, counts)
    with pytest.raises(TypeError, match="one floating-point type"):
        grouped_matmul(rows.long(), weights.long(), counts)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="one floating-point type"):
        grouped_matmul(rows.long(), weights, counts)
    for tensors, backend, reason in (
        ((rows.double(), weights.double()), "triton", "multiply float32, float16 and bfloat16, got float64"),
        ((rows.double(), weights.double()), "torch", "takes float32, float16 and bfloat16, got float64"),
        ((rows, weights), "torch", "must be multiples of 4 for torch.float32, got 4 and 3"),
        ((rows[:0], weights), "torch", "takes no empty tensors"),
    ):
        sizes = counts if len(tensors[0]) else counts * 0
        with pytest.raises(ValueError, match=f"backend='{backend}' cannot be used: .*{reason}"):
            grouped_matmul(*tensors, sizes, backend=backend)


def test_the_compiler_accepts_it(device: torch.device) -> None:
    rows, weights, d_out = (
        torch.empty(s, dtype=torch.bfloat16) for s in ((4096, 2048), (64, 1024, 2048), (4096, 1024))
    )
    counts = torch.zeros(64, dtype=torch.int64)
    with recorded_launches(80) as ampere:  # its other loop is the one that the linear map's test compiles
        launch.triton_grouped_outer_products(d_out, rows, counts)
    with recorded_launches(90) as hopper:
        launch.triton_grouped_matmul(rows, weights, counts)
        launch.triton_grouped_outer_products(d_out, rows, counts)
    for compiled in compile_only([*ampere, *hopper]):
        assert compiled.count("wgmma.mma_async" if compiled.capability == 90 else "mma.sync") > 0
        assert compiled.count("cp.async") > 0
        assert compiled.spilled == 0
        assert compiled.shared <= SHARED_MEMORY[90 if compiled.capability == 90 else 89]


@pytest.mark.gpu
def test_one_launch_and_no_wait_whatever_the_counts(device: torch.device) -> None:
    rows = torch.randn(500, 64, dtype=torch.bfloat16, device=device)
    weights = torch.randn(8, 96, 64, dtype=torch.bfloat16, device=device)
    counts = torch.tensor([0, 300, 0, 50, 0, 100, 1, 0], device=device)
    expected, _ = oracle(rows, weights, counts)
    launch.triton_grouped_matmul(rows, weights, counts)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = grouped_matmul(rows, weights, counts, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    error = relative_error(grouped_matmul(rows, weights, counts, backend="torch"), expected)
    assert relative_error(out, expected) <= 2 * error
