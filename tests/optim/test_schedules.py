"""The warm-up and cosine schedule, held against transformers' and against its own landmarks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.optim import warmup_cosine


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(0, 10), (1, 10), (7, 50), (49, 50)])
def test_equals_transformers(warmup_steps: int, total_steps: int) -> None:
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup_steps, total_steps)
    for step in range(total_steps + 1):
        ours = warmup_cosine(step, warmup_steps=warmup_steps, total_steps=total_steps, peak=0.3)
        assert math.isclose(ours, scheduler.get_last_lr()[0], rel_tol=1e-12, abs_tol=1e-15)
        optimizer.step()
        scheduler.step()


@settings(deadline=None)
@given(data=st.data(), total=st.integers(2, 1000), peak=st.floats(1e-6, 1), fraction=st.floats(0, 1))
def test_shape(data: st.DataObject, total: int, peak: float, fraction: float) -> None:
    warmup = data.draw(st.integers(0, total - 1))
    minimum = peak * fraction
    rates = [
        warmup_cosine(step, warmup_steps=warmup, total_steps=total, peak=peak, minimum=minimum)
        for step in range(total + 3)
    ]
    assert rates[warmup] == max(rates) == pytest.approx(peak)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[total] == rates[total + 1] == rates[total + 2] == pytest.approx(minimum)
    middle = warmup + (total - warmup) / 2
    if middle.is_integer():
        assert rates[int(middle)] == pytest.approx((peak + minimum) / 2)


def test_warm_up_over_the_whole_run() -> None:
    rates = [warmup_cosine(step, warmup_steps=4, total_steps=4, peak=1.0) for step in range(5)]
    assert rates == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("step", {"step": -1}),
        ("total_steps", {"total_steps": 0}),
        ("warmup_steps", {"warmup_steps": 11}),
        ("warmup_steps", {"warmup_steps": -1}),
        ("peak", {"peak": 0.0}),
        ("peak", {"peak": float("nan")}),
        ("minimum", {"minimum": 2.0}),
    ],
)
def test_bad_arguments_are_named(name: str, changes: dict[str, float]) -> None:
    arguments = {"step": 3, "warmup_steps": 2, "total_steps": 10, "peak": 1.0, "minimum": 0.0} | changes
    with pytest.raises(ValueError, match=f"^{name} must"):
        warmup_cosine(arguments.pop("step"), **arguments)
