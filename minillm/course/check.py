"""Execute notebooks afresh and say how long each took: what an instructor runs before the term begins."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from minillm.course.notebooks import execute, read_notebook


def check_notebooks(paths: Sequence[Path], *, timeout: int = 600, report: Callable[[str], object] = print) -> bool:
    """Run each notebook in a fresh kernel, in its own folder, and report one line a notebook; nothing is written.

    A line holds the wall time in seconds (the kernel's start included) and the number of code cells, or in one line
    what went wrong. ``timeout`` is in seconds a cell. True when every notebook ran to its end.
    """
    # Imported here because nbclient takes half a second, and `minillm.course` is imported for its small parts too.
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    failed = 0
    began = time.perf_counter()
    for path in paths:
        started = time.perf_counter()
        try:
            notebook = execute(read_notebook(path), folder=path.parent, timeout=timeout)
            verdict = f"{sum(cell.cell_type == 'code' for cell in notebook.cells)} code cells"
        except CellExecutionError as error:
            verdict = f"FAILED: {error.ename}: {error.evalue.partition(chr(10))[0]}"
        except CellTimeoutError:
            verdict = f"FAILED: a cell takes longer than {timeout} s"
        except DeadKernelError:
            verdict = "FAILED: the kernel died"
        except ValueError as error:
            verdict = f"FAILED: {error}"
        failed += verdict.startswith("FAILED")
        report(f"{time.perf_counter() - started:7.1f} s  {path}  {verdict}")
    report(f"{time.perf_counter() - began:7.1f} s  {len(paths)} notebooks, {failed} failed")
    return failed == 0
