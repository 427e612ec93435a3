"""For chapters' authors: what every exercise is tested for, and a quick way to try answers.

Wrong answers run in this process, without a kernel: the pristine setup cells, the solutions of earlier parts, the
answer, its checks (hidden ones included). So dozens of them take a second.

>>> judge("02", "2.1", "def count_pairs(ids): return {}")    # the message a student would see, or None if it passes
"""

import contextlib
import io
import linecache
import re
import signal
import sys
import threading
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest
from nbformat import NotebookNode

from minillm.course.notebooks import notebook_bytes
from minillm.exercises import wording
from minillm.exercises.assemble import answer_status, assemble, solved
from minillm.exercises.building import generate
from minillm.exercises.checking import report_of
from minillm.exercises.folder import find_exercise
from minillm.exercises.format import Exercise, role, stub
from minillm.exercises.rules import surroundings
from minillm.exercises.run import judge_notebook
from minillm.exercises.submission import read_submission

_LONGEST_MESSAGE = 300
_SECONDS = 20


def judge(
    exercise: str | Exercise, part: str, answer: str, *, seed: int = 1, folder: Path | str | None = None
) -> str | None:
    """What a student hears who answers ``part`` with ``answer`` (the answer cell's whole source); None if it passes."""
    asked = find_exercise(exercise, folder) if isinstance(exercise, str) else exercise
    target = asked.part(part)
    unsolved = stub(next(cell.source for cell in asked.notebook.cells if cell.id == target.answer), target)
    submission = solved(asked)
    submission.answers[part] = answer
    status = answer_status(answer, unsolved, target, surroundings(asked, submission.answers.values()))
    if status != "written":
        return status
    notebook = assemble(asked, submission, seed=seed, hidden=True)
    with _Cells() as cells:
        for cell in notebook.cells:
            kind, number = cell.metadata.get("judge", {}).get("role"), cell.metadata.get("judge", {}).get("part")
            if kind in ("setup", "answer") or (kind == "check" and number == part):
                try:
                    printed = cells.run(cell)
                except (Exception, SystemExit) as error:
                    if kind != "setup" and number == part:
                        return wording.shorten(
                            wording.of_exception(type(error).__name__, str(error), defines=target.defines)
                        )
                    raise
                expected = "".join(output.text for output in cell.outputs if output.output_type == "stream")
                difference = wording.of_difference(printed, expected) if kind == "check" else None
                if difference is not None:
                    return wording.shorten(difference)
            if kind == "check" and cell.id == target.checks[-1]:
                return None
    raise AssertionError(f"part {part} has no check")  # pragma: no cover - load() refuses such a source


class _Cells:
    """A namespace that cells run in, like a kernel's: a module of its own, whose sources ``inspect`` can find."""

    def __init__(self) -> None:
        self.module = types.ModuleType("__exercise__")

    def __enter__(self) -> "_Cells":
        sys.modules[self.module.__name__] = self.module
        return self

    def __exit__(self, *_: object) -> None:
        del sys.modules[self.module.__name__]

    def run_all(self, notebook: list[NotebookNode]) -> None:
        for cell in notebook:
            if cell.cell_type == "code":
                self.run(cell)

    def run(self, cell: NotebookNode) -> str:
        """Run the cell and return what it printed."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out), _deadline(_SECONDS):
            exec(_compiled(cell), self.module.__dict__)
        return out.getvalue()


def _compiled(cell: NotebookNode) -> types.CodeType:
    """The cell's code; ``inspect`` finds its source, from which Triton builds a kernel."""
    name = f"<{cell.id}>"
    linecache.cache[name] = (len(cell.source), None, cell.source.splitlines(keepends=True), name)
    return compile(cell.source, name, "exec", dont_inherit=True)


def solution_names(exercise: str, *, folder: Path | str | None = None) -> dict[str, object]:
    """The names that the setup and answer cells of the solution define, to be held against other libraries."""
    names: dict[str, object] = {}
    for cell in find_exercise(exercise, folder).notebook.cells:
        if cell.cell_type == "code" and role(cell) != "check":
            exec(_compiled(cell), names)
    return names


