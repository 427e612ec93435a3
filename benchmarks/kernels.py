"""Fused operators beside torch's, in time, error and memory, under the ceilings that this machine was seen to reach.

    python benchmarks/kernels.py                     on a GPU within 8 minutes; without one, the CPU's part, about 6
    python benchmarks/kernels.py --quick             the CPU's part in small, under a minute
    python benchmarks/kernels.py --smoke             every line once, seconds: shows that it runs, no more

On a GPU, bfloat16: attention over lengths from 512 to 16384, heads of 64 and 128, causal and not, by torch's SDPA with
each of its backends and by ours; then every operator of minillm.kernels beside torch's own, eager and compiled.

    ms        Median [least, greatest] of rounds with cold caches, by the device's clock.
    TFLOP/s   Operations that have to be done over the time: two (forward) and five (backward) products a visible pair
              for attention, so that causal counts half.
    TB/s      The same of bytes: each input read once, each output written once.
    roof      Share of the roofline: the least time that the two measured ceilings allow, over the time.
    error     ||x - exact|| / ||exact|| against float64, the largest of the output, or of all gradients. "!": larger
              than the tests allow.
    MiB       The most held at one time beyond what was there before.
    aim       What to reach on one H100, and how much of it is reached (1 is the aim, more is better).

What cannot run (a backend that does not take the call, memory, a failure, no time left) stands in a row with the
reason. On a CPU, float32, one thread, the process's own time: attention written out, in tiles, and by torch, at lengths
from 1024 to 8192; and the loss of a language model's head with its logits in memory and without.

The result goes to benchmarks/results/kernels_DEVICE.json; with --only, --quick and --smoke only to where --out or
--json says. It is written again after each operator, so that a run that is cut off leaves what it has measured.
"""

import sys
from pathlib import Path

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # where tokenizers.py, which stands beside this file, would hide the library of that name
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the parts in benchmarks/ are found

import argparse
import gc
import importlib
import importlib.util
import json
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton asks once, when something first imports it: what follows does

from benchmarks.kernel_parts import cpu
from benchmarks.kernel_parts.attention_cases import attention_cases
from benchmarks.kernel_parts.measuring import NO_TIME, OURS, Case, Clock, rows_of
from benchmarks.kernel_parts.operator_cases import operator_cases
from minillm.kernels.ceilings import Ceilings, measure_ceilings

RESULTS = Path(__file__).resolve().parent / "results"
COMPUTE = 16.0  # operations a byte from which on a rate of operations is shown, not of bytes


class Report:
    """Rows as they come, printed where `add` is told how, and in a file that is whole at any time."""

    def __init__(self, device: torch.device, file: Path | None) -> None:
        self.file, self.start = file, time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.result: dict[str, Any] = {
            "benchmark": "kernels",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "machine": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
            "versions": versions(),
            "complete": False,
            "rows": self.rows,
        }

    def spent(self) -> float:
        return time.monotonic() - self.start

    def add(self, rows: Iterable[dict[str, Any]], line: Callable[[dict[str, Any]], str] | None = None) -> None:
        for row in rows:
            if line is not None:
                print(line(row), flush=True)
            self.rows.append(row)
        self.write()

    def write(self) -> None:
        if self.file is None:
            return
        self.result["seconds"] = self.spent()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".part")
        unfinished.write_text(json.dumps(rounded(self.result)) + "\n", encoding="utf-8")
        unfinished.replace(self.file)


