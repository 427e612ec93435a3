"""The start and the end of a program that runs as many ranks: all of them meet, or each says why not."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from minillm.distributed.errors import lost_peer
from minillm.distributed.farewell import tell_and_leave, who_is_gone
from minillm.distributed.startup_cards import Card, card_of, verdict

_BACKENDS = ("gloo", "nccl", "cpu:gloo,cuda:nccl")
_KNOCK = 0.1  # seconds between two tries to reach rank 0
_MARGIN = 10.0  # seconds that the others give rank 0 to find that somebody is missing


class StartupError(RuntimeError):
    """The ranks could not be brought together; the message says why, and what to do."""


@dataclass(frozen=True)
class Started:
    """What `with initialize() as here` tells.

    Attributes:
        rank, world_size: in the default group.
        local_rank: on this machine.
        device: where this rank's tensors belong: its GPU under NCCL, else the CPU.
        attempt: how often torchrun has restarted the ranks.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    attempt: int


@contextmanager
def initialize(
    *, backend: str | None = None, timeout: float = 300.0, collective_timeout: float = 1800.0
) -> Iterator[Started]:
    """Be one rank of the default process group within the block; for programs that torchrun starts.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which torchrun sets, or whoever starts the ranks by
    hand. Under NCCL the current device becomes ``cuda:LOCAL_RANK``. Rank 0 compares what the ranks say of themselves
    before the group is made. At the end of the block all ranks wait for each other, and the group is destroyed.

    When a rank leaves the block with an exception, the others are told: their collectives with it fail, and what they
    raise names it. Under NCCL that can take `collective_timeout`, unless torchrun, which ends all, is quicker.

    Args:
        backend: "gloo", "nccl" or "cpu:gloo,cuda:nccl"; None is "nccl" where torch sees a GPU, else "gloo".
        timeout: seconds from the first rank's start to the last one's.
        collective_timeout: seconds that one collective may take.

    Raises:
        StartupError: not started as ranks; the port is taken; a rank does not come or came twice; the ranks have other
            versions or backends; there is no GPU for a rank. Each with its cure, on every rank that is there.
        RankError: another rank failed first; ``.rank`` is which.
        ValueError: for a backend or a timeout that is not as above.
    """
    if backend is not None and backend not in _BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(_BACKENDS)}, got {backend!r}")
    for name, seconds in (("timeout", timeout), ("collective_timeout", collective_timeout)):
        if not 0 < seconds < float("inf"):
            raise ValueError(f"{name} must be above 0 and finite, got {seconds}")
    if dist.is_initialized():
        raise StartupError("this process is in a process group already: enter initialize() once")
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    rank, world_size, local_rank = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    deadline = time.monotonic() + timeout
    store = _connect(rank, world_size, deadline, timeout)
    # torchrun keeps its store over a restart, and in it the addresses of processes that are gone.
    store = PrefixStore(f"attempt {attempt}", store)
    device = torch.device("cuda", local_rank) if "nccl" in backend else torch.device("cpu")
    _meet(store, rank, world_size, card_of(backend, world_size, device), deadline, timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=collective_timeout),
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:  # another rank was through already, and died, while this one was still on its way
        if isinstance(error, dist.DistNetworkError) or lost_peer(str(error)):
            raise who_is_gone(store, rank, world_size) from error
        raise
    with tell_and_leave(store, rank, world_size, hosts_store=rank == 0 and not _agent_hosts()):
        yield Started(rank, world_size, local_rank, device, attempt)


def _number(name: str) -> int:
    value = os.environ.get(name)
    if value is None and name == "LOCAL_RANK":
        return _number("RANK")  # started by hand, on one machine
    if value is None:
        program = sys.argv[0] or "program.py"
        raise StartupError(
            f"this program runs as several ranks, and {name} is not set: start it with "
            f"`torchrun --standalone --nproc-per-node 2 {program}`"
        )
    if not value.isdecimal():
        raise StartupError(f"{name} must be a number, got {value!r}: start the program with torchrun, which sets it")
    return int(value)


