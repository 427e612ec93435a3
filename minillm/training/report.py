"""What a run tells of itself: lines of metrics, in memory and in a file of JSON lines, and a progress bar."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minillm.training.integrity import fsync
from minillm.training.metrics import StepStatistics


class Report:
    """The lines of metrics of a run. `tokens` and `seconds` count what all updates so far took.

    Args:
        progress: show a bar on the standard error.
    """

    def __init__(self, *, progress: bool = False) -> None:
        self.lines: list[dict[str, Any]] = []
        self.tokens, self.seconds = 0, 0.0
        self._path: Path | None = None
        self._progress = progress
        self._shown: dict[str, str] = {}
        self._bar: tqdm[Any] | None = None
        self.restart_clock()

    def open(self, path: Path, step: int) -> None:
        """Write to this file from now on, and take up the lines that an earlier sitting left in it.

        Lines after `step`, where the run goes on from, are dropped: they were written after the checkpoint and will be
        written again. So is a last line that was cut short.
        """
        self._path, self.lines = path, []
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        self.lines = [line for line in map(_parse, text.splitlines()) if line is not None and line["step"] <= step]
        kept = "".join(map(_format, self.lines))
        if kept != text:
            temporary = path.with_name(f".writing-{path.name}")
            temporary.write_text(kept, encoding="utf-8")
            fsync(temporary)
            os.replace(temporary, path)

    def bar(self, step: int, total: int) -> tqdm[Any]:
        """The progress bar, to be entered as a context."""
        self._bar = tqdm(total=total, initial=step, unit="step", disable=not self._progress, mininterval=0.5)
        self.restart_clock()
        return self._bar

    def advance(self) -> None:
        """One more step is made."""
        assert self._bar is not None
        self._bar.update()

    def restart_clock(self) -> None:
        """Leave out of `seconds` what passed since the last measurement: evaluation, writing."""
        self._clock = time.perf_counter()

    def measure(self, step: int, statistics: StepStatistics, *, learning_rate: float) -> dict[str, Any]:
        """A line about the steps since the last one; raises NonFiniteError if one of them went bad."""
        loss, grad_norm, n_targets = statistics.read()
        seconds = time.perf_counter() - self._clock
        self.tokens += n_targets
        self.seconds += seconds
        return {
            "step": step,
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens": self.tokens,
            "tokens_per_second": n_targets / seconds,
            "seconds": self.seconds,
        }

    def append(self, line: dict[str, Any]) -> None:
        """Add a line to the list, the file and the bar."""
        self.lines.append(line)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_format(line))
        self._shown |= {"loss": f"{line['loss']:.3f}", "tokens/s": f"{line['tokens_per_second']:,.0f}"}
        if "validation_loss" in line:
            self._shown["validation"] = f"{line['validation_loss']:.3f}"
        assert self._bar is not None
        self._bar.set_postfix(self._shown, refresh=False)

    def sync(self) -> None:
        """Force the file to the disk, before a checkpoint that stands for its lines."""
        if self._path is not None:
            fsync(self._path)


def _format(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def _parse(text: str) -> dict[str, Any] | None:
    """The line's object; None for a line that was cut short."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
