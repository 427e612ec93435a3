"""A training step of ~10M parameters on two ranks: DataParallel and Zero beside DDP, FSDP2 and ZeroRedundancyOptimizer.

    python benchmarks/data_parallel.py [--rounds 8] [--ranks 2] [--batch 2] [--sequence 128] [--sides "Zero 3"]
    python benchmarks/data_parallel.py --smoke           a few seconds: shows that it runs, no more

Every rank is a process with one thread and gloo between them. All sides stand in the same processes, begin with the
same weights, see the same tokens and take turns step by step: forward, backward, AdamW, gradients dropped. Whenever a
round is over, all sides that communicate must have the same loss.

    alone              each rank trains by itself: what computing costs when all cores are as busy
    DDP                torch's DistributedDataParallel; "views": gradient_as_bucket_view=True
    DataParallel       ours: one all-reduce a parameter after the backward, buckets after the backward, overlapped
    DDP + ZeRO-1       DDP with torch's ZeroRedundancyOptimizer
    FSDP2              torch's fully_shard on every block and on the model; "kept": reshard_after_forward=False
    Zero 1, 2, 3       ours; "kept": reshard_after_forward=False

"wall" is the slowest rank's time of a step, "CPU" the CPU time of all ranks together, which other work on the machine
disturbs less; both in ms, median [least, greatest] over the rounds. Ratios are medians over the rounds of the quotient
of two turns in the same round. "sent" are the bytes that a rank sends in a step by the ring algorithm, in units of
(n - 1) / n times the parameters' bytes (on gloo a reduce-scatter really moves as much as an all-reduce). "held" are MB
by kind on rank 0 between the backward and the optimizer's step.

Then the simulator: one DataParallel step of a small model on 8 and 64 simulated ranks in one process, beside the same
number of steps without communication, and what a collective costs. Writes benchmarks/results/data_parallel.json
(--json FILE: another file); --smoke and --sides (which takes the peers of these sides too) write only where --json says
so.
"""

import sys
from pathlib import Path

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # where tokenizers.py, which stands beside this file, would hide the library of that name

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from minillm.distributed import DataParallel, Zero, run_ranks, simulate_ranks
from minillm.distributed.memory import measure_memory
from minillm.distributed.traffic import count_traffic
from minillm.models import Transformer, TransformerConfig

RESULTS = Path(__file__).parent / "results" / "data_parallel.json"
LARGE = TransformerConfig(vocab_size=8192, context_length=256, d_model=256, n_layers=10, n_heads=4)
SMALL = TransformerConfig(vocab_size=64, context_length=16, d_model=32, n_layers=2, n_heads=2)


class Side(NamedTuple):
    """One way of training."""

    module: nn.Module
    optimizer: Any
    zero_grad: Callable[[], None]


def _plain(wrap: Callable[[nn.Module], nn.Module], optimizer: Callable[..., Any] = torch.optim.AdamW) -> Any:
    def make(model: nn.Module) -> Side:
        module = wrap(model)
        stepper = optimizer(module.parameters(), lr=1e-3)
        return Side(module, stepper, stepper.zero_grad)

    return make


def _zero(**options: Any) -> Any:
    def make(model: nn.Module) -> Side:
        zero = Zero(model, torch.optim.AdamW(model.parameters(), lr=1e-3), **options)
        return Side(model, zero, zero.zero_grad)

    return make


def _fsdp(model: nn.Module, **options: Any) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def _zero_redundancy(parameters: Any, lr: float) -> ZeroRedundancyOptimizer:
    return ZeroRedundancyOptimizer(parameters, optimizer_class=torch.optim.AdamW, lr=lr)


SIDES: dict[str, Callable[[nn.Module], Side]] = {
    "alone": _plain(lambda model: model),
    "DDP": _plain(DistributedDataParallel),
    "DDP views": _plain(lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True)),
    "DataParallel naive": _plain(lambda model: DataParallel(model, bucket_bytes=None, overlap=False)),
    "DataParallel buckets": _plain(lambda model: DataParallel(model, overlap=False)),
    "DataParallel overlapped": _plain(DataParallel),
    "DDP + ZeRO-1": _plain(DistributedDataParallel, _zero_redundancy),
    "Zero 1": _zero(stage=1),
    "Zero 2": _zero(stage=2),
    "FSDP2": _plain(_fsdp),
    "Zero 3": _zero(stage=3),
    "FSDP2 kept": _plain(lambda model: _fsdp(model, reshard_after_forward=False)),
    "Zero 3 kept": _zero(stage=3, reshard_after_forward=False),
}
# side -> what it is to be compared with
PEERS = {
    "DataParallel naive": "DDP",
    "DataParallel buckets": "DDP",
    "DataParallel overlapped": "DDP",
    "Zero 1": "DDP + ZeRO-1",
    "Zero 2": "DDP + ZeRO-1",
    "Zero 3": "FSDP2",
    "Zero 3 kept": "FSDP2 kept",
}


