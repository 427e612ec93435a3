"""Shared by every test: one torch thread per worker, one seed; no GPU: kernels interpreted, GPU tests skipped."""

import gc
import os
from collections.abc import Callable

import pytest
import torch

if not torch.cuda.is_available():
    # Triton asks for this once, when something first imports it: any test may be that something.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def peak_bytes() -> Callable[[Callable[[], object]], int]:
    """Gives the most bytes that torch's allocator holds for a call at one time: counted, not sampled."""

    def count(run: Callable[[], object]) -> int:
        gc.collect()  # what an earlier count left in circles would be taken off, if it were given back in this one
        gc.disable()
        try:
            with torch.profiler.profile(profile_memory=True) as profiler:
                run()
        finally:
            gc.enable()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak

    return count


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    # Two workers with two threads each fight for two cores: a 60 ms step then takes seconds.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
