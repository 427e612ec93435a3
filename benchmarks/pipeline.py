"""Pipelines: the executor's cost beside PyTorch's, its bubbles beside theory, and what each schedule keeps in memory.

    python benchmarks/pipeline.py [--rounds 12] [--ranks 2 4] [--schedules 1f1b zb-h1]
    python benchmarks/pipeline.py --smoke           a few seconds: shows that it runs, no more

1. A step (forward and backward of all micro-batches) of a small transformer by `Pipeline` and by
   `torch.distributed.pipelining`: the same pieces, micro-batches and schedule. Every rank is a process with one thread
   and gloo between them; all sides stand in the same processes and take turns, and the loss of both must be the same.
   "large" is a transformer whose passes take milliseconds, "tiny" one whose passes take next to nothing, so that what
   is left is what the executors themselves cost. "wall" is the slowest rank's time of a step, "CPU" the CPU time of all
   ranks together, which other work on the machine disturbs less; both in ms, medians over the rounds. Ratios are
   medians over the rounds of the quotient of ours and theirs in the same round.

       ours            PyTorch's
       gpipe           ScheduleGPipe
       1f1b            Schedule1F1B
       interleaved     ScheduleInterleaved1F1B, two chunks a stage
       zb-h1           ScheduleInterleavedZeroBubble, one chunk a stage
       zb-v            ScheduleZBVZeroBubble

2. Bubbles: the executor on simulated ranks, whose virtual clock runs by the matrix products that the pieces really do:
   a forward pass, the half of a backward pass for the input and the half for the weights take one unit each. The
   measured bubble is the share of the ranks' time, from the first pass to the last, in which they stand idle; beside it
   the closed form, or, where there is none, the simulator of schedules; then the same with links that take a tenth of
   a forward pass, beside the simulator of schedules.

3. The most bytes of activations (and of what is on its way) that each stage holds at one time, counted storage by
   storage, and the same in micro-batches' worth; with recomputation, too.

Writes benchmarks/results/pipeline.json (--json FILE: another file); --smoke, and a choice of schedules or ranks, write
only where --json says so.
"""

import sys
from pathlib import Path

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # where tokenizers.py, which stands beside this file, would hide the library of that name

import argparse
import copy
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.nn import functional as F

from minillm.costs import pipeline_bubble, zero_bubble_seconds
from minillm.distributed import Network, measure_memory, now, run_ranks, simulate_ranks
from minillm.distributed.pipeline import Pipeline, Schedule, make_schedule, simulate, split, validate
from minillm.models import Transformer, TransformerConfig

RESULTS = Path(__file__).parent / "results" / "pipeline.json"
SIZES = {
    "large": TransformerConfig(
        vocab_size=512, context_length=64, d_model=128, n_layers=8, n_heads=4, tied_embeddings=False
    ),
    "tiny": TransformerConfig(vocab_size=64, context_length=4, d_model=8, n_layers=8, n_heads=1, tied_embeddings=False),
}
MICRO_BATCHES = 8
# ours -> (PyTorch's, chunks of a stage)
PEERS = {
    "gpipe": ("ScheduleGPipe", 1),
    "1f1b": ("Schedule1F1B", 1),
    "interleaved": ("ScheduleInterleaved1F1B", 2),
    "zb-h1": ("ScheduleInterleavedZeroBubble", 1),
    "zb-v": ("ScheduleZBVZeroBubble", 2),
}


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


Step = Callable[[Tensor, Tensor], float | None]
"""Forward and backward; the loss where it is known."""


def ours(name: str, pieces: Any, n_chunks: int, n_micro_batches: int) -> tuple[Step, Callable[[], None]]:
    schedule = make_schedule(name, dist.get_world_size(), n_micro_batches, n_chunks)
    pipeline = Pipeline(pieces, schedule, loss_of)
    parameters = list(pipeline.parameters())

    def zero_grad() -> None:
        for parameter in parameters:
            parameter.grad = None

    return lambda inputs, targets: float(pipeline.step(inputs, targets)), zero_grad


def theirs(name: str, pieces: Any, n_chunks: int, n_micro_batches: int) -> tuple[Step, Callable[[], None]]:
    kind, _ = PEERS[name]
    rank, p, n = dist.get_rank(), dist.get_world_size(), len(pieces)
    own = [rank, n - 1 - rank] if name == "zb-v" else [rank + p * chunk for chunk in range(n_chunks)]
    stages = [PipelineStage(pieces[i], i, n, torch.device("cpu")) for i in own]
    schedule_type = getattr(schedules, kind)
    single = issubclass(schedule_type, schedules.PipelineScheduleSingle)
    schedule = schedule_type(stages[0] if single else stages, n_micro_batches, loss_fn=loss_of)
    parameters = [parameter for i in own for parameter in pieces[i].parameters()]

    def zero_grad() -> None:
        for parameter in parameters:
            parameter.grad = None

    def step(inputs: Tensor, targets: Tensor) -> float | None:
        losses: list[Tensor] = []
        schedule.step(
            *([inputs] if 0 in own else []), **({"target": targets, "losses": losses} if n - 1 in own else {})
        )
        return float(torch.stack(losses).mean().detach()) if losses else None

    return step, zero_grad


