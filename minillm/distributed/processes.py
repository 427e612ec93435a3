"""Real processes as ranks, started from a script, a test or a notebook cell."""

import contextlib
import math
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers and DDP import it at first use: once here, and not for seconds in every rank
import torch.distributed as dist

from minillm.distributed.errors import RankError, lost_peer, named_ranks
from minillm.distributed.process_entry import Place, dumps, loads, run_rank

_BACKENDS = ("gloo", "nccl", "cpu:gloo,cuda:nccl")
_LOOK_AGAIN = 0.2  # seconds; a death that no closing pipe tells of, because the rank's own children hold it open
_FIRST_CAUSE = 1.0  # seconds to wait for the failure that made a peer say "connection closed"
_ANSWER = 2.0  # seconds in which a rank must say where it stands


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    backend: str = "gloo",
    timeout: float = 120.0,
    seed: int = 0,
) -> list[Any]:
    """Run ``fn(*args)`` in `world_size` new processes, each inside an initialised default process group.

    The ranks are forked, which takes a tenth of a second and works for functions defined in a notebook cell, lambdas
    and closures; each gets its own copy of all that they see. Where a fork cannot be used (CUDA is in use in this
    process, `backend` is NCCL, or the system has none) a fresh process imports what `fn` needs, and `fn` must stand in
    a file. What the ranks print is printed here. No process is left, however this call ends.

    Args:
        fn: is called on each rank; ``dist.get_rank()`` tells which one it is. It may leave the group as it is.
        world_size: how many ranks.
        args: for `fn`, the same on each rank.
        backend: "gloo" for tensors on the CPU; "nccl" for tensors on GPUs, one a rank, which is made the current
            device; or "cpu:gloo,cuda:nccl" for both.
        timeout: seconds, from this call until all ranks have returned.
        seed: rank r's generator, ``torch.default_generator``, starts at ``seed + r``. torch uses one thread a rank.

    Returns: what `fn` returned, by rank. Tensors come by value; one that needs a gradient comes as a leaf.

    Raises:
        RankError: `fn` raised on a rank, its result cannot be sent, or its process died: the first one to fail. All
            others are ended.
        TimeoutError: ranks had not finished; it says which, and in which line they stood. They are ended.
        RuntimeError: this process is in a process group itself.
        TypeError, ValueError: for arguments that are not as above.
    """
    _check(fn, world_size, backend, timeout, seed)
    deadline = time.monotonic() + timeout
    cuda_in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    fork = backend == "gloo" and not cuda_in_use and hasattr(os, "fork")
    work = (fn, args) if fork else _sendable(fn, args)
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("fork" if fork else "forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([run_rank.__module__, "torch._dynamo"])
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # else a fork would copy what waits there
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="minillm-ranks-") as folder:
        store = str(Path(folder) / "store")
        try:
            for number in range(world_size):
                # Its own deadline comes later than this call's, whose message says more.
                place = Place(number, world_size, backend, store, timeout + 60, seed)
                ours, theirs = context.Pipe()
                copied = [rank.line for rank in ranks] + [ours] if fork else []
                process = context.Process(target=run_rank, args=(theirs, place, work, copied), name=f"rank {number}")
                ranks.append(_Rank(number, process, ours))
                with warnings.catch_warnings():
                    # Python 3.12 and later, where other threads run: what they might hold, a rank does not touch.
                    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
                    process.start()
                theirs.close()
            return _results(ranks, deadline, timeout)
        finally:
            for rank in ranks:
                rank.kill()
            for rank in ranks:
                rank.close()


@dataclass
class _Rank:
    """One rank's process and what has come from it."""

    number: int
    process: BaseProcess
    line: Connection
    open: bool = True
    result: bytes | None = None
    failure: RankError | None = None
    failed_at: int = 0  # nanoseconds
    where: str | None = None

    @property
    def finished(self) -> bool:
        return self.result is not None or self.failure is not None

    def receive(self) -> None:
        """Take what has come, print what is to be printed, and see whether the process has died."""
        exit_code = self.process.exitcode  # before the last look: a rank that ends has sent everything
        try:
            while self.open and self.line.poll():
                kind, *message = pickle.loads(self.line.recv_bytes())
                getattr(self, f"_take_{kind}")(*message)
        except (EOFError, OSError):
            self.open = False
        if exit_code is not None and not self.finished:
            self.failed_at = time.monotonic_ns()
            self.failure = RankError(f"rank {self.number} {_death(exit_code)}", self.number)

    def _take_printed(self, stream: str, text: str) -> None:
        print(text, end="", file=getattr(sys, stream), flush=True)

    def _take_result(self, result: bytes) -> None:
        self.result = result

    def _take_where(self, stack: str) -> None:
        self.where = stack

    def _take_error(self, failed_at: int, failure: bytes, cause: bytes | None) -> None:
        self.failed_at, self.failure = failed_at, pickle.loads(failure)
        if cause is not None:
            self.failure.__cause__ = pickle.loads(cause)

    def ask_where(self) -> None:
        try:
            self.line.send_bytes(b"where do you stand?")
        except OSError:
            self.open = False

    def kill(self) -> None:
        """End the process and those that it has started."""
        if self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if hasattr(os, "killpg"):
                    os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()

    def close(self) -> None:
        if self.process.pid is not None:
            self.process.join()
            self.process.close()
        self.line.close()


