"""The parts of PyTorch without a public name that `minillm.distributed` needs: all of them, here and nowhere else.

`tests/distributed/test_private_torch.py` asks for each one, so that a PyTorch that drops one is found by its name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import _disable_current_modes


def after_backward(callback: Callable[[], None]) -> None:
    """Call `callback` once, in this thread, when the backward pass that is running has filled every `grad`.

    Only within a hook: raises RuntimeError where no backward pass is running. DDP and FSDP2 end their work in the same
    way.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def process_groups() -> list[dist.ProcessGroup]:
    """Every group that this rank has made or is in, the default group among them."""
    return list(distributed_c10d._world.pg_map)


class _WorldOfThread:
    """Stands for `torch.distributed`'s one record of process groups, and gives each thread a record of its own."""

    def __init__(self, outside: Any) -> None:
        object.__setattr__(self, "_outside", outside)
        object.__setattr__(self, "_local", threading.local())
        object.__setattr__(self, "_threads", [])

    def _record(self) -> Any:
        return getattr(self._local, "record", self._outside)

    def enter(self) -> None:
        """Give the calling thread an empty record."""
        self._local.record = _Record()
        self._threads.append(threading.current_thread())

    def is_in_use(self) -> bool:
        """Whether a thread with a record of its own is still alive."""
        return any(thread.is_alive() for thread in self._threads)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._record(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._record(), name, value)


class _Record(distributed_c10d._World):
    """`_World` keeps most of its fields in the module's globals; here they belong to the record."""

    pg_map: Any = None
    pg_names: Any = None
    pg_group_ranks: Any = None
    pg_backend_config: Any = None
    group_count: Any = 0
    tags_to_pg: Any = None
    pg_to_tag: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.pg_map, self.pg_names, self.pg_group_ranks, self.pg_backend_config = {}, {}, {}, {}
        self.tags_to_pg, self.pg_to_tag = {}, {}


@contextmanager
def worlds_by_thread() -> Iterator[Callable[[], None]]:
    """While this is open, a thread that has called what it gives sees none but its own process groups.

    Every other thread goes on with the record that there was; and so it is after the end, for those that are late.
    """
    before = distributed_c10d._world
    world = _WorldOfThread(before)
    distributed_c10d._world = world  # type: ignore[assignment]
    isolate: Callable[[bool], None] = torch._C._distributed_c10d._set_thread_isolation_mode  # type: ignore[attr-defined]
    isolate(True)  # groups by name, which functional collectives ask for
    try:
        yield world.enter
    finally:
        isolate(False)
        if not world.is_in_use():  # else, after a time-out, the late thread would find the caller's groups for its own
            distributed_c10d._world = before


def group_key(options: Any) -> tuple[str, tuple[int, ...]]:
    """(name, global ranks) of the group that a backend is asked to make; no ranks for the default group."""
    return options.group_id, tuple(options.global_ranks_in_group)


def group_name(group: dist.ProcessGroup) -> str:
    """The name under which all ranks know a group."""
    return str(distributed_c10d._world.pg_names.get(group, "?"))


def group_of_call(argument: Any) -> dist.ProcessGroup:
    """The process group that an operator of `c10d` (boxed) or of functional collectives (by its name) was given."""
    if isinstance(argument, dist.ProcessGroup):
        return argument
    if isinstance(argument, str):
        return distributed_c10d._resolve_process_group(argument)  # type: ignore[attr-defined, arg-type]
    group: dist.ProcessGroup = dist.ProcessGroup.unbox(argument)
    return group


@contextmanager
def unobserved() -> Iterator[None]:
    """While this is open, no `TorchDispatchMode` of the calling thread sees what is done: it is not the user's program.

    What a simulation copies from rank to rank is no work and no memory of the rank that happens to do it.
    """
    with _disable_current_modes():
        yield