@contextlib.contextmanager
def _deadline(seconds: int) -> Iterator[None]:
    """``TimeoutError`` in a wrong answer that never ends; where signals reach it (main thread, no Windows)."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class ExerciseTests:
    """Inherit, name the exercise and give the wrong answers; pytest finds the rest here.

    Attributes:
        exercise: "02", "02_tokenizers".
        wrong_answers: part -> what is wrong -> (the answer cell's whole source, words that the message must hold); at
            least three a part.
        right_answers: what is different -> (part, the answer cell's whole source): answers that must pass.
        folder: the exercises folder; by default ``./exercises`` or the clone's own.
    """

    exercise: ClassVar[str]
    wrong_answers: ClassVar[Mapping[str, Mapping[str, tuple[str, str]]]]
    right_answers: ClassVar[Mapping[str, tuple[str, str]]] = {}
    folder: ClassVar[Path | str | None] = None

    def test_generated_notebook_is_committed(self) -> None:
        exercise = find_exercise(self.exercise, self.folder)
        committed = exercise.student_path.read_bytes()
        assert committed == notebook_bytes(generate(exercise)), f"run: minillm exercises build {exercise.name[:2]}"

    def test_solution_passes_with_another_seed(self) -> None:
        exercise = find_exercise(self.exercise, self.folder)
        notebook = assemble(exercise, solved(exercise), seed=4321, hidden=True)
        run = judge_notebook(notebook, cell_timeout=180, timeout=600)
        report = report_of(exercise, notebook, run, path=exercise.source, seed=4321)
        assert report.passed, report.render()

    def test_untouched_notebook_says_what_to_do(self) -> None:
        exercise = find_exercise(self.exercise, self.folder)
        notebook = assemble(exercise, read_submission(exercise.student_path, exercise))
        answers = [cell for cell in notebook.cells if role(cell) == "answer"]
        statuses = [cell.metadata["judge"]["status"] for cell in answers]
        assert statuses == ["not started"] * len(exercise.parts), f"an untouched notebook has answers: {statuses}"
        # A student who runs the first cells by hand meets the exception that names the exercise.
        first = exercise.parts[0]
        until = [cell.id for cell in exercise.notebook.cells].index(first.checks[-1]) + 1
        with _Cells() as cells, pytest.raises(NotImplementedError) as raised:
            cells.run_all(generate(exercise).cells[:until])
        assert str(raised.value) == f"Exercise {first.number}: {first.task}", f"a student reads: {raised.value}"

    def test_titles_and_minutes_are_those_that_the_machine_shows(self) -> None:
        exercise = find_exercise(self.exercise, self.folder)
        text = "\n".join(cell.source for cell in exercise.notebook.cells if cell.cell_type == "markdown")
        headings = re.findall(r"(?m)^## (\d+\.\d+) (.*) \((\d+) minutes\)$", text)
        assert headings == [(part.number, part.title, str(part.minutes)) for part in exercise.parts]
        # The table of an introduction: "| 30: 10 + 20 |" and the sum of its rows, in words below.
        rows = re.findall(r"(?m)\| (\d+)(?:: ([\d +]+))? \|$", text)
        added = [sum(map(int, (terms or total).split("+"))) for total, terms in rows]
        assert added == [int(total) for total, _ in rows]
        if rows:
            hours, minutes = divmod(sum(added), 60)
            assert sum(added) == sum(part.minutes for part in exercise.parts)
            assert f"about {hours} hours and {minutes} minutes" in text

    def test_right_answers_of_other_kinds_pass(self) -> None:
        exercise = find_exercise(self.exercise, self.folder)
        messages = {what: judge(exercise, part, answer) for what, (part, answer) in self.right_answers.items()}
        rejected = [f"{what}: {message}" for what, message in messages.items() if message is not None]
        assert not rejected, "\n".join(rejected)

    def test_each_part_has_three_wrong_answers(self) -> None:
        parts = {part.number for part in find_exercise(self.exercise, self.folder).parts}
        assert set(self.wrong_answers) == parts, (
            f"wrong answers for {sorted(self.wrong_answers)}, parts {sorted(parts)}"
        )
        few = {number: len(wrong) for number, wrong in self.wrong_answers.items() if len(wrong) < 3}
        assert not few, f"parts with fewer than three wrong answers: {few}"

    def test_wrong_answers_are_rejected_with_the_likely_mistake(self) -> None:
        exercise = find_exercise(self.exercise, self.folder)
        problems = []
        for part, wrong in self.wrong_answers.items():
            for what, (answer, words) in wrong.items():
                message = judge(exercise, part, answer)
                if message is None:
                    problems.append(f"{part}, {what}: passes")
                elif not words or words not in message:
                    problems.append(f"{part}, {what}: the message is {message!r}, without {words!r}")
                elif len(message) > _LONGEST_MESSAGE:
                    problems.append(f"{part}, {what}: {len(message)} characters read as a dump: {message}")
        assert not problems, "\n".join(problems)