def _results(ranks: Sequence[_Rank], deadline: float, timeout: float) -> list[Any]:
    while True:
        working = [rank for rank in ranks if not rank.finished]
        for rank in working:
            rank.receive()
        working = [rank for rank in working if not rank.finished]
        failed = min((rank for rank in ranks if rank.failure), key=_precedence, default=None)
        left = deadline - time.monotonic()
        if failed is not None:
            left = min(left, failed.failed_at / 1e9 + _FIRST_CAUSE - time.monotonic())
            if not _lost_peer(failed) or not working or left <= 0:
                raise _first_failure(failed, ranks)
        elif not working:
            return [loads(rank.result) for rank in ranks if rank.result is not None]
        elif left <= 0:
            raise TimeoutError(_where_they_stand(ranks, timeout))
        signs: list[Any] = [rank.line for rank in working if rank.open]
        wait([*signs, *(rank.process.sentinel for rank in working)], min(left, _LOOK_AGAIN))


def _lost_peer(rank: _Rank) -> bool:
    return rank.failure is not None and lost_peer(rank.failure.message)


def _precedence(rank: _Rank) -> tuple[bool, bool, int]:
    """Causes before what they bring about, a death before what its peers make of it, then by time."""
    died = rank.failure is not None and rank.failure.error_type is None
    return _lost_peer(rank), not died, rank.failed_at


def _first_failure(rank: _Rank, ranks: Sequence[_Rank]) -> RankError:
    assert rank.failure is not None
    returned = [other.number for other in ranks if other.result is not None]
    if _lost_peer(rank) and returned:
        rank.failure.message += (
            f"\n{named_ranks(returned)} had returned by then: does every rank call the same collectives?"
        )
    return rank.failure


def _where_they_stand(ranks: Sequence[_Rank], timeout: float) -> str:
    late = [rank for rank in ranks if not rank.finished]
    for rank in late:
        rank.ask_where()
    until = time.monotonic() + _ANSWER
    while (silent := [rank for rank in late if rank.open and rank.where is None]) and time.monotonic() < until:
        wait([rank.line for rank in silent], until - time.monotonic())
        for rank in silent:
            rank.receive()
    places: dict[str, list[int]] = {}
    for rank in late:
        where = rank.where or "  no answer: it is stopped, or in a call that does not let Python run"
        places.setdefault(where, []).append(rank.number)
    said = f"{named_ranks([rank.number for rank in late])} of {len(ranks)} had not finished after {timeout:g} s."
    return said + "".join(
        f"\n\n{named_ranks(numbers)} stood here:\n{place.rstrip()}" for place, numbers in places.items()
    )


def _death(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code} before its function returned"
    known = {member.value: member.name for member in signal.Signals}
    return f"was killed by signal {-exit_code} ({known.get(-exit_code, 'unknown')})"


def _sendable(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """The call as bytes for a process that knows nothing of this one."""
    main = sys.modules["__main__"]
    cure = (
        "CUDA is in use in this process or the backend is NCCL, so its ranks cannot be forked: they import what they "
        "need. Put the function into a file and import it, or call run_ranks before anything touches CUDA."
    )
    if getattr(fn, "__module__", None) == "__main__" and not hasattr(main, "__file__"):
        raise ValueError(f"fn must stand in a file, got one defined in a notebook cell, {fn!r}. {cure}")
    try:
        return dumps((fn, args))
    except Exception as error:
        raise ValueError(f"fn and args must be such that they can be pickled, got {fn!r}: {error}. {cure}") from error


def _check(fn: Callable[..., Any], world_size: int, backend: str, timeout: float, seed: int) -> None:
    if not callable(fn):
        raise TypeError(f"fn must be a function, got {fn!r}")
    for name, number in (("world_size", world_size), ("seed", seed)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be an integer, got {number!r}")
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    if not isinstance(timeout, int | float) or isinstance(timeout, bool):
        raise TypeError(f"timeout must be a number of seconds, got {timeout!r}")
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout must be above 0 and finite, got {timeout}")
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")
    if "nccl" in backend and torch.cuda.device_count() < world_size:
        raise ValueError(
            f"backend {backend!r} needs a GPU for each rank: world_size is {world_size}, and torch sees "
            f"{torch.cuda.device_count()}"
        )
    if dist.is_initialized():
        raise RuntimeError(
            "run_ranks starts a process group of its own, and this process is in one: call it outside of a rank, or "
            "after dist.destroy_process_group()"
        )
