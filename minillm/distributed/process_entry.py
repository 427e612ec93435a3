"""What runs in a process that :func:`minillm.distributed.run_ranks` starts: one rank, and its line to the parent.

The line is one two-way pipe. Up go what the rank prints, its result or its error; down comes the question
where it stands. A thread listens
to it for as long as the rank lives: when the parent's end closes, however the parent ended, the rank ends too.
"""

import io
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from minillm.distributed.errors import RankError

_LINGER = 1.0  # seconds that a rank stays after its result: its last messages may still be under way to its peers
_CHECK_PARENT = 1.0  # seconds; beside the closing pipe, of which another process may hold a copy
_FRAMES = 12  # innermost frames of a rank that has not finished


Work = tuple[Callable[..., Any], tuple[Any, ...]] | bytes


@dataclass(frozen=True)
class Place:
    """Which rank this is, of how many, and where they meet.

    backend: as for ``dist.init_process_group``. store: path of a file that no other group uses. timeout: seconds until
    a collective gives up. seed: of rank 0's generator.
    """

    rank: int
    world_size: int
    backend: str
    store: str
    timeout: float
    seed: int


def dumps(value: object) -> bytes:
    """`value` as bytes, tensors in it by value: they do not depend on the process that wrote them."""
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=pickle.HIGHEST_PROTOCOL)
    return buffer.getvalue()


def loads(data: bytes) -> Any:
    """What :func:`dumps` was given. The bytes must come from this program: reading them can run code."""
    return torch.load(io.BytesIO(data), weights_only=False)


def run_rank(
    line: Connection,
    place: Place,
    work: Work,
    others: Sequence[Connection],
) -> None:
    """Do `work` as one rank, report on `line`, and end the process: this never returns.

    work: (function, arguments), or the same through :func:`dumps`. others: ends of pipes that belong to the parent and
    that a fork copied.
    """
    for copied in others:
        copied.close()  # else the pipe's other end would stay open when the parent ends
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # whoever ends this rank ends what it has started too; and Ctrl-C is for the parent alone
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    channel = _Channel(line)
    arguments = (line, channel, threading.get_ident())
    threading.Thread(target=_listen, args=arguments, name="line to the parent", daemon=True).start()
    sys.stdout, sys.stderr = _Printed(channel, "stdout"), _Printed(channel, "stderr")
    said: tuple[object, ...]
    try:
        said = ("result", _work(place, work))
    except BaseException as error:  # also SystemExit: a rank that leaves has not done its work
        said = ("error", time.monotonic_ns(), *_report(place.rank, error))
    sys.stdout.flush()
    sys.stderr.flush()
    channel.send(*said)
    channel.flush()
    time.sleep(_LINGER)  # the parent ends all ranks when it has heard from all
    # Without the interpreter's clean-up: a group's destructor can wait forever for a peer or for a live DDP reducer.
    _end_with_children()


def _end_with_children() -> NoReturn:
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _work(place: Place, work: Work) -> bytes:
    torch.set_num_threads(1)  # ranks share the cores; and a forked process must not wait for OpenMP's lost threads
    torch.manual_seed(place.seed + place.rank)
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopback:  # all ranks are here: no need for a host name that resolves, nor for a firewall that lets them talk
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    device = None
    if "nccl" in place.backend:
        device = torch.device("cuda", place.rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        place.backend,
        store=dist.FileStore(place.store, place.world_size),  # type: ignore[attr-defined]
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=place.timeout),
        device_id=device,
    )
    fn, args = loads(work) if isinstance(work, bytes) else work
    result = fn(*args)
    try:
        return dumps(result)
    except Exception as error:
        kind = type(result).__name__
        raise TypeError(f"the result, of type {kind}, cannot be sent to the parent process: {error}") from None


def _report(rank: int, error: BaseException) -> tuple[bytes, bytes | None]:
    """The error for the parent to raise, and its cause if that can be sent."""
    below = _below_this_file(error.__traceback__)
    text = "".join(traceback.format_exception(type(error), error, below))
    failure = pickle.dumps(RankError.of(rank, error, text))
    try:
        cause = pickle.dumps(error)
        pickle.loads(cause)  # many exceptions can be written and not read
    except Exception:
        return failure, None
    return failure, cause


def _below_this_file(trace: TracebackType | None) -> TracebackType | None:
    """Without the frames of this file on top, which nobody who looks for a mistake in their function needs."""
    below = trace
    while below is not None and below.tb_frame.f_code.co_filename == __file__:
        below = below.tb_next
    return below or trace


def _listen(line: Connection, channel: "_Channel", thread: int) -> None:
    parent = os.getppid()
    while True:
        try:
            if line.poll(_CHECK_PARENT):
                line.recv_bytes()
                channel.send("where", _stack(thread))
        except (EOFError, OSError):
            _end_with_children()
        if os.getppid() != parent:
            _end_with_children()


def _stack(thread: int) -> str:
    frames = traceback.extract_stack(sys._current_frames()[thread])
    mine = [number for number, frame in enumerate(frames) if frame.filename == __file__]
    below = frames[mine[-1] + 1 :] if mine else frames
    return "".join(traceback.format_list((below or frames)[-_FRAMES:]))


class _Channel:
    """Whole messages from several threads, and from a destructor that prints while this very thread is sending."""

    def __init__(self, line: Connection) -> None:
        self._line = line
        self._lock = threading.Lock()
        self._waiting: deque[bytes] = deque()

    def send(self, *message: object) -> None:
        self._waiting.append(pickle.dumps(message))
        self._send_waiting()

    def flush(self) -> None:
        """Return when all is sent, also what another thread is sending."""
        with self._lock:
            pass
        self._send_waiting()

    def _send_waiting(self) -> None:
        # Whoever holds the lock sends for all; it looks again after letting go, so no message is left behind.
        while self._waiting and self._lock.acquire(blocking=False):
            try:
                while self._waiting:
                    self._line.send_bytes(self._waiting.popleft())
            except OSError:
                _end_with_children()  # nobody listens: the parent has ended
            finally:
                self._lock.release()


class _Printed(io.TextIOBase):
    """Sends what is printed to the parent, which prints it, line by line: into the notebook's cell that waits."""

    def __init__(self, channel: _Channel, name: str) -> None:
        super().__init__()
        self._channel, self._name, self._text = channel, name, ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._text += text
        lines, newline, self._text = self._text.rpartition("\n")
        if newline:
            self._channel.send("printed", self._name, lines + newline)
        return len(text)

    def flush(self) -> None:
        text, self._text = self._text, ""
        if text:
            self._channel.send("printed", self._name, text)
