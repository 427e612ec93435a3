"""The benchmark of the kernels runs from end to end, and what its columns say is what they are called."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = {
    "attention",
    "rms_norm",
    "layer_norm",
    "softmax",
    "swiglu",
    "rope",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_activation",
    "grouped_matmul",
    "adamw_step",
    "split_kv_decode",
}


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.kernel_parts import measuring

    return measuring


def test_smoke(device: torch.device, tmp_path: Path) -> None:
    """Every operator, forward and backward, by every side; on a CPU the kernels are interpreted."""
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "--smoke", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    (file,) = tmp_path.iterdir()  # no unfinished file beside it
    result = json.loads(
        file.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} in the JSON")
    )
    assert result["complete"]
    assert result["ceilings"]["bytes_per_second"] > 0
    rows = [row for row in result["rows"] if "shape" in row]
    ours = [row for row in rows if row["side"] == "ours"]
    assert {row["operator"] for row in ours} == OPERATORS
    assert {row["what"] for row in ours} == {"forward", "backward", "forward + backward", "step"}
    for row in ours:
        assert row["error"] < 2e-6
        assert not row["wrong"]
        assert row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
    for row in rows:
        assert ("seconds" in row) != ("failed" in row)
    assert {row["operator"] for row in rows if row["side"] == "compiled" and "seconds" in row} >= {"rms_norm", "swiglu"}
    refused = [row for row in rows if row["side"] == "sdpa cudnn"]  # has no float32
    assert refused
    assert all("backend" in row["failed"] or "kernel" in row["failed"] for row in refused)

    table = done.stdout[done.stdout.rindex("fastest of torch") :].splitlines()[1:]
    assert sum(line.split()[0].removesuffix(",") in OPERATORS for line in table if line.strip()) == len(ours)
    if device.type == "cpu":
        tiled = [row for row in result["rows"] if row["side"] in ("tiled", "chunks")]
        assert len(tiled) == 4  # attention and the loss, forward and with the backward pass
        assert all(row["error"] < 2e-6 and row["peak_bytes"] > 0 for row in tiled)


def doubling(measuring: Any, **sides: Callable[[Tensor], Tensor]) -> Any:
    x = torch.randn(5, 7, requires_grad=True)
    work = {"forward": measuring.Work(100.0, 20.0), "backward": measuring.Work(200.0, 40.0)}
    exact = measuring.in_float64(lambda x: 2 * x)
    return measuring.Case("double", "5 x 7", (x,), sides, work, exact, aims={"forward": measuring.Aim(1.0, "TB/s")})


@pytest.fixture
def rows_of(measuring: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Rows where each round takes half a second and the roof allows 1000 operations and 10 bytes a second."""
    from minillm.kernels.ceilings import Ceilings

    clock = measuring.Clock(torch.device("cpu"), seconds=0.0, least=3)
    monkeypatch.setattr(clock, "_rounds", lambda run, rounds: [0.25, 0.5, 2.0])
    ceilings = Ceilings({torch.float32: 1000.0}, 10.0)

    def rows(case: Any, is_over: Callable[[], bool] = lambda: False) -> list[dict[str, Any]]:
        return list(measuring.rows_of(case, case.sides, clock, ceilings, is_over))

    return rows


def test_what_a_row_says(measuring: Any, rows_of: Any) -> None:
    forward, backward = rows_of(doubling(measuring, ours=lambda x: x + x))
    assert forward["seconds"] == {"median": 0.5, "min": 0.25, "max": 2.0, "rounds": 3}
    assert (forward["tflops"], forward["tb_per_s"]) == (200e-12, 40e-12)
    assert forward["share"] == pytest.approx(4.0)  # 20 bytes need 2 seconds
    assert backward["share"] == pytest.approx(8.0)
    assert forward["error"] == backward["error"] == 0.0
    assert forward["aim"] == "1 TB/s"
    assert forward["reached"] == pytest.approx(40e-12)
    assert "aim" not in backward


