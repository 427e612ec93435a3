"""What torch.compile fuses on a CPU, and what it saves: kernels, bytes moved, bytes allocated, time.

    python benchmarks/fusion.py [--rounds 15] [--json FILE]
    python benchmarks/fusion.py --smoke           small and once: shows that it runs, no more

Three pieces of a model at inference, float32, one thread, each done in several ways that must give the same numbers:

    linear, bias, GELU              a feed-forward layer's first half
    linear, batch norm, ReLU        the classic of operator fusion
    residual, RMSNorm               a chain of pointwise operations and one mean

    eager        One kernel for each operation of torch.
    compiled     ``torch.compile`` as it is. Its C++ kernels join pointwise operations and sums; products stay calls to
                 the library, so what follows a product still reads it from memory, but in place.
    template     ``torch.compile`` with constant weights and a product of its own (``freezing``, ``max_autotune`` with
                 the C++ template): what follows the product happens to its tiles, as in a Triton kernel.
    folded       :func:`minillm.kernels.fold_batch_norm` and two operations of torch.
    TorchScript  ``torch.jit.freeze``, the fusion of its time: it folds the batch norm, too. Its fuser of pointwise
                 operations needs LLVM on a CPU, which torch's wheels come without. Deprecated; left out where torch no
                 longer has it.

"moved" counts each kernel's arguments once: what it must read and write if nothing stays in a cache. Operations of
torch are seen at the dispatcher, generated kernels as they are called. "allocated" is what the allocator handed out.
The times take turns in one process and are the process's own CPU time.

To see what was fused, in a notebook::

    import re, torch
    from torch._inductor.utils import run_and_get_code

    def piece(x, weight, bias):
        return torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias))

    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(piece), *inputs)
    for line in code[code.index("def call") :].splitlines():
        if re.search(r"extern_kernels|cpp_fused|torch\\.ops", line):
            print(line.strip())                       # one line a kernel, in the order they run

Prints a table last, and one JSON line.
"""

import argparse
import json
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor.codecache import PyCodeCache
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillm.kernels import fold_batch_norm

TEMPLATE = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP"}


class LinearGELU(nn.Module):
    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(x))


class LinearBatchNormReLU(nn.Module):
    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(d_in, d_out), nn.BatchNorm1d(d_out)
        nn.init.normal_(self.norm.weight)
        self.norm(torch.randn(64, d_out) * 2 + 1)  # a running mean and variance that are not 0 and 1

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.linear(x)))


class ResidualRMSNorm(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_model))

    def forward(self, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        x = x + 0.5 * update
        return x, x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Counter:
    """Kernels in the order they ran, as (name, bytes of their arguments)."""

    def __init__(self) -> None:
        self.kernels: list[tuple[str, int]] = []

    def add(self, name: str, read: Any, written: Any) -> None:
        if number := _bytes(read) + _bytes(written):
            self.kernels.append((name, number))

    @property
    def moved(self) -> int:
        return sum(number for _, number in self.kernels)


def _bytes(tensors: Any) -> int:
    different = {(t.data_ptr(), t.shape): t for t in tree_leaves(tensors) if isinstance(t, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in different.values())


class EagerCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every operation that reaches the dispatcher and is no view."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        self.counter.add(str(func), (args, kwargs), result)
        return result


def count_eager(run: Callable[[], object]) -> Counter:
    mode = EagerCounter()
    with mode:
        run()
    return mode.counter


class _Library:
    """``extern_kernels`` of generated code, its functions counted as they are called."""

    def __init__(self, library: Any, counter: Counter) -> None:
        self._library, self._counter = library, counter

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self._counter.add(name, args, kwargs.get("out", result))
            return result

        return called


def count_generated(run: Callable[[], object]) -> Counter:
    """What a compiled function runs: kernels that inductor generated, and calls of libraries."""
    counter = Counter()

    def watched(name: str, kernel: Callable[..., object], text: str) -> Callable[..., None]:
        signature = re.search(rf"^{name} = .*?extern \"C\"\s+void\s+\w+\((.*?)\)", text, re.MULTILINE | re.DOTALL)
        assert signature is not None, f"the generated code has no {name}"
        parameters = signature[1].split(",")

        def called(*args: Any) -> None:
            kernel(*args)
            named = list(zip(parameters, args, strict=True))
            read = [value for parameter, value in named if "const" in parameter or "in_out" in parameter]
            counter.add(name, read, [value for parameter, value in named if "const" not in parameter])

        return called

    with ExitStack() as patches:
        for module in PyCodeCache.modules:
            names = vars(module)
            if "extern_kernels" not in names:
                continue
            text = Path(str(module.__file__)).read_text(encoding="utf-8")
            new: dict[str, Any] = {
                name: watched(name, value, text) for name, value in names.items() if name.startswith("cpp_fused")
            }
            new["extern_kernels"] = _Library(names["extern_kernels"], counter)
            patches.enter_context(mock.patch.dict(names, new))
        run()
    return counter


def allocated(run: Callable[[], object]) -> int:
    """Bytes that the allocator handed out in all."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")


def frozen_script(model: nn.Module) -> Callable[..., Any] | None:
    if not hasattr(torch.jit, "script"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script: Callable[..., Any] = torch.jit.freeze(torch.jit.script(model))
    return script


def folded(model: LinearBatchNormReLU) -> Callable[[Tensor], Tensor]:
    linear, norm = model.linear, model.norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = fold_batch_norm(
        linear.weight, linear.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )
    return lambda x: F.relu(F.linear(x, weight, bias))


def closed_forms(n: int, d: int, o: int) -> dict[tuple[str, str], int]:
    """Bytes moved, from the shapes: n tokens, d_in = d, d_out = o, float32."""
    product = n * d + d * o + o  # what a product with bias reads
    numbers = {
        ("linear, bias, GELU", "eager"): product + 3 * n * o,  # written, read and written again
        ("linear, bias, GELU", "compiled"): product + 3 * n * o,
        ("linear, bias, GELU", "template"): product + n * o,
        ("linear, batch norm, ReLU", "eager"): product + 5 * n * o + 4 * o,
        ("linear, batch norm, ReLU", "compiled"): product + 3 * n * o + 4 * o,
        ("linear, batch norm, ReLU", "folded"): product + 3 * n * o,
        ("linear, batch norm, ReLU", "TorchScript"): product + 3 * n * o,
        ("residual, RMSNorm", "eager"): 12 * n * d + 6 * n + d,
        ("residual, RMSNorm", "compiled"): 4 * n * d + n + d,
        ("residual, RMSNorm", "TorchScript"): 12 * n * d + 6 * n + d,
    }
    return {key: 4 * number for key, number in numbers.items()}


def ways(d_in: int, d_out: int, x: Tensor) -> dict[str, dict[str, Callable[[], Any]]]:
    """Each piece's ways, ready to run; those of ``torch.compile`` are compiled when they first run."""
    gelu, batch_norm, rms_norm = LinearGELU(d_in, d_out), LinearBatchNormReLU(d_in, d_out), ResidualRMSNorm(d_in)
    update = torch.randn_like(x)
    with torch._inductor.config.patch(TEMPLATE):
        # A function of its own: what torch.compile makes of a module's forward serves every call of that forward.
        template = torch.compile(lambda x: gelu(x), dynamic=False)
        template(x)
    pieces: dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, Callable[..., Any] | None]]] = {
        "linear, bias, GELU": (gelu, (x,), {"template": template}),
        "linear, batch norm, ReLU": (
            batch_norm,
            (x,),
            {"folded": folded(batch_norm.eval()), "TorchScript": frozen_script(batch_norm.eval())},
        ),
        "residual, RMSNorm": (rms_norm, (x, update), {"TorchScript": frozen_script(rms_norm.eval())}),
    }
    runs: dict[str, dict[str, Callable[[], Any]]] = {}
    for piece, (model, inputs, others) in pieces.items():
        functions = {"eager": model.eval(), "compiled": torch.compile(model.eval(), dynamic=False), **others}
        runs[piece] = {way: partial(function, *inputs) for way, function in functions.items() if function is not None}
    return runs


