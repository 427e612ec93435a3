"""Linear cross-entropy against the two operations in float64, with all logits: values, gradients, and the memory."""

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from minillm.kernels import linear_cross_entropy
from minillm.kernels.compile_only import SHARED_MEMORY, compile_only, recorded_launches
from minillm.kernels.cross_entropy.reference import LossTerms
from minillm.kernels.linear_cross_entropy import launch
from minillm.kernels.linear_cross_entropy.launch import triton_linear_cross_entropy
from minillm.kernels.linear_cross_entropy.reference import default_chunk_rows, linear_cross_entropy_reference
from minillm.kernels.testing import TOLERANCE, assert_untouched, guarded, relative_error, watched_memory
from minillm.kernels.tile_sizes import TileSizes, candidates

TORCH = pytest.param(
    "torch", marks=pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has none")
)
BACKENDS = ("reference", TORCH, "triton")
PLAIN: dict[str, Any] = {}
EVERYTHING = {"label_smoothing": 0.2, "z_loss": 1e-2, "logit_softcap": 3.0, "ignore_index": 2, "reduction": "sum"}


def oracle(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_rows: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """All logits, and torch's loss of them."""
    z = F.linear(x, weight, bias)
    z = z if logit_softcap is None else logit_softcap * torch.tanh(z / logit_softcap)
    losses = F.cross_entropy(z, targets, ignore_index=ignore_index, reduction="none", **kwargs)
    counted = targets != ignore_index
    losses = losses + z_loss * z.logsumexp(1) ** 2 * counted
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / counted.sum()}[reduction]


def expected(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dloss: Tensor, **kwargs: Any
) -> tuple[Tensor, ...]:
    """The oracle's loss and its gradients in float64."""
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias) if t is not None]
    loss = oracle(wide[0], wide[1], targets, bias=wide[2] if len(wide) > 2 else None, **kwargs)
    return (loss, *torch.autograd.grad(loss, wide, dloss.double()))


