"""nbval as the judge of an exercise: what pytest collects and how each part's outcome is told in one line.

Where plain nbval runs cells one after the other and reports tracebacks, here

- an answer's outputs are not compared; a check's printed lines must appear in order (a student's own prints between
  them do no harm);
- a part that fails is followed by the source's solution of that part, so that later parts are judged on their own;
- a kernel that dies, hangs or floods is replaced, and what came before is run again in the new one.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from nbformat import NotebookNode
from nbval.plugin import IPyNbCell, IPyNbFile, NbCellError, find_comment_markers, find_metadata_tags

from minillm.course.notebooks import read_notebook
from minillm.exercises import wording
from minillm.exercises.assemble import assemble
from minillm.exercises.folder import load
from minillm.exercises.kernel import CellStoppedError, WatchedKernel
from minillm.exercises.submission import first_line, read_submission


class NotYetError(Exception):
    """A part is not solved; the message is all that the student needs to see."""


class JudgedFile(IPyNbFile):  # type: ignore[misc]  # nbval is not typed
    """An assembled notebook (see :mod:`minillm.exercises.assemble`) as a pytest file."""

    def notebook(self) -> NotebookNode:
        return read_notebook(self.path)

    def collect(self) -> Iterator["JudgedCell"]:
        try:
            self.nb = self.notebook()
        except ValueError as error:
            raise self.CollectError(str(error)) from None
        cells = [cell for cell in self.nb.cells if cell.cell_type == "code"]
        checks = [cell.metadata["judge"].get("part") for cell in cells if cell.metadata["judge"]["role"] == "check"]
        for number, cell in enumerate(cells):
            judge = cell.metadata["judge"]
            name = f"{judge['role']} {cell.id}"
            if "part" in judge:
                name = f"{judge['part']} {judge['role']}"
                if judge["role"] == "check" and checks.count(judge["part"]) > 1:
                    name = f"{judge['part']} {cell.id}"
            options = defaultdict(bool, find_metadata_tags(cell.metadata))
            options.update(dict(find_comment_markers(cell.source)))
            options["check"] = judge["role"] == "check" and options.get("check", True)
            yield JudgedCell.from_parent(self, name=name, cell_num=number, cell=cell, options=options)

    def setup(self) -> None:
        self.history: dict[int, str] = {}  # what made the namespace, by cell number: a new kernel gets the same
        self.failed: dict[str, str] = {}  # part -> its first message
        self.abandoned: set[str] = set()  # parts whose remaining checks would only hang or die again
        self.replaced: set[str] = set()  # failed parts whose solution stands in by now
        self.notes: list[str] = []
        self.start_kernel()
        self.setup_sanitize_files()

    def start_kernel(self) -> None:
        self.kernel = WatchedKernel(self.path.parent, self.config.option.nbval_kernel_startup_timeout)

    def teardown(self) -> None:
        if self.kernel is not None:
            self.kernel.stop()

    def prepare(self, part: str | None) -> None:
        """Before a cell of ``part`` runs: see that other parts that failed are solved, and that there is a kernel."""
        timeout = self.config.option.nbval_cell_timeout
        for cell in self.nb.cells:
            judge = cell.metadata.get("judge", {})
            number = judge.get("part")
            if (
                judge.get("role") == "answer"
                and number in self.failed
                and number != part
                and number not in self.replaced
            ):
                self.replaced.add(number)
                self.history[self.number_of(cell)] = judge["solution"]
                if self.kernel.is_alive():
                    self.kernel.run_quietly(judge["solution"], timeout)
        if not self.kernel.is_alive():
            self.kernel.stop()
            self.start_kernel()
            for _, source in sorted(self.history.items()):
                self.kernel.run_quietly(source, timeout)

    def number_of(self, cell: NotebookNode) -> int:
        return next(n for n, c in enumerate(c for c in self.nb.cells if c.cell_type == "code") if c is cell)

    def answer_to(self, part: str | None) -> NotebookNode | None:
        judges = ((cell, cell.metadata.get("judge", {})) for cell in self.nb.cells)
        return next((cell for cell, j in judges if j.get("role") == "answer" and j.get("part") == part), None)


class ExerciseFile(JudgedFile):
    """A student's notebook under ``exercises/``: judged as the pristine cells with the student's answers in them."""

    def notebook(self) -> NotebookNode:
        exercise = load(self.path.parent / "solutions" / self.path.name)
        return assemble(exercise, read_submission(self.path, exercise))


class JudgedCell(IPyNbCell):  # type: ignore[misc]  # nbval is not typed
    """One code cell of a judged notebook."""

    def __init__(
        self, name: str, parent: JudgedFile, cell_num: int, cell: NotebookNode, options: dict[str, Any]
    ) -> None:
        super().__init__(name, parent, cell_num, cell, options)
        self.role: str = cell.metadata["judge"]["role"]
        self.part: str | None = cell.metadata["judge"].get("part")
        self.user_properties += [("role", self.role), ("part", self.part), ("cell", cell.id)]

    def setup(self) -> None:
        """nbval would expect every cell after a timeout to fail; here each part stands on its own."""

    def runtest(self) -> None:
        file: JudgedFile = self.parent
        if self.part in file.abandoned:
            pytest.skip(f"{self.part} has failed before")
        status = self.cell.metadata["judge"].get("status", "written")
        if status != "written":
            self.fail(status, abandon=True)
        file.timed_out = False
        self.test_outputs: list[NotebookNode] = []
        try:
            file.prepare(self.part)
            super().runtest()
        except (NbCellError, CellStoppedError) as error:
            message = self.explain(error)
            if self.role == "extra":
                file.notes.append(f"your own cell {first_line(self.cell.source)!r}: {message}")
                return
            stopped = file.timed_out or isinstance(error, CellStoppedError) or self.role == "answer"
            self.fail(message, abandon=stopped)
        if self.role != "check":
            file.history[self.cell_num] = self.cell.source

    def fail(self, message: str, *, abandon: bool) -> None:
        file: JudgedFile = self.parent
        if self.part is not None:
            file.failed.setdefault(self.part, message)
            if abandon:
                file.abandoned.add(self.part)
        raise NotYetError(wording.shorten(message)) from None

    def explain(self, error: Exception) -> str:
        """What happened, in one sentence for the student."""
        if isinstance(error, CellStoppedError):
            return str(error)
        raised = next((output for output in self.test_outputs or [] if output.output_type == "error"), None)
        answer = self.parent.answer_to(self.part)
        place = ""
        if raised is not None and answer is not None:
            place = wording.place_in(answer.source, "\n".join(raised.traceback))
        # Whatever came after the time was up, an error, other output or nothing at all, came of the interrupt.
        if self.parent.timed_out:
            seconds = self.config.option.nbval_cell_timeout
            return f"still running after {seconds:g} s{place}: does a loop never end, or does it try every possibility?"
        if raised is None:
            return "; ".join(self.comparison_traceback)
        defines = [] if answer is None else answer.metadata["judge"]["defines"]
        return wording.of_exception(str(raised.ename), str(raised.evalue), defines=defines, place=place)

    def compare_outputs(self, test: list[NotebookNode], ref: list[NotebookNode], skip_compare: object = None) -> bool:
        difference = wording.of_difference(_stdout(test), _stdout(ref))
        self.comparison_traceback = [] if difference is None else [difference]
        return difference is None

    def reportinfo(self) -> tuple[Any, int, str]:
        return self.path, 0, f"{self.path.name}: {self.name}"

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> Any:
        if isinstance(excinfo.value, NotYetError):
            answer = self.parent.answer_to(self.part)
            title = self.name if answer is None else f"{self.part} {answer.metadata['minillm']['title']}"
            return f"{title}: {excinfo.value}"
        return super().repr_failure(excinfo)


def _stdout(outputs: list[NotebookNode]) -> str:
    return "".join(out.text for out in outputs if out.output_type == "stream" and out.name == "stdout")