def measure(piece: str, runs: dict[str, Callable[[], Any]], rounds: int) -> list[dict[str, Any]]:
    expected = runs["eager"]()
    for run in runs.values():
        for _ in range(3):  # compiles; TorchScript looks at the first runs, too
            torch.testing.assert_close(run(), expected, atol=1e-4, rtol=1e-4)
    times: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(rounds):
        for way, run in runs.items():
            start = time.process_time()
            run()
            times[way].append(round(time.process_time() - start, 6))
    rows = []
    for way, run in runs.items():
        counter = (count_generated if way in ("compiled", "template") else count_eager)(run)
        rows.append(
            {
                "piece": piece,
                "way": way,
                "kernels": [name for name, _ in counter.kernels],
                "bytes_moved": counter.moved,
                "bytes_allocated": allocated(run),
                "seconds": times[way],
                "ratio": round(statistics.median(a / b for a, b in zip(times["eager"], times[way], strict=True)), 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each way (default: 15)")
    parser.add_argument("--tokens", type=int, default=2048, help="rows of the input (default: 2048)")
    parser.add_argument("--smoke", action="store_true", help="small and once")
    parser.add_argument("--json", type=Path, help="also write the JSON line to this file")
    arguments = parser.parse_args()
    rounds = 1 if arguments.smoke else arguments.rounds
    n, d_in, d_out = (64, 32, 64) if arguments.smoke else (arguments.tokens, 512, 2048)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        pieces = ways(d_in, d_out, torch.randn(n, d_in))
        rows = [row for piece, runs in pieces.items() for row in measure(piece, runs, rounds)]
    forms = closed_forms(n, d_in, d_out)
    rows = [{**row, "bytes_closed_form": forms[row["piece"], row["way"]]} for row in rows]
    line = {
        "benchmark": "fusion",
        "dtype": "float32",
        "threads": 1,
        "device": "cpu",
        "shape": {"tokens": n, "d_in": d_in, "d_out": d_out},
        "machine": {"machine": platform.machine(), "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__},
        "rows": rows,
    }
    print(json.dumps(line))
    if arguments.json:
        arguments.json.write_text(json.dumps(line) + "\n", encoding="utf-8")
    print(f"\n{n} tokens, d_in {d_in}, d_out {d_out}, float32, one thread; MiB; ms: median [least, greatest]")
    print(f"{'':26}{'':12} kernels   moved  closed form  allocated   ms {'':17} times faster than eager")
    for row in rows:
        ms = [1e3 * second for second in row["seconds"]]
        print(
            f"{row['piece']:26}{row['way']:12}{len(row['kernels']):7} {row['bytes_moved'] / 2**20:8.2f}"
            f" {row['bytes_closed_form'] / 2**20:11.2f} {row['bytes_allocated'] / 2**20:10.2f}"
            f"   {statistics.median(ms):7.2f} [{min(ms):.2f}, {max(ms):.2f}]   {row['ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