def loss_of(module: nn.Module, tokens: Tensor) -> Tensor:
    logits = module(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def step(side: Side, tokens: Tensor) -> float:
    loss = loss_of(side.module, tokens)
    loss.backward()
    side.optimizer.step()
    side.zero_grad()
    return float(loss.detach())


class Later:
    """Stands for an optimizer that is not made yet, so that memory is counted from before it is."""

    optimizer: Any = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [] if self.optimizer is None else self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return getattr(
            getattr(self.optimizer, "optim", self.optimizer), "state", {}
        )  # optim: ZeroRedundancyOptimizer's

    def tensors_by_kind(self) -> Any:
        return self.optimizer.tensors_by_kind() if hasattr(self.optimizer, "tensors_by_kind") else {}


def count(name: str, model: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """Bytes sent in a second step, and what is held in it between backward and optimizer; buckets included."""
    later = Later()
    with measure_memory(model, later) as memory:
        side = SIDES[name](model)
        later.optimizer = side.optimizer
        step(side, tokens)
        with count_traffic() as traffic:
            loss_of(side.module, tokens).backward()
            held = memory.live
            side.optimizer.step()
            side.zero_grad()
    return {"bytes_sent": traffic.bytes_sent, "calls": sum(traffic.calls.values()), "held": held}


def on_rank(config: TransformerConfig, batch: int, sequence: int, rounds: int, names: list[str]) -> dict[str, Any]:
    """Turns of all sides on this rank: (seconds, CPU seconds, loss) of each, and what is counted of each."""
    torch.manual_seed(0)
    model = Transformer(config)
    sides = {name: SIDES[name](copy.deepcopy(model)) for name in names}
    generator = torch.Generator().manual_seed(dist.get_rank())
    turns: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}

    def draw() -> Tensor:
        return torch.randint(config.vocab_size, (batch, sequence + 1), generator=generator)

    for number in range(rounds + 1):
        tokens = draw()
        for name in names[number % len(names) :] + names[: number % len(names)]:  # another one begins each time
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            loss = step(sides[name], tokens)
            taken = (time.perf_counter() - wall, time.process_time() - cpu, loss)
            if number:  # the first is to warm up
                turns[name].append(taken)
    sides.clear()
    counted = {name: count(name, copy.deepcopy(model), draw()) for name in names}
    parameter_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return {"turns": turns, "counted": counted, "parameter_bytes": parameter_bytes}


def measure(
    config: TransformerConfig, n_ranks: int, batch: int, sequence: int, rounds: int, wanted: list[str]
) -> list[dict[str, Any]]:
    peers = {"DDP", *(PEERS[name] for name in wanted if name in PEERS)}
    names = [name for name in SIDES if name in wanted or name in peers]
    ranks = run_ranks(on_rank, n_ranks, config, batch, sequence, rounds, names, timeout=3600)
    rows: list[dict[str, Any]] = []
    for name in names:
        turns = [[rank["turns"][name][number] for rank in ranks] for number in range(rounds)]
        counted = ranks[0]["counted"][name]
        unit = ranks[0]["parameter_bytes"] * (n_ranks - 1) / n_ranks
        rows.append(
            {
                "side": name,
                "wall": [round(1e3 * max(wall for wall, _, _ in turn), 3) for turn in turns],
                "cpu": [round(1e3 * sum(cpu for _, cpu, _ in turn), 3) for turn in turns],
                "sent": round(sum(rank["counted"][name]["bytes_sent"] for rank in ranks) / n_ranks / unit, 6),
                "calls": counted["calls"],
                "held": counted["held"],
                "losses": [[loss for _, _, loss in turn] for turn in turns],
            }
        )
    by_name = {row["side"]: row for row in rows}
    expected = torch.tensor(by_name["DDP"]["losses"])
    for row in rows:
        losses = torch.tensor(row.pop("losses"))
        if row["side"] != "alone":
            torch.testing.assert_close(losses, expected, atol=0.0, rtol=1e-3, msg=row["side"])
        peer = PEERS.get(row["side"], "DDP")
        for what in ("wall", "cpu"):
            quotients = [a / b for a, b in zip(row[what], by_name[peer][what], strict=True)]
            row[f"{what}_ratio"] = round(statistics.median(quotients), 3)
        row["peer"] = peer
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "side                      wall, ms, median [least, greatest]  CPU, ms                          "
        "ratio to              wall   CPU   sent calls  held, MB"
    ]
    for row in rows:
        times = [
            f"{statistics.median(row[what]):8.1f} [{min(row[what]):.1f}, {max(row[what]):.1f}]"
            for what in ("wall", "cpu")
        ]
        held = ", ".join(f"{kind} {n / 1e6:.1f}" for kind, n in row["held"].items() if n >= 50_000)
        lines.append(
            f"{row['side']:24} {times[0]:34} {times[1]:32} {row['peer']:20} {row['wall_ratio']:5.2f} "
            f"{row['cpu_ratio']:5.2f} {row['sent']:6.3f} {row['calls']:5}  {held}"
        )
    return "\n".join(lines)


