"""Cross-entropy against torch's in float64: reference, kernels, and what the compiler makes of them."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from minillm.kernels import cross_entropy
from minillm.kernels.compile_only import SHARED_MEMORY, compile_only, recorded_launches
from minillm.kernels.cross_entropy.launch import triton_cross_entropy
from minillm.kernels.cross_entropy.reference import LossTerms, cross_entropy_gradient, cross_entropy_reference
from minillm.kernels.testing import TOLERANCE, assert_untouched, guarded, relative_error, watched_memory

BACKENDS = ("reference", "torch", "triton")
PLAIN: dict[str, Any] = {}
SMOOTHED = {"label_smoothing": 0.1, "reduction": "sum"}
EVERYTHING = {"label_smoothing": 0.2, "z_loss": 1e-2, "logit_softcap": 3.0, "reduction": "none", "ignore_index": 2}


def oracle(
    logits: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    **kwargs: Any,
) -> Tensor:
    """torch's loss in float64, and what torch does not have written out."""
    z = logits.double()
    z = z if logit_softcap is None else logit_softcap * torch.tanh(z / logit_softcap)
    losses = F.cross_entropy(z, targets, ignore_index=ignore_index, reduction="none", **kwargs)
    counted = targets != ignore_index
    losses = losses + z_loss * z.logsumexp(1) ** 2 * counted
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / counted.sum()}[reduction]


def gradient(logits: Tensor, targets: Tensor, dloss: Tensor, **kwargs: Any) -> Tensor:
    wide = logits.detach().double().requires_grad_()
    return torch.autograd.grad(oracle(wide, targets, **kwargs), wide, dloss.double())[0]


