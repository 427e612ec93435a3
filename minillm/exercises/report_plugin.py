"""The pytest plugin of the process in which ``minillm exercises check`` and ``grade`` have a notebook judged.

Loaded with ``-p``. It collects assembled notebooks, bounds the memory of this process and its kernels, and writes what
happens as JSON lines while it happens: if this process has to be killed, what was judged before is known, and so are
the kernels (jupyter_client gives each a session of its own, which killing this process does not reach).
"""

import json
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any

import pytest

from minillm.exercises.judge import JudgedCell, JudgedFile

_LINES = pytest.StashKey[IO[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("exercises")
    group.addoption("--exercise-report", type=Path, required=True, help="JSON lines are written here")
    group.addoption("--exercise-memory-mb", type=int, default=None, help="memory of this process and of each kernel")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LINES] = config.getoption("--exercise-report").open("a", encoding="utf-8")
    memory_mb = config.getoption("--exercise-memory-mb")
    if memory_mb is not None:
        _limit(memory_mb)


def _limit(memory_mb: int) -> None:
    """Memory, core files and the size of any file written; kernels inherit this. Windows has no such limits.

    RLIMIT_DATA and not RLIMIT_AS: libraries and CUDA reserve address space by the gigabyte that they never touch.
    """
    try:
        import resource
    except ImportError:
        return
    wanted = {
        resource.RLIMIT_DATA: memory_mb * 2**20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 2**30,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):
            continue  # a system that knows the limit but refuses to set it


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_LINES].close()


def _write(config: pytest.Config, line: dict[str, Any]) -> None:
    config.stash[_LINES].write(json.dumps(line) + "\n")
    config.stash[_LINES].flush()


class ReportedFile(JudgedFile):
    def start_kernel(self) -> None:
        super().start_kernel()
        _write(self.config, {"kernel": self.kernel.pid})


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(
    file_path: Path, parent: pytest.Collector
) -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    yield  # nbval's own collector, which this one replaces
    return [ReportedFile.from_parent(parent, path=file_path)] if file_path.suffix == ".ipynb" else []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if isinstance(item, JudgedCell) and (report.when == "call" or report.failed):
        message = "" if report.passed or call.excinfo is None else str(call.excinfo.value)
        line = {
            "cell": item.cell.id,
            "role": item.role,
            "part": item.part,
            "outcome": report.outcome,
            "message": message,
        }
        _write(item.config, line | {"notes": list(getattr(item.parent, "notes", []))})
    return report
