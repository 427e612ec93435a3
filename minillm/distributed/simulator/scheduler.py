"""Ranks as threads of which one runs at a time, in the order of their virtual clocks.

The rank that runs holds the baton. It hands it on where it waits for others, and before each message while another rank
whose clock is behind could still act: so messages are posted in the order of virtual time, whatever the order of
threads, and the same program always gives the same run. When nobody can go on there is a deadlock, and it is known at
once.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NoReturn

import torch

from minillm.distributed.errors import DeadlockError, MismatchError, RankError
from minillm.distributed.simulator.records import CallRecord, Span


class Aborted(BaseException):
    """Ends a rank because the simulation has failed elsewhere; no `except Exception` of the program's holds it up."""


class Event:
    """Something a rank may wait for; `end` is the virtual time at which it is done, None while that is not known."""

    def __init__(self, name: str, description: Callable[[], str]) -> None:
        self.name, self._description = name, description
        self.end: float | None = None

    def __str__(self) -> str:
        return self._description()


class Rank:
    """One simulated rank: its thread, its clock, its generator."""

    exchange: Any  # where it meets the others

    def __init__(self, index: int, scheduler: Scheduler, seed: int) -> None:
        self.index, self.scheduler = index, scheduler
        self.clock = 0.0
        self.event: Event | None = None  # what it waits for
        self.done = False
        self.baton = threading.Semaphore(0)
        self.lanes: dict[str, float] = {}  # when each lane is free
        self.listeners: list[Callable[[CallRecord], None]] = []
        self.flops_per_second: float | None = None
        self.generator_state = torch.Generator().manual_seed(seed).get_state()

    def runnable_at(self) -> float | None:
        """The virtual time at which this rank can go on; None: it is done, or nobody knows."""
        if self.done:
            return None
        if self.event is None:
            return self.clock
        return None if self.event.end is None else max(self.clock, self.event.end)


_current: ContextVar[Rank | None] = ContextVar("the simulated rank of this thread", default=None)


def current_rank() -> Rank | None:
    """The simulated rank that the calling thread is, or None outside of a simulation."""
    return _current.get()