def some_targets(n: int, n_classes: int, device: torch.device) -> Tensor:
    targets = torch.randint(0, n_classes, (n,), device=device)
    targets[0] = n_classes - 1
    return targets


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [PLAIN, SMOOTHED, EVERYTHING], ids=["plain", "smoothed", "everything"])
@pytest.mark.parametrize(("n", "n_classes"), [(5, 37), (3, 4103)])
def test_values_and_gradients(
    backend: str, dtype: torch.dtype, options: dict[str, Any], n: int, n_classes: int, device: torch.device
) -> None:
    if backend == "torch" and options is EVERYTHING:
        pytest.skip("torch has no z_loss")
    logits = guarded((torch.randn(n, n_classes, device=device) * 3).to(dtype)).requires_grad_()
    before = logits.detach().clone()
    targets = some_targets(n, n_classes, device)
    targets[1] = options.get("ignore_index", -100)
    targets = guarded(targets)
    expected = oracle(logits, targets, **options)
    dloss = torch.randn(expected.shape, device=device)
    with watched_memory():
        loss = cross_entropy(logits, targets, backend=backend, **options)
        (dlogits,) = torch.autograd.grad(loss, logits, dloss.to(loss.dtype))
    wide = torch.promote_types(dtype, torch.float32)
    assert loss.dtype == wide
    assert dlogits.dtype == dtype
    assert relative_error(loss, expected) <= TOLERANCE[wide]
    assert relative_error(dlogits, gradient(logits, targets, dloss, **options)) <= TOLERANCE[dtype]
    assert torch.equal(logits, before)  # the gradient is not written over the logits
    assert_untouched(logits)
    assert_untouched(targets)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 6),
    n_classes=st.integers(1, 40),
    magnitude=st.sampled_from([0.0, 1.0, 100.0]),
    smoothing=st.sampled_from([0.0, 0.3, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    ignored=st.booleans(),
)
def test_the_reference_equals_torchs(seed, n, n_classes, magnitude, smoothing, reduction, ignored):
    torch.manual_seed(seed)
    logits = (torch.randn(n, n_classes, dtype=torch.float64) * magnitude).requires_grad_()
    targets = torch.randint(0, n_classes, (n,))
    if ignored and n > 1:
        targets[-1] = -7
    options = {"label_smoothing": smoothing, "reduction": reduction, "ignore_index": -7}
    loss = cross_entropy(logits, targets, backend="reference", **options)
    expected = F.cross_entropy(logits, targets, **options)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    dloss = torch.randn_like(loss)
    got, want = (torch.autograd.grad(value, logits, dloss)[0] for value in (loss, expected))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    # the closed form, which the linear cross-entropy builds on, is this gradient too
    terms = LossTerms(-7, smoothing)
    losses, lse = cross_entropy_reference(logits, targets, terms)
    dlosses = torch.randn_like(losses)
    closed = cross_entropy_gradient(logits.detach(), targets, lse, dlosses, terms)
    torch.testing.assert_close(closed, torch.autograd.grad(losses, logits, dlosses)[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_of_minus_infinity_and_large_logits(backend: str, device: torch.device) -> None:
    logits = torch.randn(4, 5000, device=device) * 1e4  # exp(1e4) is infinite: the maximum must come off first
    logits[0, :4500] = -math.inf  # the first block has nothing
    logits[1, 7:] = -math.inf
    targets = torch.tensor([4999, 3, 0, 1], device=device)
    logits.requires_grad_()
    losses = cross_entropy(logits, targets, reduction="none", backend=backend)
    (dlogits,) = torch.autograd.grad(losses.sum(), logits)
    assert relative_error(losses, oracle(logits, targets, reduction="none")) <= TOLERANCE[torch.float32]
    assert (
        relative_error(dlogits, gradient(logits, targets, torch.ones(()), reduction="sum")) <= 2e-3
    )  # of exp(1e4 eps)
    assert not dlogits.isnan().any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_minus_infinity_has_no_loss_as_in_torch(backend: str, device: torch.device) -> None:
    logits = torch.zeros(2, 9, device=device)
    logits[0] = -math.inf
    losses = cross_entropy(logits, torch.tensor([3, 3], device=device), reduction="none", backend=backend)
    assert losses.isnan().tolist() == [True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mean_over_no_target_is_nan_and_has_no_gradient(backend: str, device: torch.device) -> None:
    logits = torch.randn(3, 8, device=device)
    if backend == "triton":
        logits[1] = math.nan  # the kernels do not look at ignored rows
    logits.requires_grad_()
    targets = torch.full((3,), -1, device=device)
    assert cross_entropy(logits, targets, ignore_index=-1, reduction="sum", backend=backend).item() == 0.0
    mean = cross_entropy(logits, targets, ignore_index=-1, backend=backend)
    assert mean.isnan()
    (dlogits,) = torch.autograd.grad(mean, logits)
    assert torch.equal(dlogits, torch.zeros_like(dlogits))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_any_kind(backend: str, device: torch.device) -> None:
    x = torch.randn(20, 30, device=device)
    targets = torch.randint(0, 10, (60,), device=device)
    for view, some in (
        (x.t(), targets[::2]),
        (x[::3, ::2], targets[:7]),
        (x[:1].expand(6, 30), targets[:1].expand(6)),
        (x[:4].flip(0), targets[1:5]),
    ):
        view = view.detach().requires_grad_()
        loss = cross_entropy(view, some, backend=backend)
        assert relative_error(loss, oracle(view, some)) <= TOLERANCE[torch.float32]
        (dlogits,) = torch.autograd.grad(loss, view)
        assert relative_error(dlogits, gradient(view, some, torch.ones(()))) <= TOLERANCE[torch.float32]


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    far = 2**30 + 8  # a stride within int32, twice which is not; only the pages that are written become memory
    logits = torch.empty(2 * far + 20, dtype=torch.float16, device=device).as_strided((3, 20), (far, 1))
    logits.copy_(torch.randn(3, 20))
    targets = torch.tensor([3, 19, 0], device=device)
    logits.requires_grad_()
    with watched_memory(races=False):
        losses = cross_entropy(logits, targets, reduction="none", backend="triton")
        (dlogits,) = torch.autograd.grad(losses.sum(), logits)
    assert relative_error(losses, oracle(logits, targets, reduction="none")) <= TOLERANCE[torch.float32]
    assert relative_error(dlogits, gradient(logits, targets, torch.ones(()), reduction="sum")) <= 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend: str, device: torch.device) -> None:
    logits = torch.empty(0, 5, device=device, requires_grad=True)
    targets = torch.empty(0, dtype=torch.int64, device=device)
    assert cross_entropy(logits, targets, reduction="none", backend=backend).shape == (0,)
    assert cross_entropy(logits, targets, backend=backend).isnan()
    total = cross_entropy(logits, targets, reduction="sum", backend=backend)
    total.backward()
    assert total.item() == 0.0
    assert logits.grad.shape == (0, 5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_gradcheck(backend: str, device: torch.device) -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)
    targets = torch.tensor([4, 2, 0], device=device)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, targets, backend=backend, **EVERYTHING), (logits,))


def test_a_target_that_is_no_class_gives_nan_where_it_cannot_be_refused(device: torch.device) -> None:
    logits = torch.randn(4, 11, device=device, requires_grad=True)
    targets = torch.tensor([11, -5, 10, -100], device=device)  # behind, before, the last class, ignored
    for losses in (
        triton_cross_entropy(logits, targets, -100, 0.0, 0.0, 0.0)[0],
        cross_entropy_reference(logits, targets, LossTerms())[0],
    ):
        (dlogits,) = torch.autograd.grad(losses.sum(), logits)
        assert losses.isnan().tolist() == [True, True, False, False]
        assert dlogits.isnan().all(1).tolist() == [True, True, False, False]
        assert not dlogits[2:].isnan().any()


def test_torch_compile_traces_through(device: torch.device) -> None:
    logits = torch.randn(3, 19, device=device, requires_grad=True)
    targets = torch.randint(0, 19, (3,), device=device)
    torch.library.opcheck(torch.ops.minillm.cross_entropy.default, (logits, targets, -100, 0.1, 1e-4, 0.0))
    compiled = torch.compile(
        lambda x: cross_entropy(2 * x, targets, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    loss = compiled(logits)
    (dlogits,) = torch.autograd.grad(loss, logits)
    assert relative_error(loss, oracle(2 * logits, targets)) <= TOLERANCE[torch.float32]
    assert relative_error(dlogits, 2 * gradient(2 * logits, targets, torch.ones(()))) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (ValueError, r"logits must be \(n, n_classes\) .* got shape \(4,\)", {"logits": torch.zeros(4)}),
        (ValueError, r"at least one class, got shape \(4, 0\)", {"logits": torch.zeros(4, 0)}),
        (TypeError, r"logits must be floating point, got torch\.int64", {"logits": torch.zeros(4, 3).long()}),
        (TypeError, r"targets must be int64 class indices, got torch\.int32", {"targets": torch.zeros(4).int()}),
        (ValueError, r"one class for each of the 4 rows, got shape \(3,\)", {"targets": torch.zeros(3).long()}),
        (ValueError, r"in \[0, 3\) or ignore_index=-100, got 3", {"targets": torch.tensor([0, 3, 1, 7])}),
        (
            ValueError,
            r"in \[0, 3\) or ignore_index=5, got -100",
            {"targets": torch.full((4,), -100), "ignore_index": 5},
        ),
        (TypeError, "ignore_index must be an integer, got None", {"ignore_index": None}),
        (ValueError, r"label_smoothing must be in \[0, 1\], got 1.5", {"label_smoothing": 1.5}),
        (ValueError, "z_loss must be at least 0 and finite, got -1", {"z_loss": -1.0}),
        (ValueError, "logit_softcap must be above 0 and finite, or None, got 0", {"logit_softcap": 0.0}),
        (ValueError, "reduction must be one of mean, sum, none, got 'avg'", {"reduction": "avg"}),
        (ValueError, "backend='torch' cannot be used: torch's .* no z_loss", {"z_loss": 1e-4, "backend": "torch"}),
    ],
)
def test_wrong_input_is_refused(error: type[Exception], match: str, changes: dict[str, Any]) -> None:
    arguments = {"logits": torch.zeros(4, 3), "targets": torch.zeros(4, dtype=torch.int64)} | changes
    with pytest.raises(error, match=match):
        cross_entropy(**arguments)


def test_the_compiler_accepts_it(device: torch.device) -> None:
    launches = []
    for capability, dtype, options in ((80, torch.float32, SMOOTHED), (90, torch.bfloat16, PLAIN)):
        logits = torch.empty(64, 128_256, dtype=dtype, requires_grad=True)
        with recorded_launches(capability) as recorded:
            loss = cross_entropy(logits, torch.zeros(64, dtype=torch.int64), backend="triton", **options)
            torch.autograd.grad(loss, logits)
        launches += recorded
    for compiled in compile_only(launches):
        assert compiled.spilled == 0
        assert compiled.shared <= min(SHARED_MEMORY.values())
        assert compiled.count("ld.global.v4")  # 16 bytes at a time