def turns(name: str, size: str, n_micro_batches: int, rows: int, rounds: int) -> list[Any]:
    """On a rank: for each round (seconds, CPU seconds, loss) of both sides."""
    config = SIZES[size]
    n_chunks = PEERS[name][1]
    torch.manual_seed(0)
    model = Transformer(config)
    sides = [
        make(name, split(copy.deepcopy(model), dist.get_world_size() * n_chunks).pieces, n_chunks, n_micro_batches)
        for make in (ours, theirs)
    ]
    draw = torch.Generator().manual_seed(1)
    found = []
    for number in range(rounds + 2):
        shape = (n_micro_batches * rows, config.context_length + 1)
        tokens = torch.randint(config.vocab_size, shape, generator=draw)
        taken: list[Any] = [None, None]
        for side in ((0, 1), (1, 0))[number % 2]:
            step, zero_grad = sides[side]
            zero_grad()
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            loss = step(tokens[:, :-1], tokens[:, 1:])
            taken[side] = (time.perf_counter() - wall, time.process_time() - cpu, loss)
        if number > 1:  # shapes are told in the first, and the allocator has what it needs after the second
            found.append(taken)
    return found


def overhead(names: list[str], n_ranks: int, size: str, n_micro_batches: int, rows: int, rounds: int) -> list[Any]:
    found = []
    for name in names:
        ranks = run_ranks(turns, n_ranks, name, size, n_micro_batches, rows, rounds, timeout=1200)
        row: dict[str, Any] = {"schedule": name, "peer": PEERS[name][0], "ranks": n_ranks, "size": size}
        times: dict[str, list[list[float]]] = {"wall": [], "cpu": []}
        for number in range(rounds):
            (*_, loss), (*_, expected) = ranks[0][number][0], _last(ranks, number)
            assert math.isclose(loss, expected, rel_tol=1e-4), (name, loss, expected)
            times["wall"].append([1e3 * max(rank[number][side][0] for rank in ranks) for side in (0, 1)])
            times["cpu"].append([1e3 * sum(rank[number][side][1] for rank in ranks) for side in (0, 1)])
        for what, pairs in times.items():
            row[what] = round(statistics.median(pair[0] for pair in pairs), 3)
            row[f"{what}_peer"] = round(statistics.median(pair[1] for pair in pairs), 3)
            row[f"{what}_ratio"] = round(statistics.median(a / b for a, b in pairs), 3)
        found.append(row)
        print(
            f"{name:12} {n_ranks} ranks {size:6} {row['wall']:9.2f} {row['wall_peer']:9.2f} {row['wall_ratio']:6.2f} "
            f"{row['cpu']:10.2f} {row['cpu_peer']:9.2f} {row['cpu_ratio']:6.2f}",
            flush=True,
        )
    return found


def _last(ranks: list[Any], number: int) -> Any:
    """PyTorch's turn on the rank that knows its loss."""
    return next(rank[number][1] for rank in ranks if rank[number][1][2] is not None)


# name, stages, micro-batches, chunks
MEASURED = [
    ("naive", 4, 8, 1),
    ("gpipe", 4, 8, 1),
    ("1f1b", 4, 8, 1),
    ("interleaved", 4, 8, 2),
    ("interleaved", 4, 8, 4),
    ("breadth-first", 4, 8, 2),
    ("zb-h1", 4, 8, 1),
    ("zb-h2", 4, 8, 1),
    ("zb-v", 4, 8, 2),
    ("chimera", 4, 8, 1),
    ("dualpipe", 4, 8, 1),
]
SMALL = [(name, 2, 4, min(v, 2)) for name, _, _, v in MEASURED if v < 4]
WIDTH, ROWS, LAYERS = 16, 128, 8  # of a stage
MICRO_BATCH_BYTES = LAYERS * ROWS * WIDTH * 4  # what a layer keeps of a micro-batch is its input


