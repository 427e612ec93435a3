"""The kernel in which a notebook is judged: it notices at once when the answer kills it or floods it with output.

nbval's own kernel waits for the whole cell timeout when the process behind it is gone (2000 s by default), and keeps
all output in memory, however much there is.
"""

import time
from collections import deque
from pathlib import Path
from queue import Empty
from typing import Any

from nbval.kernel import CURRENT_ENV_KERNEL_NAME, RunningKernel

OUTPUT_LIMIT = 1_000_000
"""Characters a cell may print. Ten screens of honest debugging are a hundredth of this."""


class CellStoppedError(Exception):
    """The cell ended its kernel, or had it stopped; the message is a sentence for the student."""


class WatchedKernel(RunningKernel):  # type: ignore[misc]  # nbval is not typed
    """A kernel of this very Python. Messages are read while the cell runs, so that their amount can be bounded."""

    def __init__(self, folder: Path, startup_timeout: float = 60) -> None:
        self._held: deque[dict[str, Any]] = deque()
        self._printed = 0
        super().__init__(CURRENT_ENV_KERNEL_NAME, cwd=str(folder), startup_timeout=startup_timeout)

    @property
    def pid(self) -> int:
        return int(self.km.provisioner.pid)

    def execute_cell_input(self, cell_input: str, allow_stdin: bool | None = None) -> str:
        self._printed = 0
        return str(super().execute_cell_input(cell_input, allow_stdin=allow_stdin))

    def await_reply(self, msg_id: str, timeout: float | None = None) -> None:
        """As nbval's (``queue.Empty`` after ``timeout`` s), but ``CellStoppedError`` if the kernel dies or floods."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                # Short waits, so that iopub is drained and the process looked at while the cell runs.
                super().await_reply(msg_id, timeout=0.1)
                return
            except Empty:
                pass
            self._drain()
            if not self.is_alive():
                raise CellStoppedError("ended the Python process: a crash, too much memory, or os._exit?") from None
            if deadline is not None and time.monotonic() > deadline:
                raise Empty

    def get_message(self, stream: str, timeout: float | None = None) -> dict[str, Any]:
        if stream == "iopub" and self._held:
            return self._held.popleft()
        # nbval's own formats each message for its log, whether or not anybody reads it: minutes for a flood.
        receive = self.kc.get_iopub_msg if stream == "iopub" else self.kc.get_shell_msg
        message: dict[str, Any] = receive(timeout=timeout)
        if stream == "iopub":
            self._count(message)
        return message

    def _drain(self) -> None:
        while True:
            try:
                message = self.kc.get_iopub_msg(timeout=0)
            except Empty:
                return
            self._count(message)
            self._held.append(message)

    def _count(self, message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            self._printed += len(message["content"]["text"])
        if self._printed > OUTPUT_LIMIT:
            self.stop()
            raise CellStoppedError(
                f"printed more than {OUTPUT_LIMIT:,} characters: is there a print in an endless loop?"
            )

    def run_quietly(self, source: str, timeout: float) -> None:
        """Run ``source`` for its effect on the namespace; what it prints or raises is nobody's business here."""
        message_id = self.execute_cell_input(source, allow_stdin=False)
        try:
            self.await_reply(message_id, timeout=timeout)
            self.await_idle(message_id, 5)
        except Empty:
            self.stop()
            raise CellStoppedError(f"did not end in {timeout:g} s") from None

    def stop(self) -> None:
        """Stop it for good; harmless when it has stopped before."""
        self._held.clear()
        if hasattr(self, "km"):
            super().stop()