def test_failures_are_rows(measuring: Any, rows_of: Any) -> None:
    def refuses(x: Tensor) -> Tensor:
        raise RuntimeError("No kernel\nfits.")

    def forward_only(x: Tensor) -> Tensor:
        return (2 * x).detach()

    def full(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    rows = rows_of(
        doubling(
            measuring,
            refuses=refuses,
            forward_only=forward_only,
            full=full,
            inaccurate=lambda x: 2.001 * x,
            nan=lambda x: x * math.nan,
            narrow=lambda x: 2 * x[:4],
            right=lambda x: 2 * x,
        )
    )
    found = {(row["side"], row["what"]): row for row in rows}
    assert len(found) == 14
    assert found["refuses", "forward"]["failed"] == "RuntimeError: No kernel fits."
    assert "seconds" in found["forward_only", "forward"]
    assert "does not require grad" in found["forward_only", "backward"]["failed"]
    assert found["full", "forward"]["failed"] == "out of memory"
    assert found["inaccurate", "forward"]["wrong"]
    assert found["inaccurate", "backward"]["error"] == pytest.approx(5e-4, rel=1e-3)
    assert "not finite" in found["nan", "forward"]["failed"]
    assert "shape (4, 7), it should be (5, 7)" in found["narrow", "forward"]["failed"]
    assert not found["right", "backward"]["wrong"]


def test_no_time_left(measuring: Any, rows_of: Any) -> None:
    budget: Iterator[bool] = iter([False, True, True, True])
    rows = rows_of(doubling(measuring, one=lambda x: 2 * x, other=lambda x: 2 * x), is_over=lambda: next(budget))
    assert ["seconds" in row for row in rows] == [True, False, False, False]
    assert all(row["failed"] == measuring.NO_TIME for row in rows[1:])


@pytest.mark.parametrize(
    ("value", "unit", "reached"), [(100.0, "TFLOP/s", 2.0), (0.5, "TB/s", 4.0), (20.0, "ms", 2.0), (50.0, "%", 1.5)]
)
def test_aims(measuring: Any, value: float, unit: str, reached: float) -> None:
    work = measuring.Work(flops=2e12, n_bytes=2e10)
    assert measuring.Aim(value, unit).reached(0.01, work, share=0.75) == pytest.approx(reached)


def test_rounds_on_a_gpu_stand_between_marks_in_its_queue(measuring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    queue: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            queue.append("mark")

        def elapsed_time(self, end: object) -> float:
            return 250.0

    clock = measuring.Clock(torch.device("cpu"), seconds=0.0)
    clock.device, clock.buffer = torch.device("cuda"), type("", (), {"zero_": lambda self: queue.append("fill")})()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: queue.append("wait"))
    assert clock(lambda: queue.append("run")) == [0.25] * 3
    assert queue == ["fill", "mark", "run", "mark"] * 3 + ["wait"]


@pytest.mark.parametrize("causal", [False, True])
def test_the_last_head_in_float64(measuring: Any, causal: bool) -> None:
    from benchmarks.kernel_parts.attention_cases import last_head

    inputs = [torch.randn(2, 3, 1030, 8, requires_grad=True) for _ in range(3)]  # more than one part of the queries
    wide = [one.detach().double().requires_grad_() for one in inputs]
    output = F.scaled_dot_product_attention(*wide, is_causal=causal)
    expected = (output, *torch.autograd.grad(output, wide, measuring.d_output_of(output)))
    for one, other in zip(last_head(*inputs, causal), expected, strict=True):
        torch.testing.assert_close(one, other[-1, -1], atol=1e-12, rtol=1e-12)


def test_the_loss_in_float64(measuring: Any) -> None:
    from benchmarks.kernel_parts.operator_cases import loss_in_float64

    x, weight = torch.randn(515, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)  # more than one chunk
    targets = torch.randint(9, (515,))
    wide = [one.detach().double().requires_grad_() for one in (x, weight)]
    loss = F.cross_entropy(wide[0] @ wide[1].T, targets)
    expected = (loss, *torch.autograd.grad(loss, wide))
    for one, other in zip(loss_in_float64(x, weight, targets), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
