"""What each layer of a row costs: its parameters, its FLOPs, or the time that it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def parameter_costs(layers: Iterable[nn.Module]) -> tuple[float, ...]:
    """Parameters of each layer. A matrix that two layers share counts in both: both stages hold it."""
    return tuple(float(sum(p.numel() for p in layer.parameters())) for layer in layers)


def flop_costs(layers: Sequence[nn.Module], sample: Any) -> tuple[float, ...]:
    """FLOPs of each layer's forward pass (products of matrices, 2 each multiplication and addition).

    Attention counts as if nothing were masked. Buffers and the state of torch's generators are left as they were.

    Args:
        layers: each takes what the one before gave.
        sample: what the first takes: a tensor or a tuple of tensors.
    """
    found = []
    given = _given(sample)
    # Torch's counter knows no fused attention of a CPU; of two products of matrices it knows the FLOPs anywhere.
    with torch.no_grad(), _unchanged(layers, given), sdpa_kernel(SDPBackend.MATH):
        for layer in layers:
            with FlopCounterMode(display=False) as counter:
                given = _given(layer(*given))
            found.append(float(counter.get_total_flops()))
    return tuple(found)


def time_costs(
    layers: Sequence[nn.Module], sample: Any, *, rounds: int = 5, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, ...]:
    """Seconds of each layer's forward and backward pass, the median of some rounds.

    Gradients, buffers and the state of torch's generators are left as they were.

    Args:
        layers, sample: as in `flop_costs`.
        rounds: at least 1; one more goes before them, and does not count.
        clock: gives seconds.

    Raises:
        ValueError: no rounds, or tensors on the meta device, where nothing is computed.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if any(x.is_meta for x in _given(sample)):
        raise ValueError('sample is on the meta device, where nothing takes time: balance="flops" works there')
    seconds: list[list[float]] = [[] for _ in layers]
    with _unchanged(layers, _given(sample)):
        for _ in range(rounds + 1):
            given = _given(sample)
            for index, layer in enumerate(layers):
                inputs = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in given)
                learning = [p for p in layer.parameters() if p.requires_grad] + [x for x in inputs if x.requires_grad]
                start = _now(clock, inputs)
                given = _given(layer(*inputs))
                outputs = [y for y in given if y.requires_grad]
                if outputs and learning:
                    torch.autograd.grad([y.sum() for y in outputs], learning, allow_unused=True)
                seconds[index].append(_now(clock, given) - start)
    return tuple(statistics.median(of_layer[1:]) for of_layer in seconds)


@contextmanager
def _unchanged(layers: Iterable[nn.Module], given: Iterable[Tensor]) -> Iterator[None]:
    """Running statistics and random numbers are as before, however often layers are run: training begins with them."""
    buffers = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]
    devices = {x.device for x in given if x.is_cuda}
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _given(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _now(clock: Callable[[], float], tensors: tuple[Tensor, ...]) -> float:
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.synchronize()
    return clock()
