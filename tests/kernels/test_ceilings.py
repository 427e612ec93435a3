"""The roof is the lower of its two lines, and what is measured is a rate of the operator that it is named after."""

import math
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.kernels import ceilings
from minillm.kernels.ceilings import Ceilings, measure_ceilings

H100 = Ceilings({torch.bfloat16: 989e12, torch.float32: 67e12}, bytes_per_second=3.35e12)

positive = st.floats(1e-3, 1e15)


def test_the_ridge_is_where_both_lines_meet() -> None:
    assert H100.ridge(torch.bfloat16) == pytest.approx(295.2, abs=0.1)  # the data sheet's two numbers
    flops = H100.ridge(torch.bfloat16) * 1e9
    assert H100.seconds(flops, 1e9, torch.bfloat16) == pytest.approx(flops / 989e12)
    assert 1.0 / H100.seconds(1.0, 1.0, torch.bfloat16) == pytest.approx(3.35e12)
    assert 1e9 / H100.seconds(1e9, 1.0, torch.float32) == pytest.approx(67e12)


@given(flops=positive, n_bytes=positive, compute=positive, memory=positive)
@settings(max_examples=50, deadline=None)
def test_the_least_time_reaches_the_roof(flops: float, n_bytes: float, compute: float, memory: float) -> None:
    roof = Ceilings({torch.float32: compute}, memory)
    seconds = roof.seconds(flops, n_bytes, torch.float32)
    assert flops / seconds == pytest.approx(min(compute, flops / n_bytes * memory))
    assert seconds >= flops / compute
    assert seconds >= n_bytes / memory


def test_measures_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says how long each round took, the ceilings are the work over the best of the rounds."""
    monkeypatch.setattr(ceilings, "_MATMUL_SIDE", {"cpu": 32})
    monkeypatch.setattr(ceilings, "_COPY_BYTES", {"cpu": 1000})
    taken = iter([0.5, 0.25, 0.75, 2.0, 1.0, 4.0])

    def clock(run: Callable[[], object]) -> float:
        run()
        return next(taken)

    monkeypatch.setattr(ceilings, "_time_on_cpu", clock)
    measured = measure_ceilings("cpu", seconds=1e-6)
    assert measured == Ceilings({torch.float32: 2 * 32**3 / 0.25}, bytes_per_second=2 * 1000 / 1.0)


def test_the_time_of_several_threads_is_not_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillm.kernels.ceilings.time.process_time", iter([10.0, 13.0]).__next__)
    monkeypatch.setattr("minillm.kernels.ceilings.time.perf_counter", iter([20.0, 22.0]).__next__)
    monkeypatch.setattr("minillm.kernels.ceilings.torch.get_num_threads", lambda: 2)
    assert ceilings._time_on_cpu(lambda: None) == 2.0
    monkeypatch.setattr("minillm.kernels.ceilings.torch.get_num_threads", lambda: 1)
    if time.get_clock_info("process_time").resolution < 1e-4:
        assert ceilings._time_on_cpu(lambda: None) == 3.0


def test_measures_this_machine(device: torch.device) -> None:
    dtypes = (torch.float32, torch.bfloat16)
    measured = measure_ceilings(device, dtypes=dtypes, seconds=0.1)
    assert tuple(measured.flops_per_second) == dtypes
    for number in (*measured.flops_per_second.values(), measured.bytes_per_second):
        assert 0 < number < math.inf


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device": "meta"}, "device must be a cpu or cuda device, got 'meta'"),
        ({"dtypes": ()}, "dtypes must name at least one"),
        ({"dtypes": (torch.int8,)}, "dtypes must be floating types, got torch.int8"),
        ({"seconds": 0.0}, "seconds must be above 0"),
        ({"seconds": math.nan}, "seconds must be above 0"),
    ],
)
def test_refuses_what_it_cannot_measure(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        measure_ceilings(**arguments)  # type: ignore[arg-type]


def test_refuses_what_was_not_measured() -> None:
    with pytest.raises(ValueError, match=r"dtype must be one that was measured \(torch.bfloat16, torch.float32\)"):
        H100.ridge(torch.float16)
    with pytest.raises(ValueError, match="flops must be at least 0"):
        H100.seconds(-1.0, 1.0, torch.float32)
    with pytest.raises(ValueError, match="n_bytes must be at least 0"):
        H100.seconds(1.0, math.inf, torch.float32)
