"""One operator on one set of inputs, its rivals, and what is measured of each: time, error, memory, share of roof."""

import gc
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention import peak_bytes
from minillm.kernels.ceilings import Ceilings
from minillm.kernels.testing import TOLERANCE

Results = tuple[Tensor, ...]
OURS = "ours"
NO_TIME = "not measured: the time was used up"


@dataclass(frozen=True)
class Work:
    """The least that an operator has to do: operations, and bytes between the processor and its memory."""

    flops: float
    n_bytes: float


@dataclass(frozen=True)
class Aim:
    """What to aim at on one H100: a rate, a time, or a share of the roof. ``unit``: TFLOP/s, TB/s, ms or %."""

    value: float
    unit: str

    def __str__(self) -> str:
        return f"{self.value:g} {self.unit}"

    def reached(self, seconds: float, work: Work, share: float) -> float:
        """1 is the aim; more is better."""
        if self.unit == "ms":
            return self.value / (1e3 * seconds)
        rates = {"TFLOP/s": work.flops / seconds / 1e12, "TB/s": work.n_bytes / seconds / 1e12, "%": 100 * share}
        return rates[self.unit] / self.value


@dataclass(frozen=True)
class Case:
    """Sides that compute the same of the same inputs.

    inputs: of every side; those that require a gradient get one.
    sides: by name. "compiled" is torch.compile's, which takes long to prepare.
    work: by what is timed: "forward", "backward" or "forward + backward", or "step": then a side, called with the
        inputs, gives the step to be timed.
    exact: the same in float64, by torch: called with the inputs, gives the output and then the gradients.
    part: what is compared of an output or a gradient, where float64 of the whole would be too large.
    aims, published: by what is timed; published is TFLOP/s by implementation.
    """

    operator: str
    shape: str
    inputs: tuple[Any, ...]
    sides: Mapping[str, Callable[..., Any]]
    work: Mapping[str, Work]
    exact: Callable[..., Results]
    part: Callable[[Tensor], Tensor] = lambda tensor: tensor
    aims: Mapping[str, Aim] = field(default_factory=dict)
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.inputs[0].dtype
        return dtype

    def ready(self, side: str, what: str) -> Callable[[], Results]:
        """What is timed."""
        operator, inputs = self.sides[side], self.inputs
        learning = [one for one in inputs if isinstance(one, Tensor) and one.requires_grad]
        if what == "forward":
            return torch.no_grad()(lambda: (operator(*inputs),))
        if what == "step":
            step = operator(*inputs)
            return lambda: (step(),)
        if what == "backward":
            output = operator(*inputs)
            d_output = d_output_of(output)
            return lambda: torch.autograd.grad(output, learning, d_output, retain_graph=True)

        def both() -> Results:
            output = operator(*inputs)
            return (output.detach(), *torch.autograd.grad(output, learning, torch.ones_like(output)))

        return both


def d_output_of(output: Tensor) -> Tensor:
    """The gradient that is sent back into an output: 1 for a loss, else random, the same for every side and dtype.

    With the output's strides, as it would come out of an operator that reads it: some kernels copy any other.
    """
    if output.dim() == 0:
        return torch.ones_like(output)
    generator = torch.Generator(output.device).manual_seed(1)
    numbers = torch.randn(output.shape, device=output.device, generator=generator)
    return torch.empty_like(output).copy_(numbers.bfloat16())


def in_float64(operator: Callable[..., Tensor]) -> Callable[..., Results]:
    """``exact`` where all fits into memory: torch's operator on float64 inputs, and autograd."""

    def exact(*inputs: Any) -> Results:
        wide = [wider(one) for one in inputs]
        learning = [one for one in wide if isinstance(one, Tensor) and one.requires_grad]
        output = operator(*wide)
        gradients = torch.autograd.grad(output, learning, d_output_of(output)) if learning else ()
        return (output.detach(), *gradients)

    return exact


def wider(one: Any) -> Any:
    """A tensor of floating-point numbers as a float64 leaf; anything else as it is."""
    if not (isinstance(one, Tensor) and one.is_floating_point()):
        return one
    return one.detach().double().requires_grad_(one.requires_grad)


def error(actual: Results, expected: Results, part: Callable[[Tensor], Tensor]) -> float:
    """The largest ``||actual - expected|| / ||expected||``."""
    largest = 0.0
    for one, other in zip(actual, expected, strict=True):
        one = part(one.detach()).double()
        if one.shape != other.shape:
            raise ValueError(f"the result has shape {tuple(one.shape)}, it should be {tuple(other.shape)}")
        if not one.isfinite().all():
            raise ValueError("the result is not finite")
        largest = max(largest, float((one - other).norm() / other.norm().clamp_min(1e-300)))
    return largest