def rounded(value: Any) -> Any:
    """Numbers to four digits, all the way down."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def versions() -> dict[str, str | None]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None,
    }


def on_ceilings(ceilings: Ceilings, report: Report) -> None:
    flops = {str(dtype).removeprefix("torch."): rate for dtype, rate in ceilings.flops_per_second.items()}
    report.result["ceilings"] = {"flops_per_second": flops, "bytes_per_second": ceilings.bytes_per_second}
    products = ", ".join(f"{name} {rate / 1e12:.4g} TFLOP/s" for name, rate in flops.items())
    print(f"{report.result['device']}: {products}; copy {ceilings.bytes_per_second / 1e12:.4g} TB/s\n")


# Kernels beside torch ------------------------------------------------------------------------------------------------


def kernels(device: torch.device, smoke: bool, only: str, budget: float, report: Report) -> None:
    gc.freeze()  # each peak of memory is read after a collection, which need not walk over the libraries
    ceilings = measure_ceilings(device, seconds=0.1 if smoke else 4.0)
    on_ceilings(ceilings, report)
    clock = Clock(device, seconds=0.0 if smoke else 0.15, least=1 if smoke else 3)
    cases: dict[str, Callable[[], Case]] = {
        **attention_cases(device, smoke, 128),
        **operator_cases(device, smoke),
        **attention_cases(device, smoke, 64),
    }
    cases = {name: make for name, make in cases.items() if re.search(only, name)}
    for compiled in (False, True):  # torch.compile takes the longest: last, with the time that is left
        for make in cases.values():
            case = make()
            sides = [side for side in case.sides if (side == "compiled") == compiled]
            rows = rows_of(case, sides, clock, ceilings, is_over=lambda: report.spent() > budget)
            report.add(rows, kernel_line)
            del case, rows
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if compiled:
                torch.compiler.reset()


def kernel_line(row: dict[str, Any]) -> str:
    head = f"{row['operator']:20} {row['shape']:30} {row['what']:18} {row['side']:20}"
    if "failed" in row:
        return f"{head} {row['failed']}"
    times = row["seconds"]
    return f"{head} {1e3 * times['median']:9.4f} [{1e3 * times['min']:.4f}, {1e3 * times['max']:.4f}] {figures(row)}"


def figures(row: dict[str, Any]) -> str:
    compute = row["tflops"] > COMPUTE * row["tb_per_s"]
    rate = f"{row['tflops']:7.1f} TFLOP/s" if compute else f"{row['tb_per_s']:7.3f} TB/s   "
    error = f"{row['error']:.1e}{'!' if row['wrong'] else ' '}" if "error" in row else row["no_error"]
    memory = row.get("peak_bytes", 0) / 2**20
    return f"{rate} {100 * row['share']:5.1f} % {error} {memory:9.1f}"


def failures(rows: list[dict[str, Any]]) -> str:
    """Each reason once."""
    counts = Counter((row["operator"], row["side"], row["failed"]) for row in rows if "failed" in row)
    return "\n".join(f"{count} x {operator}, {side}: {why}" for (operator, side, why), count in counts.items())


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each thing measured: ours, and the fastest of torch's."""
    title = (
        f"{'':72} {'ms':>9} {'rate':>15} {'roof':>7} {'error':>8} {'MiB':>9} {'fastest of torch, ms':>38} {'x':>6}  aim"
    )
    lines = [title]
    for ours in rows:
        if ours["side"] != OURS:
            continue
        head = f"{ours['operator']:20} {ours['shape']:30} {ours['what']:19}"
        if "failed" in ours:
            lines.append(f"{head} failed")
            continue
        same = ("operator", "shape", "what")
        others = [
            row
            for row in rows
            if row is not ours and all(row[key] == ours[key] for key in same) and not row.get("wrong", "failed" in row)
        ]
        mine = ours["seconds"]["median"]
        line = f"{head} {1e3 * mine:9.4f} {figures(ours)}"
        if others:
            best = min(others, key=lambda row: row["seconds"]["median"])
            seconds = best["seconds"]["median"]
            line += f" {best['side']:>28} {1e3 * seconds:9.4f} {seconds / mine:6.2f}"
        if "aim" in ours:
            line += f"  {ours['aim']}: {ours['reached']:.2f}"
        if "published" in ours:
            line += "  " + ", ".join(f"{name} {rate:g}" for name, rate in ours["published"].items())
        lines.append(line)
    return "\n".join(lines)


# On a CPU ------------------------------------------------------------------------------------------------------------


def without_a_gpu(size: str, only: str, budget: float, report: Report) -> None:
    """``size``: full, quick or smoke."""
    if "ceilings" not in report.result:
        on_ceilings(measure_ceilings("cpu"), report)
    lengths = {"full": (1024, 2048, 4096, 8192), "quick": (1024, 2048), "smoke": (64,)}[size]
    loss = {"full": (4096, 512, 32768), "quick": (1024, 256, 16384), "smoke": (40, 16, 70)}[size]
    rounds = {"full": 5, "quick": 5, "smoke": 1}[size]
    before = len(report.rows)
    plan = {
        f"attention {length}{' causal' if causal else ''}": partial(
            cpu.attention, length, causal, min(rounds, 3) if length > 4096 else rounds
        )
        for length in lengths
        for causal in ((True,) if size == "smoke" else (False, True))
    }
    plan["linear_cross_entropy"] = partial(cpu.loss, *loss, min(rounds, 3))
    for name, measure in plan.items():
        if re.search(only, name):
            if report.spent() > budget:
                report.rows.append({"operator": name, "failed": NO_TIME})
                continue
            print(f"measuring {name}", flush=True)
            report.add(measure())
    print(f"\n{'':24} {'':18} {'':16} {'s':>8} {'':14} {'faster':>7} {'peak MiB':>10} {'error':>9}")
    for row in report.rows[before:]:
        print(f"{row['operator']}: {row['failed']}" if "failed" in row else cpu.line(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, help="default: cuda where torch sees it, else cpu")
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="operators whose name this regular expression finds"
    )
    parser.add_argument("--budget", type=float, default=440.0, help="seconds after which nothing new begins (440)")
    parser.add_argument("--quick", action="store_true", help="on a CPU: short lengths")
    parser.add_argument("--smoke", action="store_true", help="tiny and once")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder for the result (default: benchmarks/results)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the result, whatever the device's name")
    arguments = parser.parse_args()
    device = arguments.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    torch.set_num_threads(1)
    torch.manual_seed(0)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    folder = arguments.out or (None if arguments.only or arguments.quick or arguments.smoke else RESULTS)
    file = folder and folder / f"kernels_{re.sub('[^a-z0-9]+', '_', name.lower())}.json"
    report = Report(device, arguments.json or file)
    if device.type == "cuda" or arguments.smoke:
        kernels(device, arguments.smoke, arguments.only, arguments.budget, report)
    measured = list(report.rows)
    if device.type == "cpu":
        size = "smoke" if arguments.smoke else "quick" if arguments.quick else "full"
        without_a_gpu(size, arguments.only, arguments.budget, report)
    report.result["complete"] = not any(row.get("failed") == NO_TIME for row in report.rows)
    report.write()

    if measured:
        print(f"\n{failures(measured)}\n\n{table(measured)}")
    print(f"\n{report.spent():.0f} seconds{f'; {report.file}' if report.file else ''}")
    if any(row["side"] == OURS and (row.get("wrong") or row.get("failed", NO_TIME) != NO_TIME) for row in measured):
        sys.exit("some of ours failed or are wrong, see above")


if __name__ == "__main__":
    main()