def small_step(n_steps: int) -> list[float]:
    """DataParallel where there is a group, the model alone where there is none."""
    torch.manual_seed(0)
    model = Transformer(SMALL)
    module: nn.Module = DataParallel(model, bucket_bytes=20_000) if dist.is_initialized() else model
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    side = Side(module, optimizer, optimizer.zero_grad)
    return [step(side, torch.randint(SMALL.vocab_size, (2, 17))) for _ in range(n_steps)]


def all_reduces(n_calls: int, n_elements: int) -> None:
    for _ in range(n_calls):
        dist.all_reduce(torch.ones(n_elements))


def simulator(n_ranks: list[int]) -> list[dict[str, Any]]:
    """CPU seconds of simulated ranks beside the same work without a cluster, and of one collective a rank."""

    def seconds(run: Callable[[], object]) -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    small_step(2)
    rows = []
    for n in n_ranks:
        calls = 4000 // n
        simulated, alone, collectives = [], [], []
        for _ in range(3):
            simulated.append(seconds(lambda n=n: simulate_ranks(small_step, n, 3)))
            alone.append(seconds(lambda n=n: [small_step(3) for _ in range(n)]))
            collectives.append(seconds(lambda n=n, calls=calls: simulate_ranks(all_reduces, n, calls, 1000)))
        rows.append(
            {
                "ranks": n,
                "seconds": round(statistics.median(simulated), 4),
                "alone": round(statistics.median(alone), 4),
                "collective_us": round(1e6 * statistics.median(collectives) / calls / n, 1),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="turns of each side (default: 8)")
    parser.add_argument("--ranks", type=int, default=2, help="default: 2")
    parser.add_argument("--batch", type=int, default=2, help="sequences a rank (default: 2)")
    parser.add_argument("--sequence", type=int, default=128, help="tokens of each (default: 128)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE", help="default: all")
    parser.add_argument("--smoke", action="store_true", help="small and once")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config, rounds = (SMALL, 1) if arguments.smoke else (LARGE, arguments.rounds)
    batch, sequence = (2, 16) if arguments.smoke else (arguments.batch, arguments.sequence)
    rows = measure(config, arguments.ranks, batch, sequence, rounds, arguments.sides)
    print(table(rows), flush=True)
    simulated = simulator([2] if arguments.smoke else [8, 64])
    for row in simulated:
        print(
            f"simulator, {row['ranks']} ranks: 3 small steps {row['seconds']:.2f} s of CPU, without a cluster "
            f"{row['alone']:.2f} s; a collective costs a rank {row['collective_us']:.0f} us"
        )
    result = {
        "benchmark": "data_parallel",
        "ranks": arguments.ranks,
        "parameters": sum(p.numel() for p in Transformer(config).parameters()),
        "tokens_per_rank": batch * sequence,
        "threads_per_rank": 1,
        "machine": {"machine": platform.machine(), "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__},
        "rows": rows,
        "simulator": simulated,
    }
    some = arguments.smoke or len(arguments.sides) < len(SIDES)
    file = arguments.json or (None if some else RESULTS)
    if file:
        file.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