def inputs(
    n: int, d_model: int, n_classes: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, targets; one target is the last class."""
    x = torch.randn(n, d_model, device=device)
    weight = torch.randn(n_classes, d_model, device=device) / 2
    bias = torch.randn(n_classes, device=device)
    targets = torch.randint(0, n_classes, (n,), device=device)
    targets[0] = n_classes - 1
    return x.to(dtype), weight.to(dtype), bias.to(dtype), targets


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "has_bias"),
    [(PLAIN, False), ({"reduction": "none", "chunk_rows": 20}, True), ({**EVERYTHING, "chunk_rows": 33}, True)],
    ids=["plain", "chunks", "everything"],
)
def test_values_and_gradients(
    backend: str, dtype: torch.dtype, options: dict[str, Any], has_bias: bool, device: torch.device
) -> None:
    if backend == "torch" and (dtype is not torch.float32 or "z_loss" in options):
        pytest.skip("torch's has none of this")
    x, weight, bias, targets = inputs(45, 40, 75, dtype, device)  # 2 x 3 tiles of 32 and two steps, all with edges
    targets[3] = options.get("ignore_index", -100)
    x, weight, bias, targets = (guarded(tensor) for tensor in (x, weight, bias, targets))
    chosen = (x, weight, bias) if has_bias else (x, weight)
    for tensor in chosen:
        tensor.requires_grad_()
    dloss = torch.randn((45,) if options.get("reduction") == "none" else (), device=device)
    want = expected(x, weight, bias if has_bias else None, targets, dloss, **options)
    with watched_memory():
        loss = linear_cross_entropy(x, weight, targets, bias=bias if has_bias else None, backend=backend, **options)
        gradients = torch.autograd.grad(loss, chosen, dloss)
    assert loss.dtype is torch.float32
    assert relative_error(loss, want[0]) <= TOLERANCE[torch.float32]
    for gradient, exact, tensor in zip(gradients, want[1:], chosen, strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, exact) <= TOLERANCE[dtype]
        assert_untouched(tensor)
    assert_untouched(targets)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 12),
    n_classes=st.integers(1, 20),
    chunk_rows=st.integers(1, 13),
    smoothing=st.sampled_from([0.0, 0.3]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_chunks_of_any_size_give_what_all_logits_give(seed, n, n_classes, chunk_rows, smoothing, reduction):
    torch.manual_seed(seed)
    x, weight, bias, targets = inputs(n, 5, n_classes, torch.float64, torch.device("cpu"))
    targets[n // 2] = -100 if n > 1 else targets[0]
    options = {"label_smoothing": smoothing, "reduction": reduction, "chunk_rows": chunk_rows}
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets, bias=bias, backend="reference", **options)
    dloss = torch.randn_like(loss)
    want = expected(x, weight, bias, targets, dloss, **options)
    for a, b in zip((loss, *torch.autograd.grad(loss, (x, weight, bias), dloss)), want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("options", [PLAIN, {**EVERYTHING, "reduction": "none"}], ids=["plain", "everything"])
def test_gradcheck(options: dict[str, Any]) -> None:
    x, weight, bias, targets = inputs(4, 3, 5, torch.float64, torch.device("cpu"))
    for tensor in (x, weight, bias):
        tensor.requires_grad_()

    def loss(*args: Tensor) -> Tensor:
        return linear_cross_entropy(
            args[0], args[1], targets, bias=args[2], chunk_rows=3, backend="reference", **options
        )

    assert torch.autograd.gradcheck(loss, (x, weight, bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_weight_gets_no_gradient_and_a_tied_one_both(backend: str, device: torch.device) -> None:
    x, weight, bias, targets = inputs(9, 20, 35, torch.float32, device)
    want = expected(x, weight, bias, targets, torch.ones(()))
    for which in range(3):  # only one of x, weight and bias learns
        chosen = [tensor.detach().requires_grad_(i == which) for i, tensor in enumerate((x, weight, bias))]
        linear_cross_entropy(chosen[0], chosen[1], targets, bias=chosen[2], backend=backend).backward()
        assert [tensor.grad is not None for tensor in chosen] == [i == which for i in range(3)]
        assert relative_error(chosen[which].grad, want[1 + which]) <= TOLERANCE[torch.float32]

    def tied(loss: Any, embedding: Tensor) -> Tensor:
        hidden = embedding[targets].tanh()
        return torch.autograd.grad(loss(hidden, embedding, targets), embedding)[0]

    got = tied(lambda *args: linear_cross_entropy(*args, backend=backend), weight.clone().requires_grad_())
    exact = tied(oracle, weight.double().requires_grad_())
    assert relative_error(got, exact) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_and_scaled_is_the_same(backend: str, device: torch.device) -> None:
    x, weight, bias, targets = inputs(9, 20, 35, torch.float32, device)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets, bias=bias, backend=backend)
    once = torch.autograd.grad(loss, (x, weight, bias), retain_graph=True)
    scaled = torch.autograd.grad(loss * 1024, (x, weight, bias))  # as loss scaling does
    for a, b in zip(once, scaled, strict=True):
        torch.testing.assert_close(a * 1024, b, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_weights_gradient_is_added_up_in_float32(backend: str, device: torch.device) -> None:
    # 32 chunks of one row: added in bfloat16, the sum would be rounded 32 times.
    x, weight, _, targets = inputs(32, 16, 4, torch.bfloat16, device)
    x = x.abs()  # so that the parts do not cancel
    targets[:] = 1
    weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets, chunk_rows=1, reduction="sum", backend=backend)
    (dweight,) = torch.autograd.grad(loss, weight)
    want = expected(x, weight, None, targets, torch.ones(()), reduction="sum")[2]
    assert relative_error(dweight, want) <= 2**-8  # one rounding, and those of the rows' own gradients


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_far_below_the_logits(
    backend: str, device: torch.device, peak_bytes: Callable[[Callable[[], object]], int]
) -> None:
    n, d_model, n_classes, chunk_rows = 256, 8, 1000, 16
    x, weight, _, targets = inputs(n, d_model, n_classes, torch.float32, device)
    x.requires_grad_(), weight.requires_grad_()

    def run(loss: Any) -> int:
        if device.type == "cpu":
            return peak_bytes(lambda: torch.autograd.grad(loss(x, weight, targets), (x, weight)))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(loss(x, weight, targets), (x, weight))
        return torch.cuda.max_memory_allocated() - before

    logits, gradients = 4 * n * n_classes, 4 * (n + n_classes) * d_model
    assert run(oracle) >= 2 * logits  # the measurement sees them: logits and their gradient
    large = TileSizes(64, 128, 16, num_warps=4, num_stages=1)  # the interpreter's time is the same for any tile
    with mock.patch.object(launch, "tile_sizes", return_value=large):
        ours = run(lambda *args: linear_cross_entropy(*args, chunk_rows=chunk_rows, backend=backend))
    # 16 chunks: a few tensors as large as one chunk's logits, and the gradients
    assert ours <= 4 * logits / 16 + 3 * gradients
    assert ours <= logits / 3


def test_half_precision_logits_are_not_rounded(device: torch.device) -> None:
    # Logits around 100 in bfloat16 are off by up to 0.25, and so would be a loss made from them.
    x, weight, _, targets = inputs(20, 32, 50, torch.bfloat16, device)
    x = x * 16
    want = oracle(x.double(), weight.double(), targets, reduction="none")
    rounded = oracle(x, weight, targets, reduction="none")
    for backend in ("reference", "triton"):
        losses = linear_cross_entropy(x, weight, targets, reduction="none", backend=backend)
        assert relative_error(losses, want) <= TOLERANCE[torch.float32]
        assert relative_error(losses, want) <= relative_error(rounded, want) / 100


def test_autocast_is_that_of_a_linear_layer(device: torch.device) -> None:
    x, weight, _, targets = inputs(10, 16, 20, torch.float32, device)
    weight.requires_grad_()
    half = [tensor.detach().bfloat16() for tensor in (x, weight)]
    for backend in ("reference", "triton"):
        with torch.autocast(device.type, torch.bfloat16):
            loss = linear_cross_entropy(x, weight, targets, backend=backend)
            (dweight,) = torch.autograd.grad(loss, weight)
        assert loss.item() == linear_cross_entropy(*half, targets, backend=backend).item()
        assert dweight.dtype is torch.float32
        assert relative_error(dweight, expected(*half, None, targets, torch.ones(()))[2]) <= TOLERANCE[torch.bfloat16]
    for wrong in (weight.double(), weight.long()):  # which autocast leaves alone
        with torch.autocast(device.type, torch.bfloat16), pytest.raises(TypeError, match="one floating-point dtype"):
            linear_cross_entropy(x, wrong, targets)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_second_derivative_is_refused(backend: str, device: torch.device) -> None:
    x, weight, _, targets = inputs(4, 16, 7, torch.float32, device)
    x.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets, backend=backend)
    dx, dweight = torch.autograd.grad(loss, (x, weight), create_graph=True)
    assert relative_error(dx, expected(x, weight, None, targets, torch.ones(()))[1]) <= TOLERANCE[torch.float32]
    for gradient in (dx, dweight):
        with pytest.raises(RuntimeError, match=r"differentiable once|no autograd formula"):
            torch.autograd.grad(gradient.square().sum(), x, retain_graph=True)


def test_a_mean_over_no_target_and_classes_that_are_none(device: torch.device) -> None:
    x, weight, _, targets = inputs(4, 16, 7, torch.float32, device)
    x.requires_grad_()
    for backend in ("reference", "torch", "triton"):
        if backend == "torch" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
            continue
        nothing = linear_cross_entropy(x, weight, torch.full_like(targets, -100), backend=backend)
        assert nothing.isnan()
        assert torch.equal(torch.autograd.grad(nothing, x)[0], torch.zeros_like(x))
    targets = torch.tensor([7, -1, 6, -100], device=device)  # as on a GPU, where they cannot be refused
    for losses in (
        triton_linear_cross_entropy(x, weight, None, targets, -100, 0.0, 0.0, 0.0, 4)[0],
        linear_cross_entropy_reference(x, weight, None, targets, LossTerms(), 4),
    ):
        assert losses.isnan().tolist() == [True, True, False, False]
        assert torch.autograd.grad(losses.sum(), x)[0].isnan().all(1).tolist() == [True, True, False, False]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_nothing_to_do_and_strides_of_any_kind(backend: str, device: torch.device) -> None:
    x, weight, bias, targets = inputs(6, 24, 10, torch.float32, device)
    empty = x[:0].clone().requires_grad_()
    weight.requires_grad_()
    total = linear_cross_entropy(empty, weight, targets[:0], reduction="sum", backend=backend)
    gradients = torch.autograd.grad(total, (empty, weight))
    assert total.item() == 0.0
    assert torch.equal(gradients[1], torch.zeros_like(weight))
    assert linear_cross_entropy(empty, weight, targets[:0], backend=backend).isnan()
    wide = torch.randn(24, 12, device=device)
    for some, matrix in ((wide.t()[::2], weight), (x, wide[:, :10].t()), (x[:1].expand(6, 24), weight.flip(0))):
        got = linear_cross_entropy(some, matrix, targets, bias=bias.flip(0), backend=backend)
        want = oracle(some.double(), matrix.double(), targets, bias=bias.flip(0).double())
        assert relative_error(got, want) <= TOLERANCE[torch.float32]


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    far = 2**30 + 8  # a stride within int32, twice which is not; only the pages that are written become memory
    memory = torch.empty(2 * far + 40, dtype=torch.float16, device=device)
    x, weight = (memory.as_strided((3, 20), (far, 1), offset).copy_(torch.randn(3, 20)) for offset in (0, 20))
    bias, targets = torch.randn(3, device=device).half().requires_grad_(), torch.tensor([2, 0, 1], device=device)
    with watched_memory(races=False):
        loss = linear_cross_entropy(x, weight, targets, bias=bias, backend="triton")
        (dbias,) = torch.autograd.grad(loss, bias)
    want = expected(x, weight, bias, targets, torch.ones(()))
    assert relative_error(loss, want[0]) <= TOLERANCE[torch.float32]
    assert relative_error(dbias, want[3]) <= TOLERANCE[torch.float16]


def test_torch_compile_traces_through(device: torch.device) -> None:
    x, weight, bias, targets = inputs(5, 16, 11, torch.float32, device)
    x.requires_grad_(), weight.requires_grad_()
    arguments = (x, weight, bias, targets, -100, 0.1, 1e-4, 0.0, 3)
    torch.library.opcheck(torch.ops.minillm.linear_cross_entropy.default, arguments)
    want = expected(2 * x, weight, bias, targets, torch.ones(()))
    compiled = torch.compile(
        lambda x: linear_cross_entropy(2 * x, weight, targets, bias=bias, backend="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    loss = compiled(x)
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    for got, exact in ((loss, want[0]), (dx, 2 * want[1]), (dweight, want[2])):
        assert relative_error(got, exact) <= TOLERANCE[torch.float32]


def test_chunks_are_as_large_as_the_hidden_states():
    assert default_chunk_rows(100_000, 4096, 128_000) == 3200
    assert default_chunk_rows(8192, 4096, 128_000) == 262
    assert default_chunk_rows(100, 512, 50_000) == 256


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (ValueError, r"x must be \(n, d_model\) .* got shapes \(4,\) and \(3, 8\)", {"x": torch.zeros(4)}),
        (ValueError, r"got shapes \(4, 8\) and \(3, 9\)", {"weight": torch.zeros(3, 9)}),
        (ValueError, r"at least one class, got shapes \(4, 8\) and \(0, 8\)", {"weight": torch.zeros(0, 8)}),
        (ValueError, r"bias must be \(3,\), one number a class, got shape \(8,\)", {"bias": torch.zeros(8)}),
        (
            TypeError,
            r"one floating-point dtype, got torch.float16, torch.float32",
            {"weight": torch.zeros(3, 8).half()},
        ),
        (ValueError, "chunk_rows must be at least 1, or None, got 0", {"chunk_rows": 0}),
        (TypeError, r"chunk_rows must be an integer, or None, got 2\.0", {"chunk_rows": 2.0}),
        (ValueError, r"targets must be in \[0, 3\) or ignore_index=-100, got 3", {"targets": torch.full((4,), 3)}),
        (ValueError, "reduction must be one of", {"reduction": "max"}),
        (ValueError, "'torch' cannot be used: .*torch", {"z_loss": 1e-4, "backend": "torch"}),
        (
            ValueError,
            "'triton' cannot be used: the kernels calculate in float32, and x is float64",
            {"x": torch.zeros(4, 8).double(), "weight": torch.zeros(3, 8).double(), "backend": "triton"},
        ),
    ],
)
def test_wrong_input_is_refused(error: type[Exception], match: str, changes: dict[str, Any]) -> None:
    arguments = {"x": torch.zeros(4, 8), "weight": torch.zeros(3, 8), "targets": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=match):
        linear_cross_entropy(**(arguments | changes))


def test_the_compiler_accepts_it(device: torch.device) -> None:
    x, weight, bias, targets = inputs(256, 1024, 2048, torch.bfloat16, torch.device("cpu"))
    x.requires_grad_()
    launches, options = [], {"label_smoothing": 0.1, "z_loss": 1e-4, "backend": "triton"}
    for capability in (80, 90):
        largest = candidates(torch.bfloat16, capability)[0]
        with recorded_launches(capability) as recorded, mock.patch.object(launch, "tile_sizes", return_value=largest):
            torch.autograd.grad(linear_cross_entropy(x, weight, targets, bias=bias, **options), x)
        launches += recorded
    for compiled in compile_only(launches):
        assert compiled.spilled == 0
        assert compiled.shared <= (SHARED_MEMORY[90] if compiled.capability == 90 else min(SHARED_MEMORY.values()))
        assert compiled.count("wgmma.mma_async" if compiled.capability == 90 else "mma.sync")
        assert compiled.count("cp.async")
    assert math.prod(launches[0].grid) > 1
