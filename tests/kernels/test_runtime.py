"""The dispatch rule, line by line, and what it says when a backend cannot be had."""

import itertools
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minillm.kernels import geglu, layer_norm, rms_norm, runtime, softmax, swiglu
from minillm.kernels.runtime import as_rows, choose_backend, row_block, triton_problem


class Elsewhere:
    """Stands for a tensor on a device that is not here; the rule looks at the device, and for a tangent."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


def on(device: str) -> torch.Tensor:
    return torch.zeros(1) if device == "cpu" else Elsewhere(device)  # type: ignore[return-value]


def _choose(tensor: torch.Tensor, backend: str, **refusals: str | None) -> str:
    return choose_backend(backend, tensor, **refusals)


@pytest.mark.parametrize("problem", [None, "no Triton"])
@pytest.mark.parametrize("interpreted", [False, True])
def test_the_whole_rule(monkeypatch: pytest.MonkeyPatch, problem: str | None, interpreted: bool) -> None:
    monkeypatch.setattr(runtime, "triton_problem", lambda device: problem)
    monkeypatch.setattr(runtime, "interpreted", lambda: interpreted)
    refusals = (None, "not this call")
    for device, triton_refuses, torch_refuses in itertools.product(("cpu", "cuda:1", "mps"), refusals, refusals):
        choose = partial(_choose, on(device), triton_refuses=triton_refuses, torch_refuses=torch_refuses)
        assert choose("reference") == "reference"
        if torch_refuses is None:
            assert choose("torch") == "torch"
        else:
            with pytest.raises(ValueError, match="backend='torch' cannot be used: not this call"):
                choose("torch")
        reason = triton_refuses or problem
        if reason is None:
            assert choose("triton") == "triton"
        else:
            with pytest.raises(ValueError, match=f"backend='triton' cannot be used: {reason}"):
                choose("triton")
        kernels = device == "cuda:1" and reason is None and not interpreted
        assert choose("auto") == ("triton" if kernels else "torch" if torch_refuses is None else "reference")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, in jvp
def test_forward_mode_derivatives_are_never_zeros(device: torch.device) -> None:
    x, tangent = torch.randn(3, 5, device=device), torch.randn(3, 5, device=device)
    expected = torch.func.jvp(lambda x: x.softmax(-1), (x,), (tangent,))[1]
    for backend in ("auto", "torch", "reference"):
        found = torch.func.jvp(lambda x, backend=backend: softmax(x, backend=backend), (x,), (tangent,))[1]
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="backend='triton' cannot be used: the kernels have no forward-mode"):
        torch.func.jvp(lambda x: softmax(x, backend="triton"), (x,), (tangent,))


def test_unknown_backends_and_scattered_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, reference, got 'cuda'"):
        choose_backend("cuda", torch.zeros(1))
    with pytest.raises(ValueError, match="all tensors must be on one device, got cpu, cuda:0"):
        choose_backend("auto", torch.zeros(1), on("cuda:0"))
    with pytest.raises(ValueError, match="got none"):
        choose_backend("auto")


def test_old_gpus_and_other_devices_have_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        major, minor = 7, 5

    monkeypatch.setattr(runtime, "_INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert "compute capability (8, 0) (Ampere) or newer, cuda:0 has (7, 5)" in str(
        triton_problem(torch.device("cuda:0"))
    )
    Properties.major = 12
    assert triton_problem(torch.device("cuda:0")) is None
    assert "no Triton for tensors on 'mps'" in str(triton_problem(torch.device("mps")))
    monkeypatch.setattr(runtime, "_INSTALLED", False)
    assert "not installed" in str(triton_problem(torch.device("cuda:0")))


IMPORT = "import sys, torch, minillm.kernels as k; assert 'triton' not in sys.modules; x = torch.zeros(2, 3); "


@pytest.mark.parametrize(
    ("script", "environment", "words"),
    [
        ("k.softmax(x, backend='triton')", "", "TRITON_INTERPRET=1 must be set before Triton is imported"),
        ("import triton; k.softmax(x, backend='triton')", "", "Triton was imported without it: restart Python"),
        ("k.softmax(x); assert 'triton' not in sys.modules", "1", None),
        ("assert k.softmax(x, backend='triton').sum() == 2", "1", None),
    ],
)
def test_the_interpreter_is_asked_for_in_time(
    script: str, environment: str, words: str | None, device: torch.device
) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if environment:
        variables["TRITON_INTERPRET"] = environment
    done = subprocess.run(
        [sys.executable, "-c", IMPORT + script], env=variables, capture_output=True, text=True, check=False
    )
    if words is None:
        assert done.returncode == 0, done.stderr
    else:
        assert words in done.stderr.splitlines()[-1]


def test_an_empty_grid_starts_nothing() -> None:
    runtime.launch(None, (0, 5))


def test_rows_are_views_where_strides_allow() -> None:
    x = torch.randn(3, 4, 10)
    assert as_rows(x).data_ptr() == x.data_ptr()
    assert as_rows(x).shape == (12, 10)
    assert as_rows(x[:, :, :7]).data_ptr() == x.data_ptr()
    assert as_rows(x[:, :, :7]).stride() == (10, 1)
    for view in (x.transpose(1, 2), x[:, :, ::2], x.transpose(0, 1)[:, :, :3]):
        rows = as_rows(view)
        assert rows.stride(1) == 1
        assert torch.equal(rows.view(view.shape), view)
    assert as_rows(torch.zeros(0, 3, 5)).shape == (0, 5)
    assert as_rows(torch.zeros(3, 0)).shape == (3, 0)


@pytest.mark.parametrize(
    ("n_columns", "expected"), [(1, (16, 1)), (1000, (1024, 2)), (4096, (4096, 8)), (10**6, (16384, 16))]
)
def test_blocks_of_a_row(n_columns: int, expected: tuple[int, int]) -> None:
    assert row_block(n_columns) == expected


@pytest.mark.gpu
def test_auto_runs_the_kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    real = runtime.launch
    monkeypatch.setattr("minillm.kernels.softmax.launch.launch", lambda *a, **k: (started.append(a[0]), real(*a, **k)))
    x = torch.randn(5, 7, device="cuda")
    torch.testing.assert_close(softmax(x), x.softmax(-1))
    assert len(started) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torchs_operators_keep_the_dtype_under_autocast_on_a_gpu(dtype: torch.dtype) -> None:
    enabled = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():  # tensors on a GPU that need not be there: only what they are is calculated
            x, weight = (torch.empty(shape, dtype=dtype, device="cuda") for shape in ((4, 8), (8,)))
            assert x.softmax(-1).dtype == torch.float32  # what torch does of itself
            outputs = (
                softmax(x, backend="torch"),
                rms_norm(x, weight, backend="torch"),
                *rms_norm(x, weight, residual=x, backend="torch"),
                layer_norm(x, weight, weight, backend="torch"),
                swiglu(x, x, backend="torch"),
                geglu(x, x, backend="torch"),
            )
    finally:
        torch.set_autocast_enabled("cuda", enabled)
    assert {output.dtype for output in outputs} == {dtype}
