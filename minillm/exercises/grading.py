"""``minillm exercises grade FOLDER``: a folder of submissions into a table of points.

Each submission is judged in a process of its own, in a temporary folder, with its time and memory bounded, the hidden
tests included and one fresh seed for all. A submission that crashes, loops or is no notebook gets a row that says so
and costs nobody else anything. The submissions themselves are only read.

Students' code runs here with the rights of whoever grades: limits keep accidents in, not malice. Grade strangers' code
in a container, or as a user who owns nothing.
"""

import csv
import io
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from minillm.course.notebooks import write_atomically
from minillm.exercises.assemble import assemble
from minillm.exercises.checking import Report, report_of
from minillm.exercises.folder import find_exercise, find_folder, load, sources
from minillm.exercises.format import Exercise
from minillm.exercises.run import judge_notebook, require_positive
from minillm.exercises.submission import names_of, read_cells, read_submission


@dataclass(frozen=True)
class Row:
    """One submission's line in the table."""

    student: str
    exercise: str
    file: str  # relative to the graded folder
    score: float
    max_score: float
    parts: dict[str, float]  # points by part number
    reason: str  # what cost points, by part; empty for full marks


@dataclass(frozen=True)
class Grades:
    """What was graded, and where the table is."""

    path: Path
    rows: tuple[Row, ...]
    seed: int


def grade(
    submissions: Path | str,
    *,
    output: Path | str,
    exercise: str | None = None,
    timeout: float = 120,
    memory_mb: int = 4096,
    jobs: int = 1,
    seed: int | None = None,
    folder: Path | str | None = None,
) -> Grades:
    """Grade every notebook under ``submissions`` and write the table to ``output`` (CSV, atomically).

    The student is the first folder of a notebook's path (``alice/02_tokenizers.ipynb``, as nbgrader collects them) or,
    for a notebook that lies in ``submissions`` itself, its name.

    Args:
        submissions: the folder.
        output: the CSV file.
        exercise: which exercise all of them answer; if None, told from each file's name or its cells.
        timeout: seconds a submission may take; each cell gets its share, so that a loop in one part leaves time for the
        others. memory_mb: memory of each of a submission's processes (bounded on Linux only).
        jobs: submissions judged at the same time.
        seed: the seed of all random inputs; a random one if None (the table says which).
        folder: the exercises folder; by default ``./exercises`` or the clone's own.

    Raises:
        ValueError: there is no such folder or exercise, no notebook in it, no folder for ``output``, or a limit is not
            positive. All of these before anything is judged.
    """
    root = Path(submissions)
    if not root.is_dir():
        raise ValueError(f"submissions: {root} is not a folder")
    require_positive(timeout=timeout, memory_mb=memory_mb, jobs=jobs)
    table = Path(output)
    if table.is_dir():
        raise ValueError(f"output: {table} is a folder, name the file")
    if not table.parent.is_dir():
        raise ValueError(f"output: there is no folder {table.parent} to write {table.name} to")
    place = find_folder(folder)
    known = [load(source) for source in sources(place)] if exercise is None else [find_exercise(exercise, place)]
    seed = random.SystemRandom().randrange(1, 100_000) if seed is None else seed

    stop = threading.Event()
    notebooks = _notebooks(root)
    if not notebooks:
        raise ValueError(f"submissions: there is no notebook (*.ipynb) below {root}")

    def row_of(path: Path) -> Row:
        return _grade_one(path, root, known, timeout=timeout, memory_mb=memory_mb, seed=seed, stop=stop)

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            rows = tuple(tqdm(pool.map(row_of, notebooks), total=len(notebooks), unit="notebook", disable=None))
        except BaseException:
            stop.set()  # Ctrl-C: what is being judged ends now, with its kernels
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return Grades(write_atomically(table, _table(rows, seed)), rows, seed)


def _notebooks(root: Path) -> list[Path]:
    return [
        p for p in sorted(root.rglob("*.ipynb")) if not any(part.startswith(".") for part in p.relative_to(root).parts)
    ]


def _grade_one(
    path: Path, root: Path, known: list[Exercise], *, timeout: float, memory_mb: int, seed: int, stop: threading.Event
) -> Row:
    relative = path.relative_to(root)
    exercise = None
    try:
        exercise = _exercise_of(path, known)
        notebook = assemble(exercise, read_submission(path, exercise), seed=seed, hidden=True)
        cell_timeout = max(1.0, timeout / (len(exercise.parts) + 1))
        run = judge_notebook(notebook, cell_timeout=cell_timeout, timeout=timeout, memory_mb=memory_mb, stop=stop)
        report = report_of(exercise, notebook, run, path=path, seed=seed)
    except Exception as error:  # whatever one submission does to the machine, the others are graded
        reason = (
            str(error) if isinstance(error, ValueError) else f"could not be judged: {type(error).__name__}: {error}"
        )
        maximum = sum(sum(part.points.values()) for part in exercise.parts) if exercise else 0.0
        name = exercise.name if exercise else ""
        return Row(_student(relative, name), name, str(relative), 0.0, maximum, {}, reason)
    return Row(
        student=_student(relative, exercise.name),
        exercise=exercise.name,
        file=str(relative),
        score=sum(part.points for part in report.parts),
        max_score=sum(part.max_points for part in report.parts),
        parts={part.number: part.points for part in report.parts},
        reason=_reason(report),
    )


def _reason(report: Report) -> str:
    said = [f"{p.number}: {p.message or p.status}" for p in report.parts if p.status != "passed"]
    return "; ".join([*said, *report.notes]) if said else ""


def _exercise_of(path: Path, known: list[Exercise]) -> Exercise:
    """The exercise asked for, else the one the file is named after, else the one whose answer cells it holds."""
    if len(known) == 1:
        return known[0]
    for exercise in known:
        if exercise.name in path.stem:
            return exercise
    ids = {name for cell in read_cells(path) for name in names_of(cell)}
    for exercise in known:
        if ids & {part.answer for part in exercise.parts}:
            return exercise
    raise ValueError(
        f"which exercise is this? neither its name nor its cells tell; known: {', '.join(e.name for e in known)}"
    )


def _student(relative: Path, exercise: str) -> str:
    if len(relative.parts) > 1:
        return relative.parts[0]
    return (re.sub(rf"[-_ ]*{re.escape(exercise)}[-_ ]*", "", relative.stem) if exercise else "") or relative.stem


def _table(rows: tuple[Row, ...], seed: int) -> bytes:
    numbers = sorted(
        {number for row in rows for number in row.parts}, key=lambda n: [int(digits) for digits in n.split(".")]
    )
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["student", "exercise", "file", "score", "max_score", *numbers, "reason", "seed"])
    for row in rows:
        points = (f"{row.parts[number]:g}" if number in row.parts else "" for number in numbers)
        cells = [
            row.student,
            row.exercise,
            row.file,
            f"{row.score:g}",
            f"{row.max_score:g}",
            *points,
            row.reason,
            str(seed),
        ]
        writer.writerow([_plain(cell) for cell in cells])
    return text.getvalue().encode(errors="backslashreplace")  # file names and messages need not be valid Unicode


def _plain(cell: str) -> str:
    """A student chooses file names and messages: a spreadsheet must not take them for formulas."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t")) else cell
