"""Has an assembled notebook judged in a process of its own, and leaves nothing behind: no process, no file."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from minillm.course.notebooks import write_notebook

_START_UP = 90.0
"""Seconds granted for Python, pytest and a kernel to start on a loaded machine."""


@dataclass
class Run:
    """What the judging process reported."""

    cells: list[dict[str, Any]] = field(default_factory=list)  # cell, role, part, outcome, message
    notes: list[str] = field(default_factory=list)  # about the student's own cells
    trouble: str = ""  # why there is nothing more: killed after so many seconds, or it could not start


def require_positive(**limits: float) -> None:
    """``ValueError`` naming the first limit that is not a finite number above 0."""
    for name, value in limits.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive (and finite), not {value}")


def judge_notebook(
    notebook: NotebookNode,
    *,
    cell_timeout: float,
    timeout: float,
    memory_mb: int | None = None,
    stop: threading.Event | None = None,
    progress: Callable[[str], object] | None = None,
) -> Run:
    """Judge ``notebook`` (from :func:`minillm.exercises.assemble.assemble`) in a temporary folder.

    Args:
        notebook: the assembled notebook.
        cell_timeout: seconds a cell may run.
        timeout: seconds the whole may take beside start-up; after that the process and its kernels are killed.
        memory_mb: memory for each process, where the system can bound it (Linux).
        stop: set from another thread, it ends the judging at once.
        progress: called again and again with the number of the part that is being judged.
    """
    with tempfile.TemporaryDirectory(prefix="minillm-exercise-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_notebook(notebook, folder / "exercise.ipynb")
        (folder / "pytest.ini").write_text("[pytest]\n")
        report = folder / "report.jsonl"
        roles = [cell.metadata["judge"] for cell in notebook.cells if cell.cell_type == "code"]

        def look() -> None:
            coming = roles[sum("cell" in line for line in _lines(report)) :]
            if progress is not None and coming:
                progress(next((role["part"] for role in coming if "part" in role), ""))

        command = [sys.executable, "-m", "pytest", "exercise.ipynb", "--nbval", "-q", "--color=no", "--tb=line"]
        command += ["-c", "pytest.ini", "--rootdir", ".", "-p", "no:cacheprovider", "-p", "nbval.plugin"]
        command += ["-p", "minillm.exercises.report_plugin", f"--exercise-report={report}"]
        command += ["--nbval-current-env", f"--nbval-cell-timeout={cell_timeout}"]
        if memory_mb is not None:
            command.append(f"--exercise-memory-mb={memory_mb}")
        # The student's shell may hold pytest options meant for something else, and plugins cost a second to load.
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "COV_"))}
        environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "JUPYTER_RUNTIME_DIR": str(folder / "runtime")}
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                trouble = _wait(process, timeout + _START_UP, stop, look)
            finally:
                _kill_group(process.pid)
                process.wait()
                lines = list(_lines(report))
                for line in lines:
                    if "kernel" in line:
                        _kill_group(line["kernel"])  # with whatever the answer started and left running
        run = Run([line for line in lines if "cell" in line], trouble=trouble)
        if run.cells:
            run.notes = run.cells[-1]["notes"]
        if not run.cells and not trouble:
            run.trouble = "could not be judged: " + (folder / "log").read_text(errors="replace").strip()[-600:]
        return run


def _wait(
    process: subprocess.Popen[bytes], seconds: float, stop: threading.Event | None, look: Callable[[], None]
) -> str:
    """Wait for the end, with a ``look`` now and then, and say why it did not come, if it did not."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            process.wait(timeout=0.2)
            return ""
        except subprocess.TimeoutExpired:
            look()
            if stop is not None and stop.is_set():
                return "interrupted"
            if time.monotonic() > deadline:
                return f"stopped after {seconds:.0f} s"


def _lines(report: Path) -> Iterator[dict[str, Any]]:
    if report.exists():
        for line in report.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed process may be cut
                yield json.loads(line)


def _kill_group(leader: int) -> None:
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)
    else:
        with contextlib.suppress(OSError):
            os.kill(leader, signal.SIGTERM)