class Scheduler:
    """Runs one function on every rank."""

    def __init__(self, world_size: int, seed: int) -> None:
        self.ranks = [Rank(index, self, seed + index) for index in range(world_size)]
        self.spans: list[Span] = []
        self._running: Rank | None = None
        self.given_up = False  # nobody waits for the ranks any more, and what is global is the caller's again
        self._failure: BaseException | None = None
        self._finished = threading.Semaphore(0)

    def run(self, main: Callable[[Rank], None], timeout: float) -> None:
        """Call `main` in a thread for each rank, until all have returned.

        Raises:
            RankError: `main` raised on a rank. DeadlockError, MismatchError: see there.
            TimeoutError: `timeout` real seconds are over.
        """
        threads = [
            threading.Thread(target=self._thread, args=(main, rank), name=f"rank {rank.index}", daemon=True)
            for rank in self.ranks
        ]
        outside = torch.get_rng_state()
        for thread in threads:
            thread.start()
        try:
            self._resume(self.ranks[0])
            if not self._finished.acquire(timeout=timeout):
                self._failure = TimeoutError(self._late(threads, timeout))
                raise self._failure
        except BaseException as error:
            self._failure = self._failure or error  # Ctrl-C: every rank ends at its next call
            self.given_up = True
            raise
        finally:
            if self._failure is not None:
                for rank in self.ranks:
                    rank.baton.release()
            torch.set_rng_state(outside)
        for thread in threads:
            _join(thread)
        if self._failure is not None:
            raise self._failure

    def check(self) -> None:
        """End the calling rank if the simulation has failed."""
        if self._failure is not None:
            raise Aborted

    def synchronise(self, rank: Rank) -> None:
        """Let every rank whose clock is behind go first."""
        self.check()
        following = self._next()
        if following is not rank and following is not None:
            self._hand_over(rank, following)

    def wait(self, rank: Rank, event: Event) -> None:
        """Hold the rank until the event is done, and set its clock to that time."""
        self.check()
        if event.end is None:
            rank.event = event
            following = self._next()
            if following is None:
                self.fail(rank, DeadlockError(self._deadlock()))
            else:
                self._hand_over(rank, following)
            rank.event = None
        assert event.end is not None
        if event.end > rank.clock:
            self.span(rank, "wait", event.name, rank.clock, event.end)
            rank.clock = event.end

    def span(self, rank: Rank, lane: str, name: str, start: float, end: float) -> None:
        """Write down what a lane did; what follows on the same without a gap is one span."""
        last = self.spans[-1] if self.spans else None
        if last is not None and (last.rank, last.lane, last.name, last.end) == (rank.index, lane, name, start):
            self.spans[-1] = Span(rank.index, lane, name, last.start, end)
        elif end > start:
            self.spans.append(Span(rank.index, lane, name, start, end))

    def _thread(self, main: Callable[[Rank], None], rank: Rank) -> None:
        _current.set(rank)
        # With this, hooks run in the thread that called backward: in this rank, on any device.
        with torch.autograd.set_multithreading_enabled(False):
            try:
                rank.baton.acquire()
                self.check()
                torch.set_rng_state(rank.generator_state)
                main(rank)
            except Aborted:
                pass
            except BaseException as error:  # also SystemExit: a rank that leaves is a rank that failed
                self._note(rank, error)
            rank.done = True
            self._leave()

    def _leave(self) -> None:
        """Hand the baton on from a rank that is done."""
        following = self._next()
        if self._failure is None and following is None and not all(rank.done for rank in self.ranks):
            self._failure = DeadlockError(self._deadlock())
        if self._failure is not None or following is None:
            self._finished.release()
        else:
            self._resume(following)

    def _next(self) -> Rank | None:
        best, best_time = None, float("inf")
        for rank in self.ranks:
            time = rank.runnable_at()
            if time is not None and time < best_time:
                best, best_time = rank, time
        return best

    def _hand_over(self, rank: Rank, following: Rank) -> None:
        rank.generator_state = torch.get_rng_state()
        self._resume(following)
        rank.baton.acquire()
        self.check()
        torch.set_rng_state(rank.generator_state)

    def _resume(self, rank: Rank) -> None:
        self._running = rank
        rank.baton.release()

    def fail(self, rank: Rank, error: Exception) -> NoReturn:
        """End the simulation by an error that `rank` has met, and raise it there, whether or not `fn` catches it."""
        self._note(rank, error)
        raise error

    def _note(self, rank: Rank, error: BaseException) -> None:
        if self._failure is None:
            of_all = isinstance(error, DeadlockError | MismatchError)
            self._failure = error if of_all else RankError.of(rank.index, error)

    def _deadlock(self) -> str:
        lines = [
            f"rank {rank.index} has returned" if rank.done else f"rank {rank.index} waits for {rank.event}"
            for rank in self.ranks
        ]
        return "deadlock: no rank can go on\n  " + "\n  ".join(lines)

    def _late(self, threads: list[threading.Thread], timeout: float) -> str:
        frames = sys._current_frames()
        lines = []
        for rank, thread in zip(self.ranks, threads, strict=True):
            if rank.done:
                lines.append(f"rank {rank.index} has returned")
            elif rank.event is not None:
                lines.append(f"rank {rank.index} waits for {rank.event}")
            elif rank is not self._running:
                lines.append(f"rank {rank.index} waits for its turn")
            elif thread.ident in frames:
                place = traceback.extract_stack(frames[thread.ident])[-1]
                lines.append(f"rank {rank.index} is in {place.name}, {place.filename}:{place.lineno}")
        return f"the ranks had not returned after {timeout:g} seconds\n  " + "\n  ".join(lines)


def _join(thread: threading.Thread) -> None:
    """Wait until a thread is really gone.

    Before Python 3.13 `join` returns while the system's thread still gives back what libraries keep for each thread. A
    process forked in that moment (`run_ranks`) inherits their locks as held, and hangs in its first matrix product.
    """
    thread.join()
    while os.path.exists(f"/proc/self/task/{thread.native_id}"):
        time.sleep(1e-4)
