"""Kernels run where they can: compiled on a GPU, interpreted without one; skipped where there is no Triton."""

import importlib.util

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which has wheels for Linux only")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
