"""A machine's two ceilings, measured: how fast it multiplies matrices, and how fast it moves bytes.

The roofline model (Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model") says of
an operator that computes F operations and moves B bytes between the processor and its memory:

    operations / second  <=  min(compute ceiling, F / B * memory ceiling)

F / B is its arithmetic intensity. Below the ridge, where the two terms are equal, an operator waits for memory and no
faster arithmetic helps it. Both ceilings here are what torch reaches on this machine, not what a data sheet says.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

_MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}  # three such matrices of a GPU's are far above its caches
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # a server's last cache may hold 2**28; both buffers together it does not
_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float16, torch.float32)}
_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Ceilings:
    """What a device was seen to do at best.

    flops_per_second: by dtype, of one large matrix product; a multiplication and an addition count as two.
    bytes_per_second: of one large copy; what is read and what is written both count.
    """

    flops_per_second: Mapping[torch.dtype, float]
    bytes_per_second: float

    def ridge(self, dtype: torch.dtype) -> float:
        """The arithmetic intensity, in operations per byte, from which on the compute ceiling is the lower one."""
        return self._flops_per_second(dtype) / self.bytes_per_second

    def seconds(self, flops: float, n_bytes: float, dtype: torch.dtype) -> float:
        """The least time for ``flops`` operations and ``n_bytes`` moved, where the two overlap completely."""
        for name, number in (("flops", flops), ("n_bytes", n_bytes)):
            if not 0.0 <= number < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {number}")
        return max(flops / self._flops_per_second(dtype), n_bytes / self.bytes_per_second)

    def _flops_per_second(self, dtype: torch.dtype) -> float:
        if dtype not in self.flops_per_second:
            measured = ", ".join(map(str, self.flops_per_second))
            raise ValueError(f"dtype must be one that was measured ({measured}), got {dtype}")
        return self.flops_per_second[dtype]


def measure_ceilings(
    device: torch.device | str = "cpu", *, dtypes: Sequence[torch.dtype] | None = None, seconds: float = 1.5
) -> Ceilings:
    """Measure both ceilings of ``device``, with torch's settings as they are (threads, TF32).

    Each number is the best of at least three rounds, since whatever disturbs a measurement makes it slower.

    Args:
        device: a CPU or CUDA device.
        dtypes: floating types of the matrix product. None is float32 on a CPU, bfloat16, float16 and float32 on CUDA.
        seconds: about how long the measurements take together; slow devices take longer.

    Raises ValueError for any other kind of device, for no dtypes or one that is no floating type, and for ``seconds``
    that are not above 0 and finite.
    """
    device = torch.device(device)
    if device.type not in _DTYPES:
        raise ValueError(f"device must be a cpu or cuda device, got {str(device)!r}")
    dtypes = _DTYPES[device.type] if dtypes is None else tuple(dtypes)
    if not dtypes:
        raise ValueError("dtypes must name at least one dtype, got none")
    for dtype in dtypes:
        if not dtype.is_floating_point:
            raise ValueError(f"dtypes must be floating types, got {dtype}")
    if not 0.0 < seconds < math.inf:
        raise ValueError(f"seconds must be above 0 and finite, got {seconds}")
    share = seconds / (len(dtypes) + 1)
    flops = {dtype: _matmul_flops_per_second(device, dtype, share) for dtype in dtypes}
    return Ceilings(flops_per_second=flops, bytes_per_second=_copy_bytes_per_second(device, share))


def _matmul_flops_per_second(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    side = _MATMUL_SIDE[device.type]
    # Random, as zeros draw less power on a GPU, which then keeps a higher clock than real work would.
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))  # (side, side)
    product = torch.empty_like(left)
    return 2.0 * side**3 / _least_time(lambda: torch.matmul(left, right, out=product), device, seconds)


def _copy_bytes_per_second(device: torch.device, seconds: float) -> float:
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / _least_time(lambda: target.copy_(source), device, seconds)


def _least_time(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest of the rounds that fit into ``seconds``, after one that only warms up."""
    run()
    least, rounds, spent = math.inf, 0, 0.0
    while rounds < _LEAST_ROUNDS or spent < seconds:
        taken = _time_on_gpu(run, device) if device.type == "cuda" else _time_on_cpu(run)
        least, rounds, spent = min(least, taken), rounds + 1, spent + taken
    return least


def _time_on_cpu(run: Callable[[], object]) -> float:
    """With one thread the process's own time, to which other processes do not add; that of several threads adds up."""
    fine = time.get_clock_info("process_time").resolution < 1e-4  # Windows counts in steps of 16 ms
    clock = time.process_time if fine and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def _time_on_gpu(run: Callable[[], object], device: torch.device) -> float:
    """Between two marks in the device's own queue: a clock on the host would measure how fast work is handed over."""
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3