class Clock:
    """Times ``run`` with the device's own clock: rounds that fill about ``seconds``, three at least, 100 at most.

    On a GPU each round starts with cold caches: before it a buffer is filled that is far larger than any of them. The
    marks stand in the device's own queue, and the host hands over the launches while the buffer is being filled: up to
    about 0.3 ms of the host's work is not in the times, as it would not be in a training step. On a CPU it is the
    process's own time.
    """

    def __init__(self, device: torch.device, seconds: float, least: int = 3) -> None:
        self.device, self.seconds, self.least = device, seconds, least
        self.buffer = torch.empty(2**30 if device.type == "cuda" else 0, dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], object]) -> list[float]:
        times = self._rounds(run, self.least)
        rounds = min(100, int(self.seconds / max(statistics.median(times), 1e-6)))
        return self._rounds(run, rounds) if rounds > self.least else times

    def _rounds(self, run: Callable[[], object], rounds: int) -> list[float]:
        if self.device.type == "cpu":
            times = []
            for _ in range(rounds):
                start = time.process_time()
                run()
                times.append(time.process_time() - start)
            return times
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for start, end in marks:
            self.buffer.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in marks]


def rows_of(
    case: Case, sides: Iterable[str], clock: Clock, ceilings: Ceilings, is_over: Callable[[], bool]
) -> Iterator[dict[str, Any]]:
    """A row for each of the sides and each thing timed. What fails, or finds no time left, says so in its row."""
    expected: Results | str | None = None
    for side in sides:
        for what, work in case.work.items():
            row: dict[str, Any] = {"operator": case.operator, "shape": case.shape, "what": what, "side": side}
            row["dtype"] = str(case.dtype).removeprefix("torch.")
            if side == OURS and what in case.aims:
                row["aim"] = str(case.aims[what])
            if side == OURS and what in case.published:
                row["published"] = dict(case.published[what])
            if is_over():
                yield row | {"failed": NO_TIME}
                continue
            if expected is None:
                expected = attempt(lambda: case.exact(*case.inputs))
            measured = attempt(lambda: _measure(case, side, what, clock, expected), loud=side == OURS)  # noqa: B023
            if isinstance(measured, str):
                yield row | {"failed": measured}
                continue
            seconds, share = measured["seconds"]["median"], 0.0
            if case.dtype in ceilings.flops_per_second:
                share = ceilings.seconds(work.flops, work.n_bytes, case.dtype) / seconds
            row |= measured
            row |= {"tflops": work.flops / seconds / 1e12, "tb_per_s": work.n_bytes / seconds / 1e12, "share": share}
            if "aim" in row:
                row["reached"] = case.aims[what].reached(seconds, work, share)
            yield row


def _measure(case: Case, side: str, what: str, clock: Clock, expected: Results | str) -> dict[str, Any]:
    run = case.ready(side, what)
    results = run()
    row: dict[str, Any] = {}
    if isinstance(expected, str):
        row["no_error"] = expected
    else:
        compared = {"forward": expected[:1], "backward": expected[1:]}.get(what, expected)
        row["error"] = error(results, compared, case.part)
        row["wrong"] = row["error"] > TOLERANCE[case.dtype]
    del results
    if clock.device.type == "cuda":  # on a CPU that takes a profiler, and an interpreter's memory says nothing
        row["peak_bytes"] = peak_bytes(run, clock.device)
    times = clock(run)
    row["seconds"] = {"median": statistics.median(times), "min": min(times), "max": max(times), "rounds": len(times)}
    return row


def attempt(call: Callable[[], Any], *, loud: bool = False) -> Any:
    """What ``call`` gives; or why it failed, in words, with torch's warnings: they say why no kernel fits."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return call()
        except Exception as problem:
            if loud:
                traceback.print_exc(limit=-4)  # the innermost calls
            words = [f"{type(problem).__name__}: {problem}", *(str(one.message) for one in said)]
    if torch.cuda.is_available():  # room for the others
        gc.collect()
        torch.cuda.empty_cache()
    if words[0].startswith("OutOfMemoryError"):
        return "out of memory"
    return "; ".join(dict.fromkeys(" ".join(one.split(" (Triggered internally")[0].split())[:300] for one in words))