def _agent_hosts() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect(rank: int, world_size: int, deadline: float, timeout: float) -> Store:
    """The store in which the ranks meet: torchrun's own, or one that rank 0 keeps."""
    if not 0 <= rank < world_size:
        raise StartupError(f"RANK must be in 0 ... {world_size - 1} for WORLD_SIZE={world_size}, got {rank}")
    host, port = os.environ.get("MASTER_ADDR", "localhost"), _number("MASTER_PORT")
    is_master = rank == 0 and not _agent_hosts()
    if not is_master:
        _knock(host, port, deadline, timeout)
    made: list[Store | RuntimeError] = []

    def make() -> None:
        left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
        try:
            made.append(TCPStore(host, port, world_size, is_master, timeout=left, wait_for_workers=False))
        except RuntimeError as error:
            made.append(error)

    # In a thread, because TCPStore waits without end for a server that takes the connection and says nothing.
    thread = threading.Thread(target=make, name="TCPStore", daemon=True)
    thread.start()
    thread.join(max(1.0, deadline - time.monotonic()))
    if not made:
        raise StartupError(
            f"rank {rank} reached {host}:{port}, but what listens there is not the ranks' store: another program has "
            f"the port. Set MASTER_PORT to a free one, or use `torchrun --standalone`, which finds one"
        )
    if not isinstance(made[0], RuntimeError):
        return made[0]
    if "EADDRINUSE" in str(made[0]):
        raise StartupError(
            f"port {port} is taken on this machine (EADDRINUSE), so rank 0 cannot wait for the others there: by "
            "another program, or by an earlier run that has not ended. End that one, set MASTER_PORT to a free port, "
            "or use `torchrun --standalone`, which finds one"
        ) from made[0]
    raise StartupError(f"rank {rank} cannot use the store at {host}:{port}: {made[0]}") from made[0]


def _knock(host: str, port: int, deadline: float, timeout: float) -> None:
    """Wait until somebody listens: TCPStore would wait too, but ends with a screenful of C++ frames."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise StartupError(
                    f"rank 0 has not come within {timeout:g} s: nothing answers at {host}:{port} ({error}). Start rank "
                    "0, and see that MASTER_ADDR is its machine, that MASTER_PORT is the same for all ranks, and that "
                    "no firewall is between"
                ) from error
        time.sleep(_KNOCK)


def _meet(store: Store, rank: int, world_size: int, card: Card, deadline: float, timeout: float) -> None:
    """Every rank shows its card to rank 0, which says to all whether they can start."""
    if store.add(f"came/{rank}", 1) > 1:
        raise StartupError(f"two processes came as rank {rank}: each must have its own RANK, and each run its own port")
    store.set(f"card/{rank}", json.dumps(asdict(card)))
    if rank == 0:
        said = verdict(_cards(store, world_size, deadline), world_size, timeout)
        store.set("verdict", said)
        if said and not _agent_hosts():
            _stay_for_readers(store, world_size)
    else:
        try:
            store.wait(["verdict"], timedelta(seconds=max(1.0, deadline - time.monotonic()) + _MARGIN))
            said = store.get("verdict").decode()
        except RuntimeError as error:
            raise StartupError(
                f"rank 0 has not come within {timeout:g} s, or has ended at the start: see what it says, and start "
                "all ranks again"
            ) from error
        store.add("read", 1)
    if said:
        raise StartupError(said)


def _cards(store: Store, world_size: int, deadline: float) -> dict[int, Card]:
    """The cards of all ranks, or of those that come in time."""
    keys = [f"card/{rank}" for rank in range(world_size)]
    with suppress(RuntimeError):
        store.wait(keys, timedelta(seconds=max(0.1, deadline - time.monotonic())))
    return {rank: Card(**json.loads(store.get(key))) for rank, key in enumerate(keys) if store.check([key])}


def _stay_for_readers(store: Store, world_size: int) -> None:
    """The store ends with rank 0: the others must have read the verdict by then."""
    came = sum(store.check([f"card/{rank}"]) for rank in range(1, world_size))
    until = time.monotonic() + _MARGIN
    while store.add("read", 0) < came and time.monotonic() < until:
        time.sleep(_KNOCK)
