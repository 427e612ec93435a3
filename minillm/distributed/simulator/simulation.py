"""A whole cluster in one process."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from minillm.distributed.errors import MismatchError
from minillm.distributed.private_torch import worlds_by_thread
from minillm.distributed.simulator.exchange import Exchange
from minillm.distributed.simulator.flop_clock import FlopClock
from minillm.distributed.simulator.network import Network
from minillm.distributed.simulator.process_group import BACKEND
from minillm.distributed.simulator.records import Message, Span
from minillm.distributed.simulator.scheduler import Rank, Scheduler, current_rank

# torch.distributed has one record of groups in a process, and a simulation replaces it.
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Simulation:
    """What happened in a simulated cluster.

    Attributes:
        results: what the function returned, by rank.
        messages: in the order in which they were set going.
        bytes_sent: by rank.
        timeline: what each rank did and when, in virtual seconds, in order of start.
        makespan: virtual seconds until the last rank had returned.
    """

    results: list[Any]
    messages: list[Message]
    bytes_sent: list[int]
    timeline: list[Span]
    makespan: float


def simulate_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    network: Network | None = None,
    flops_per_second: float | None = None,
    seed: int = 0,
    timeout: float = 300.0,
) -> Simulation:
    """Run `fn(*args)` on each rank of a cluster that exists only in this process.

    Ordinary `torch.distributed` code runs unchanged: collectives, point-to-point messages, sub-groups, device meshes,
    autograd hooks, DDP and FSDP2. The ranks are threads of which one runs at a time, in the order of their virtual
    clocks, so that the same call always gives the same result. Arguments and results are shared, not copied: `fn`
    should make its model itself, or copy it.

    A library's collective moves the data at once and takes the time, and is logged by the bytes, of the ring algorithm
    on `network`. Blocking `send` is a rendezvous, as in gloo. The clock stands still during ordinary code: time passes
    by messages, by `compute`, and by matrix products if `flops_per_second` is given. As a guest, DDP waits for each
    bucket at once: its C++ code asks for a future, which cannot be one that the clock knows.

    Args:
        fn: called on each rank, within an initialised default group.
        world_size: ranks, at least 1.
        args: for `fn`.
        network: the links; `Network()` has those of a usual cluster.
        flops_per_second: of each rank; turns FLOPs, given or counted, into time.
        seed: torch's default generator, of which each rank has its own, starts at seed + rank.
        timeout: real seconds after which to give up.

    Raises:
        RankError: `fn` raised on a rank; the original is its `__cause__`.
        DeadlockError: no rank can go on; it says who waits for what.
        MismatchError: ranks of one group call different collectives, sizes or dtypes do not fit, or a call was never
            answered though nobody waited for it.
        TimeoutError: it took longer than `timeout`.
        ValueError, TypeError: an argument out of range; a simulation within a simulated rank.
    """
    _check(fn, world_size, network, flops_per_second, seed, timeout)
    scheduler = Scheduler(world_size, seed)
    exchange = Exchange(scheduler, network or Network())
    store = dist.HashStore()  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=1))  # a rank that waited for a key would hold the baton
    results: list[Any] = [None] * world_size

    def main(rank: Rank) -> None:
        enter()
        rank.exchange, rank.flops_per_second = exchange, flops_per_second
        dist.init_process_group(BACKEND, store=store, rank=rank.index, world_size=world_size)
        try:
            with contextlib.nullcontext() if flops_per_second is None else FlopClock():  # type: ignore[no-untyped-call]
                results[rank.index] = fn(*args)
        finally:
            if dist.is_initialized() and not scheduler.given_up:
                dist.destroy_process_group()

    hook = sys.excepthook  # each init_process_group puts a hook that names the rank around the one before
    with _one_at_a_time, worlds_by_thread() as enter:
        try:
            scheduler.run(main, timeout)
        finally:
            sys.excepthook = hook
    unanswered = exchange.unanswered()
    if unanswered:
        raise MismatchError("all ranks have returned, and nobody answered\n  " + "\n  ".join(unanswered))
    sent = [0] * world_size
    for message in exchange.messages:
        sent[message.source] += message.n_bytes
    timeline = sorted(scheduler.spans, key=lambda span: (span.start, span.rank))
    makespan = max(rank.clock for rank in scheduler.ranks)
    return Simulation(results, exchange.messages, sent, timeline, makespan)


def _check(
    fn: Callable[..., Any],
    world_size: int,
    network: Network | None,
    flops_per_second: float | None,
    seed: int,
    timeout: float,
) -> None:
    if not callable(fn):
        raise TypeError(f"fn must be a function, got {fn!r}")
    for name, whole in (("world_size", world_size), ("seed", seed)):
        if isinstance(whole, bool) or not isinstance(whole, int):
            raise TypeError(f"{name} must be an integer, got {whole!r}")
    for name, number in (("flops_per_second", flops_per_second or 1.0), ("timeout", timeout)):
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"{name} must be a number, got {number!r}")
    if network is not None and not isinstance(network, Network):
        raise TypeError(f"network must be a Network or None, got {network!r}")
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    if flops_per_second is not None and not flops_per_second > 0:
        raise ValueError(f"flops_per_second must be above 0, got {flops_per_second}")
    if not 0 < timeout <= threading.TIMEOUT_MAX:
        raise ValueError(f"timeout must be above 0 seconds and finite, got {timeout}")
    if current_rank() is not None:
        raise ValueError("simulate_ranks cannot be called on a simulated rank")
