"""The end of a rank: the others learn why it left, and nobody waits for one that is gone."""

import atexit
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from minillm.distributed.errors import RankError, lost_peer, named_ranks
from minillm.distributed.private_torch import process_groups

_HOLD = 0.3  # seconds that gloo's threads need at most to let go of the last collective
_DESTROY = 10.0  # seconds; a group can wait without end for a peer that is gone
_REASON = 3.0  # seconds in which a rank that failed, or lost a peer too, must have said so
_LOOK = 0.05


@contextmanager
def tell_and_leave(store: Store, rank: int, world_size: int, *, hosts_store: bool) -> Iterator[None]:
    """Leave the default group at the end of the block: after all others came there, or at once after an exception.

    store: of all ranks, outside of the group. hosts_store: it ends with this process, so the others read first.
    Raises RankError where this rank failed because another one was gone; other exceptions pass.
    """
    try:
        yield
        dist.barrier()
    except BaseException as error:
        reason, staying = error, world_size
        if lost_peer(str(error)):
            reason = who_is_gone(store, rank, world_size)
            staying = world_size - 1
        else:
            said = json.dumps({"rank": rank, "message": RankError.of(rank, error).message})
            with suppress(RuntimeError):  # the store may be gone with rank 0
                store.set("failed", said)
        _destroy(exit_code=1)
        with suppress(RuntimeError):
            store.add("left", 1)
            until = time.monotonic() + _REASON
            while hosts_store and store.add("left", 0) < staying and time.monotonic() < until:
                time.sleep(_LOOK)
        if reason is error:
            raise
        raise reason from error
    _destroy(exit_code=0)


def who_is_gone(store: Store, rank: int, world_size: int) -> RankError:
    """The error of the first rank that failed, or that of the one from which there is no word."""
    end = f"; rank {rank} cannot go on without it"
    until = time.monotonic() + _REASON
    try:
        store.set(f"lost/{rank}", "")
        while True:
            if store.check(["failed"]):
                failed = json.loads(store.get("failed"))
                return RankError(failed["message"] + end, failed["rank"])
            silent = [other for other in range(world_size) if not store.check([f"lost/{other}"])]
            # A rank that fails says so before its connections close: the only one without a word has not failed.
            if len(silent) == 1 or time.monotonic() > until:
                break
            time.sleep(_LOOK)
    except RuntimeError:
        return RankError(f"rank 0 ended without a word, and the ranks' store with it{end}", 0)
    if len(silent) == 1:
        return RankError(
            f"rank {silent[0]} ended without a word: it was killed, or its machine is gone{end}", silent[0]
        )
    word = f"; there is no word from {named_ranks(silent)}" if silent else ""
    return RankError(f"a peer of rank {rank} is gone{word}", silent[0] if silent else rank)


def _destroy(exit_code: int) -> None:
    # A group's end waits for gloo's threads, and holds the interpreter's lock meanwhile. A thread that has yet to let
    # go of the last collective wants that lock: both would wait without end (seen where a DDP was the last to hold the
    # group). So the group stays for a moment, in which nobody holds the lock for long.
    groups = process_groups()
    threading.Thread(target=_hold, args=(groups,), name="last collective", daemon=True).start()
    del groups
    thread = threading.Thread(target=dist.destroy_process_group, name="destroy_process_group", daemon=True)
    thread.start()
    thread.join(_DESTROY)
    if thread.is_alive():  # the interpreter's own end would wait for it too
        atexit.register(functools.partial(_end_at_once, exit_code))


def _hold(groups: list[dist.ProcessGroup]) -> None:
    time.sleep(_HOLD)
    groups.clear()


def _end_at_once(exit_code: int) -> None:
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)