class Work(nn.Module):
    """Matrix products whose every pass takes the same time: of a first piece, behind an embedding that takes none."""

    def __init__(self, n_layers: int, first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, WIDTH) if first else None
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(n_layers))

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def work(schedule: Schedule) -> list[nn.Module]:
    return [Work(LAYERS * schedule.n_stages // schedule.n_pieces, piece == 0) for piece in range(schedule.n_pieces)]


def batch(schedule: Schedule) -> tuple[Tensor, Tensor]:
    n = ROWS * schedule.n_micro_batches
    return torch.zeros(n, dtype=torch.int64), torch.zeros(n, WIDTH)


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def measured_bubble(schedule: Schedule, latency: float = 0.0) -> float:
    """Of the executor, on a clock on which a stage's forward pass takes one second."""

    def step() -> float:
        pipeline = Pipeline(work(schedule), schedule, mean_square)
        pipeline.step(*batch(schedule))  # shapes are told in the first
        dist.barrier()
        begin = now()
        pipeline.step(*batch(schedule))
        return begin

    simulation = simulate_ranks(
        step,
        schedule.n_stages,
        network=Network(latency=latency, bandwidth=1e30),
        flops_per_second=LAYERS * 2 * ROWS * WIDTH**2,
    )
    begin = max(simulation.results)
    # Work that goes on without a gap is one span, which may have begun in the step before.
    spans = [
        (max(span.start, begin), span.end)
        for span in simulation.timeline
        if span.lane == "compute" and span.end > begin
    ]
    length = max(end for _, end in spans) - min(start for start, _ in spans)
    return 1 - sum(end - start for start, end in spans) / schedule.n_stages / length


def closed_form(name: str, p: int, m: int, v: int) -> float | None:
    """The bubble where there is a formula for it, with F = I = W = 1 and B = 2."""
    if name == "naive":
        return 1 - 1 / p
    if name in ("gpipe", "1f1b", "interleaved", "breadth-first"):
        return pipeline_bubble(p, m, v)
    if name == "zb-h1":
        waits = zero_bubble_seconds(p, 1.0, 1.0, 1.0, variant="h1")
        return waits / (3 * m + waits)
    return None


def bubbles(cases: list[tuple[str, int, int, int]]) -> list[dict[str, Any]]:
    rows = []
    for name, p, m, v in cases:
        schedule = make_schedule(name, p, m, v)
        in_theory = closed_form(name, p, m, v)
        row = {
            "schedule": name,
            "stages": p,
            "micro_batches": m,
            "chunks": v,
            "measured": round(measured_bubble(schedule), 6),
            "closed_form": None if in_theory is None else round(in_theory, 6),
            "simulated": round(simulate(schedule, forward=1.0, backward=2.0).bubble, 6),
            "measured_with_latency": round(measured_bubble(schedule, latency=0.1), 6),
            "simulated_with_latency": round(simulate(schedule, forward=1.0, backward=2.0, latency=0.1).bubble, 6),
        }
        rows.append(row)
        print(
            f"{name:14} {p:2} {m:3} {v:2} {row['measured']:9.4f} "
            + (f"{in_theory:9.4f}" if in_theory is not None else " " * 9)
            + f" {row['simulated']:9.4f} {row['measured_with_latency']:13.4f} {row['simulated_with_latency']:9.4f}",
            flush=True,
        )
    return rows


def peaks(schedule: Schedule, recompute: bool) -> list[int]:
    """By stage, the most bytes of activations and messages at one time in a step."""

    def step() -> int:
        pieces = work(schedule)
        pipeline, data = Pipeline(pieces, schedule, mean_square, recompute=recompute), batch(schedule)
        pipeline.step(*data)
        with measure_memory(nn.ModuleList(pieces)) as memory:
            pipeline.step(*data)
        return memory.peak["activations"] + memory.peak["other"]

    return list(simulate_ranks(step, schedule.n_stages).results)


def memory(cases: list[tuple[str, int, int, int]]) -> list[dict[str, Any]]:
    rows = []
    for name, p, m, v in cases:
        schedule = make_schedule(name, p, m, v)
        row: dict[str, Any] = {"schedule": name, "stages": p, "micro_batches": m, "chunks": v}
        row["in_flight"] = list(validate(schedule).peak_in_flight)
        for recompute in (False, True):
            row["bytes_recompute" if recompute else "bytes"] = peaks(schedule, recompute)
        rows.append(row)
        texts = [" ".join(f"{n / MICRO_BATCH_BYTES:5.2f}" for n in row[key]) for key in ("bytes", "bytes_recompute")]
        in_theory = " ".join(f"{n:4.1f}" for n in row["in_flight"])
        print(f"{name:14} {p:2} {m:3} {v:2}   {in_theory}   {texts[0]}   {texts[1]}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="turns of each side (default: 12)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="default: 2 4")
    parser.add_argument("--schedules", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME", help="of part 1")
    parser.add_argument("--smoke", action="store_true", help="small and once")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    smoke = arguments.smoke
    sizes = ["tiny"] if smoke else list(SIZES)
    print("schedule     ranks   size   wall, ms  PyTorch's  ratio    CPU, ms PyTorch's  ratio")
    steps = []
    for n_ranks in [2] if smoke else arguments.ranks:
        for size in sizes:
            rounds = 1 if smoke else arguments.rounds
            steps += overhead(arguments.schedules, n_ranks, size, MICRO_BATCHES, 2, rounds)
    print("\nbubbles         p   m  v  measured    theory simulated  with latency simulated")
    measured = bubbles(SMALL if smoke else MEASURED)
    print("\npeak of activations, in micro-batches' worth, by stage: schedule's, measured, with recomputation")
    kept = memory(SMALL if smoke else MEASURED)
    result = {
        "benchmark": "pipeline",
        "micro_batches": MICRO_BATCHES,
        "threads_per_rank": 1,
        "machine": {"machine": platform.machine(), "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__},
        "steps": steps,
        "bubbles": measured,
        "memory": kept,
    }
    some = smoke or len(arguments.schedules) < len(PEERS) or arguments.ranks != [2, 4]
    file = arguments.json or (None if some else RESULTS)
    if file:
        file.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
