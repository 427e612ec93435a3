"""The notebook that is judged: the pristine cells with the student's answers put into them.

The student's file contributes answers and added cells, nothing else: setup, checks and the outputs that nbval compares
with come from the source. So edited checks do not help, deleted ones come back, and wrong outputs that were saved never
become the reference.
"""

import ast
import copy

from nbformat import NotebookNode

from minillm.course.notebooks import node
from minillm.exercises.format import HIDDEN, SEED_LINE, Exercise, Part, definitions, parse, replace_regions, role, stub
from minillm.exercises.rules import Surroundings, surroundings, violation
from minillm.exercises.submission import Submission, first_line


def solved(exercise: Exercise) -> Submission:
    """The source's own answers, as if a student had handed them in."""
    sources = {cell.id: cell.source for cell in exercise.notebook.cells}
    return Submission(exercise.source, {part.number: sources[part.answer] for part in exercise.parts})


def assemble(exercise: Exercise, submission: Submission, *, seed: int = 0, hidden: bool = False) -> NotebookNode:
    """Pristine cells plus ``submission``'s answers and added cells.

    Each code cell of the result carries ``metadata.judge``: its ``role`` (setup, answer, check or extra) and, for
    answers and checks, the ``part``. An answer also carries its ``status`` ("written", "not started", perhaps with a
    remark after a colon, or a sentence that says why it cannot be run) and the ``solution`` that stands in for it while
    later parts are judged.
    ``metadata.minillm.notes`` holds what was restored or left out.

    Args:
        exercise: what was asked.
        submission: what was handed in.
        seed: put into the line ``SEED = 0``.
        hidden: keep the hidden tests, for grading.
    """
    notebook = copy.deepcopy(exercise.notebook)
    notes = list(submission.notes)
    around = surroundings(exercise, [*submission.answers.values(), *(extra.source for extra in submission.extras)])
    every = sorted({name for part in exercise.parts for name in part.forbidden})
    extras: dict[str | None, list[NotebookNode]] = {}
    for number, extra in enumerate(submission.extras):
        refused = violation(extra.source, every, around)
        if refused is not None:
            notes.append(f"a cell of your own was left out, it {refused[1]}: {first_line(extra.source)!r}")
            continue
        cell = _extra_cell(extra.source, number)
        extras.setdefault(extra.after, []).append(cell)
    cells = extras.pop(None, [])
    for cell in notebook.cells:
        kind = role(cell)
        cell.metadata["judge"] = node({"role": kind})
        if kind in ("answer", "check"):
            cell.metadata["judge"]["part"] = cell.metadata["minillm"]["part"]
        if kind == "setup":
            cell.source = SEED_LINE.sub(f"SEED = {seed}", cell.source)
        elif kind == "check" and not hidden:
            cell.source = replace_regions(cell.source, HIDDEN, None)
        elif kind == "answer":
            _put_answer(cell, exercise.part(cell.metadata["minillm"]["part"]), submission, around)
        cells += [cell, *extras.get(cell.id, [])]
    notebook.cells = cells
    notebook.metadata["minillm"]["notes"] = notes
    return notebook


def _extra_cell(source: str, number: int) -> NotebookNode:
    cell = {"cell_type": "code", "id": f"extra-{number}", "metadata": {"judge": {"role": "extra"}}, "source": source}
    return node(cell | {"outputs": [], "execution_count": None})


def _put_answer(cell: NotebookNode, part: Part, submission: Submission, around: Surroundings) -> None:
    unsolved = stub(cell.source, part)
    answer = submission.answers.get(part.number, unsolved)
    status = answer_status(answer, unsolved, part, around)
    if status == "not started":
        status += _why_not_started(part, submission)
    cell.metadata["judge"].update(status=status, solution=cell.source, defines=sorted(part.defines))
    cell.source = answer
    cell.outputs, cell.execution_count = [], None


def _why_not_started(part: Part, submission: Submission) -> str:
    """What to add to "not started" where it may surprise, since something was done."""
    if part.number not in submission.answers:
        return ": the answer cell is missing from your notebook"
    written = frozenset().union(*(definitions(extra.source) for extra in submission.extras))
    elsewhere = ", ".join(sorted(part.defines & written))
    if not elsewhere:
        return ""
    return f": the answer cell is as you found it, but another cell defines {elsewhere}, move it into the answer cell"


def answer_status(answer: str, unsolved: str, part: Part, around: Surroundings) -> str:
    """ "written", "not started", or one sentence that says why this answer is not run."""
    if answer.strip() in ("", unsolved.strip()):
        return "not started"
    try:
        tree = parse(answer)
    except SyntaxError as error:
        return _syntax_sentence(answer, error)
    refused = violation(answer, part.forbidden, around)
    if refused is not None:
        return f"line {refused[0]} of your answer {refused[1]}"
    if any(
        isinstance(node, ast.Name) and node.id == "SEED" and isinstance(node.ctx, ast.Store) for node in ast.walk(tree)
    ):
        return "your answer sets SEED, which belongs to the checks: choose another name"
    return "written"


def _syntax_sentence(answer: str, error: SyntaxError) -> str:
    if error.lineno is None:
        return f"your answer is not Python: {error.msg}"
    lines = answer.splitlines()
    line = lines[error.lineno - 1].strip() if error.lineno <= len(lines) else ""
    if line.startswith(("%", "!")) or line.endswith("?"):
        return f"line {error.lineno} of your answer is a notebook command, not Python: {first_line(line)}"
    return f"line {error.lineno} of your answer is not Python ({error.msg}): {first_line(line)}"
