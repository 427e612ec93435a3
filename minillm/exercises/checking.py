"""``minillm exercises check 02``: how far a student's notebook has come, a line a part."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nbformat import NotebookNode
from tqdm import tqdm

from minillm.exercises.assemble import assemble
from minillm.exercises.folder import find_folder, find_source, load
from minillm.exercises.format import Exercise, Part
from minillm.exercises.run import Run, judge_notebook, require_positive
from minillm.exercises.submission import read_submission
from minillm.exercises.wording import is_slip

Status = Literal["passed", "not started", "failed", "not judged"]


@dataclass(frozen=True)
class PartReport:
    """The outcome of one part."""

    number: str
    title: str
    status: Status
    message: str  # what the mistake looks like; empty when passed, and mostly when not started
    hint: str  # the first hint, and how to see the next; empty when passed or when no idea is missing
    points: float
    max_points: float


@dataclass(frozen=True)
class Report:
    """What ``check`` found."""

    exercise: str
    title: str
    path: Path
    seed: int
    parts: tuple[PartReport, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return all(part.status == "passed" for part in self.parts)

    def render(self) -> str:
        """The text for a terminal: a line a part, hints under those that failed or come next, notes at the end."""
        digits = max(len(part.number) for part in self.parts)
        width = max(digits + 2 + len(part.title) for part in self.parts)
        lines = [f"{self.exercise}: {self.title}"]
        first_open = next((part for part in self.parts if part.status != "passed"), None)
        for part in self.parts:
            heading = f"{part.number:{digits}}  {part.title}".ljust(width)
            said = f": {part.message}" if part.message else ""
            word = "not yet" if part.status == "failed" else part.status
            lines.append(f"  {heading}  {word}{said}")
            if part.hint and (part.status == "failed" or part is first_open):
                lines.append(f"  {' ' * width}  {part.hint}")
        lines += [f"  note: {note}" for note in self.notes if not self.passed]
        done = sum(part.status == "passed" for part in self.parts)
        lines.append(f"{done} of {len(self.parts)} parts passed (seed {self.seed}).")
        return "\n".join(lines)


def check(exercise: str, *, seed: int | None = None, timeout: float = 30, folder: Path | str | None = None) -> Report:
    """Judge a student's notebook by the original checks, with fresh random inputs.

    Args:
        exercise: "02", "02_tokenizers", or the path of a notebook that lies anywhere.
        seed: the inputs' seed; a random one if None (the report says which).
        timeout: seconds a cell may run.
        folder: the exercises folder; by default ``./exercises`` or the clone's own.

    Raises:
        ValueError: there is no such exercise or notebook, the file is not a notebook, or the timeout is not positive.
    """
    require_positive(timeout=timeout)
    source = find_source(exercise, find_folder(folder))
    task = load(source)
    path = Path(exercise) if exercise.endswith(".ipynb") else task.student_path
    seed = random.SystemRandom().randrange(1, 100_000) if seed is None else seed
    notebook = assemble(task, read_submission(path, task), seed=seed)
    code_cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    with tqdm(bar_format="checking {desc} ... {elapsed}", leave=False, disable=None) as line:
        run = judge_notebook(
            notebook, cell_timeout=timeout, timeout=timeout * (code_cells + 1), progress=line.set_description_str
        )
    return report_of(task, notebook, run, path=path, seed=seed)


def report_of(exercise: Exercise, notebook: NotebookNode, run: Run, *, path: Path, seed: int) -> Report:
    """The judged cells, gathered by part."""
    parts = tuple(_part_report(part, run) for part in exercise.parts)
    broken = [f"{cell['cell']}: {cell['message']}" for cell in run.cells if cell["role"] == "setup" and cell["message"]]
    notes = [*notebook.metadata["minillm"]["notes"], *run.notes, *broken, *([run.trouble] if run.trouble else [])]
    return Report(exercise.name, exercise.title, path, seed, parts, tuple(notes))


def _part_report(part: Part, run: Run) -> PartReport:
    cells = {cell["cell"]: cell for cell in run.cells if cell["part"] == part.number}
    judged = [cells[name] for name in (part.answer, *part.checks) if name in cells]
    points = sum(part.points[name] for name in part.checks if cells.get(name, {}).get("outcome") == "passed")
    message = next((cell["message"] for cell in judged if cell["outcome"] == "failed"), "")
    status: Status = "failed"
    if message.startswith("not started"):
        status, message = "not started", message.removeprefix("not started").removeprefix(": ")
    elif not message:
        complete = len(judged) == 1 + len(part.checks) and all(cell["outcome"] == "passed" for cell in judged)
        status, message = ("passed", "") if complete else ("not judged", run.trouble)
    hint = "" if status == "passed" else f"hint: minillm exercises hint {part.number}"
    if status == "failed" and is_slip(message):
        hint = ""  # the first hint is about the idea, which may well be right
    elif status == "failed":
        hint = f"hint: {part.hints[0]} (more: minillm exercises hint {part.number} --level 2)"
    return PartReport(part.number, part.title, status, message, hint, points, sum(part.points.values()))
