"""Metrics of a run: one JSON object a line, and the numbers of a step gathered without waiting for the device."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.training.integrity import fsync


class NonFiniteError(RuntimeError):
    """The loss or the norm of the gradient became NaN or infinite. `step` is the update at which it did."""

    def __init__(self, step: int, loss: float, grad_norm: float, checkpoint: Path | None = None) -> None:
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint before it"
        super().__init__(f"training stopped at step {step}: loss {loss}, norm of the gradient {grad_norm}; {kept}")
        self.step, self.loss, self.grad_norm, self.checkpoint = step, loss, grad_norm, checkpoint


class MetricsLog:
    """A file of JSON lines that a killed process can go on with.

    Args:
        path: the file, or None to keep the lines in memory only.
        step: the step that the run goes on from. Lines of later steps (they were written after the checkpoint and will
            be written again) and a half-written last line are dropped.
    """

    def __init__(self, path: Path | None, step: int = 0) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if path is None or not path.exists():
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        self.lines = [line for line in map(_parse, text.splitlines()) if line is not None and line["step"] <= step]
        kept = "".join(map(_format, self.lines))
        if kept != text:
            temporary = path.with_name(f".writing-{path.name}")
            temporary.write_text(kept, encoding="utf-8")
            fsync(temporary)
            os.replace(temporary, path)

    def append(self, line: dict[str, Any]) -> None:
        """Add a line (a JSON-able object with an integer "step") to the list and to the file."""
        self.lines.append(line)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_format(line))

    def sync(self) -> None:
        """Force the file to the disk, as before a checkpoint that stands for its lines."""
        if self.path is not None and self.path.exists():
            fsync(self.path)


class StepStatistics:
    """The losses since the last reading, and the first step that went bad, kept on the device.

    Reading a number from a GPU waits until the GPU has caught up; so the numbers are gathered there, and read together
    when a line of metrics is written.
    """

    def __init__(self, device: torch.device) -> None:
        self._bad = torch.zeros(3, device=device)  # step (0: none), loss, norm of the gradient
        self._grad_norm = torch.zeros((), device=device)
        self._sum = torch.zeros((), device=device)
        self._n_targets = 0

    def add(self, step: int, loss: Tensor, grad_norm: Tensor, n_targets: int) -> None:
        """Take in a step: its mean loss, the norm of its gradient before clipping, and its number of targets."""
        numbers = torch.stack([torch.full_like(loss, step), loss, grad_norm])
        bad_now = (self._bad[0] == 0) & ~numbers.isfinite().all()
        self._bad = torch.where(bad_now, numbers, self._bad)
        self._grad_norm = grad_norm
        self._sum = self._sum + loss * n_targets
        self._n_targets += n_targets

    def check(self) -> None:
        """Wait for the device; raise NonFiniteError if a step's loss or gradient was not finite."""
        step, loss, grad_norm = self._bad.tolist()
        if step:
            raise NonFiniteError(int(step), loss, grad_norm)

    def read(self) -> tuple[float, float, int]:
        """(mean loss per target, last gradient norm, number of targets) since the last reading, which starts anew."""
        self.check()
        total, grad_norm = torch.stack([self._sum, self._grad_norm]).tolist()
        n_targets = self._n_targets
        self._sum, self._n_targets = torch.zeros_like(self._sum), 0
        return total / n_targets, grad_norm, n_targets


def _format(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def _parse(text: str) -> dict[str, Any] | None:
    """The line's object; None for a line that was cut short."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
