"""One step of AdamW against torch.optim.AdamW: reference and kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minillm.kernels import adamw_step
from minillm.kernels.testing import TOLERANCE, assert_untouched, guarded, relative_error, watched_memory

BACKENDS = ("reference", "torch", "triton")
HYPER = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def state(parameter: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [guarded(torch.zeros_like(parameter, dtype=dtype), gap=0) for _ in range(2)]


def exact_step(parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int) -> list[Tensor]:
    """The three new tensors, by torch.optim.AdamW in float64."""
    wide = [t.detach().double().clone() for t in (parameter, exp_avg, exp_avg_sq)]
    wide[0].grad = gradient.double()
    optimizer = torch.optim.AdamW([wide[0].requires_grad_()], **HYPER, foreach=False)
    optimizer.state[wide[0]] = {"step": torch.tensor(step - 1.0), "exp_avg": wide[1], "exp_avg_sq": wide[2]}
    optimizer.step()
    return wide


@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_steps_of_torchs(backend: str, device: torch.device) -> None:
    ours = guarded(torch.randn(3, 700, device=device), gap=0).requires_grad_()
    theirs, exact = ours.detach().clone().requires_grad_(), ours.detach().double().clone().requires_grad_()
    averages = state(ours, torch.float32)
    optimizers = [torch.optim.AdamW([parameter], **HYPER, foreach=False) for parameter in (theirs, exact)]
    for step in range(1, 21):
        gradient = guarded(torch.randn(3, 700, device=device), gap=0)
        theirs.grad, exact.grad = gradient.clone(), gradient.double()
        for optimizer in optimizers:
            optimizer.step()
        with watched_memory():
            adamw_step(ours, gradient, *averages, step=step, **HYPER, backend=backend)
    states = [optimizer.state[parameter] for optimizer, parameter in zip(optimizers, (theirs, exact), strict=True)]
    for mine, name in zip(averages, ("exp_avg", "exp_avg_sq"), strict=True):
        assert relative_error(mine, states[1][name]) <= TOLERANCE[torch.float32]
    assert relative_error(ours, exact) <= max(TOLERANCE[torch.float32], 2 * relative_error(theirs, exact))
    for tensor in (ours, gradient, *averages):
        assert_untouched(tensor)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("parameter_dtype", "gradient_dtype", "state_dtype"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),  # the master copy of a bfloat16 weight
    ],
)
def test_half_precision(
    parameter_dtype: torch.dtype,
    gradient_dtype: torch.dtype,
    state_dtype: torch.dtype,
    backend: str,
    device: torch.device,
) -> None:
    parameter = torch.randn(1500, device=device).to(parameter_dtype)
    averages = state(parameter, state_dtype)
    for step in range(1, 4):
        gradient = torch.randn(1500, device=device).to(gradient_dtype)
        exact = exact_step(parameter, gradient, *averages, step)
        adamw_step(parameter, gradient, *averages, step=step, **HYPER, backend=backend)
        for mine, theirs in zip((parameter, *averages), exact, strict=True):
            assert relative_error(mine, theirs) <= TOLERANCE[mine.dtype]
    assert parameter.dtype == parameter_dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reference_is_torchs_bit_for_bit(dtype: torch.dtype) -> None:
    ours, theirs = (torch.randn(40, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(2))
    averages, optimizer = state(ours, dtype), torch.optim.AdamW([theirs.requires_grad_()], **HYPER, foreach=False)
    for step in range(1, 6):
        theirs.grad = torch.randn(40).to(dtype)
        optimizer.step()
        adamw_step(ours, theirs.grad, *averages, step=step, **HYPER, backend="reference")
        assert torch.equal(ours, theirs)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2100),
    st.floats(0, 1),
    st.floats(0, 0.999),
    st.floats(0, 0.9999),
    st.floats(1e-8, 1e-2),
    st.floats(0, 1),
    st.sampled_from([1, 2, 1000, 10**6]),
)
def test_any_hyperparameters(
    n: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int
) -> None:
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = [*torch.randn(3, n, device=device), torch.rand(n, device=device)]
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        tensors = [tensor.to(dtype, copy=True) for tensor in start]
        hyper = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
        adamw_step(*tensors, step=step, **hyper, backend=backend)
        results.append([tensors[0], *tensors[2:]])
    for mine, exact in zip(*results, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-5)


def test_a_beta_close_to_one_keeps_its_digits(device: torch.device) -> None:
    parameter, gradient = torch.zeros(8, device=device), torch.full((8,), 3.0, device=device)
    averages = [torch.zeros(8, device=device) for _ in range(2)]
    adamw_step(parameter, gradient, *averages, step=1, betas=(0.9, 0.999999), eps=0.0, backend="triton")
    # 1 - beta2 calculated in float32 is 4 % off
    torch.testing.assert_close(averages[1], torch.full((8,), 9e-6, device=device), rtol=1e-6, atol=0)
    torch.testing.assert_close(parameter, torch.full((8,), -1e-3, device=device), rtol=1e-6, atol=0)


def test_small_updates_are_lost_without_a_master_copy(device: torch.device) -> None:
    hyper = {"lr": 1e-4, "weight_decay": 0.0, "backend": "reference"}
    parameters = [torch.ones(4, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float32)]
    for parameter in parameters:
        averages = state(parameter, torch.float32)
        for step in range(1, 21):
            adamw_step(parameter, torch.ones_like(parameter), *averages, step=step, **hyper)
    assert (parameters[0] == 1).all()
    torch.testing.assert_close(parameters[1], torch.full((4,), 0.998, device=device), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_require_gradients_know_that_they_changed(backend: str, device: torch.device) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 2, device=device))
    lost = (parameter * parameter).sum()
    gradient, averages = torch.ones(3, 2, device=device), state(parameter, torch.float32)
    adamw_step(parameter, gradient, *averages, step=1, backend=backend)
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert gradient._version == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lost.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_a_number_and_nothing(backend: str, shape: tuple[int, ...], device: torch.device) -> None:
    tensors = [torch.ones(shape, device=device) for _ in range(4)]
    expected = exact_step(*tensors, 1)[0]
    adamw_step(*tensors, step=1, **HYPER, backend=backend)
    torch.testing.assert_close(tensors[0].double(), expected, rtol=1e-6, atol=0)


def test_tensors_that_are_not_contiguous(device: torch.device) -> None:
    tensors = [torch.rand(5, 4, device=device) for _ in range(4)]
    tensors[1] = tensors[1].T.contiguous().T
    expected = exact_step(*tensors, 1)[0]
    for backend in ("triton", "torch"):
        with pytest.raises(ValueError, match="all tensors must be contiguous, and gradient is not"):
            adamw_step(*tensors, step=1, **HYPER, backend=backend)
    adamw_step(*tensors, step=1, **HYPER)  # the reference
    torch.testing.assert_close(tensors[0].double(), expected, rtol=1e-6, atol=1e-6)


def test_torch_compile_traces_through(device: torch.device) -> None:
    tensors = [torch.rand(19, device=device) for _ in range(4)]
    torch.library.opcheck(torch.ops.minillm.adamw_step.default, (*tensors, 1, 0.02, 0.8, 0.95, 1e-6, 0.1))
    expected = exact_step(*tensors, 3)[0]
    compiled = torch.compile(
        lambda *tensors: adamw_step(*tensors, step=3, **HYPER, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    compiled(*tensors)
    assert relative_error(tensors[0], expected) <= TOLERANCE[torch.float32]


def test_wrong_input_is_refused() -> None:
    x = torch.ones(3)
    with pytest.raises(TypeError, match=r"gradient must be floating point, got torch\.int64"):
        adamw_step(x, x.long(), x, x, step=1)
    with pytest.raises(ValueError, match=r"exp_avg must have the parameter's shape \(3,\), got \(1,\)"):
        adamw_step(x, x, x[:1], x, step=1)
    with pytest.raises(TypeError, match="exp_avg and exp_avg_sq must have one dtype"):
        adamw_step(x, x, x, x.double(), step=1)
    with pytest.raises(ValueError, match="step must be at least 1, got 0"):
        adamw_step(x, x, x, x, step=0)
    for step in (1.5, torch.tensor(1), True):
        with pytest.raises(TypeError, match="step must be an integer"):
            adamw_step(x, x, x, x, step=step)
    with pytest.raises(ValueError, match="eps must be a finite number of at least 0, got -1"):
        adamw_step(x, x, x, x, step=1, eps=-1)
    with pytest.raises(ValueError, match=r"betas must be two numbers in \[0, 1\), got \(0.9, 1\)"):
        adamw_step(x, x, x, x, step=1, betas=(0.9, 1))
    with pytest.raises(ValueError, match="the kernel calculates in float32, got a tensor in float64"):
        adamw_step(*[x.double()] * 4, step=1, backend="triton")
    with pytest.raises(ValueError, match=r"needs tensors of one dtype, got torch\.bfloat16, torch\.float32"):
        adamw_step(x.bfloat16(), x.bfloat16(), x, x, step=1, backend="torch")
