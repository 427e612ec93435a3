"""Shared by every test: one torch thread per worker, one seed; without a GPU, kernels interpreted, GPU tests skipped."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton asks for this once, when something first imports it: any test may be that something.
    os.environ["TRITON_INTERPRET"] = "1"


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
