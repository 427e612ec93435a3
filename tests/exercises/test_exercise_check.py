"""``check`` with what students really hand in. A kernel costs seconds, so each notebook here holds many mistakes."""

import io
import os
import sys
from types import SimpleNamespace

import pytest
from nbval.plugin import NbCellError

from minillm.exercises import check
from minillm.exercises.assemble import assemble
from minillm.exercises.checking import report_of
from minillm.exercises.folder import find_exercise
from minillm.exercises.judge import JudgedCell
from minillm.exercises.run import Run
from minillm.exercises.submission import read_submission


def status(report):
    return {part.number: part.status for part in report.parts}


def message(report, number):
    return next(part.message for part in report.parts if part.number == number)


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_answers_that_hang_die_flood_and_exit_cost_only_their_own_part(student, monkeypatch):
    path = student.answer(
        p1="def total(numbers):\n    while True:\n        pass",
        p2="def mean(numbers):\n    import os, signal\n    os.killpg(0, signal.SIGKILL)",
        p3="def largest(numbers):\n    while True:\n        print('no end ' * 1000)",
        p4="def smallest(numbers):\n    raise SystemExit",
        p5=student.right["p5"],
    )
    before = path.read_bytes()
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    report = check(str(path), folder=student.folder, timeout=4)
    assert "checking 90.1 ... 00:0" in terminal.getvalue()
    assert status(report) == {"90.1": "failed", "90.2": "failed", "90.3": "failed", "90.4": "failed", "90.5": "passed"}
    assert "still running after 4 s" in message(report, "90.1")
    assert "(line 2 of your answer: while True:): does a loop never end, or does it try every possibility?" in message(
        report, "90.1"
    )
    assert "ended the Python process" in message(report, "90.2")
    assert "printed more than 1,000,000 characters" in message(report, "90.3")
    assert "ends the notebook" in message(report, "90.4")
    assert not report.passed
    assert path.read_bytes() == before
    assert "1 of 5 parts passed" in report.render()


@pytest.mark.parametrize("ename", [None, "KeyboardInterrupt", "Mistake"])
def test_whatever_an_interrupt_leaves_behind_the_time_was_up(ename):
    """A loaded machine may lose the interrupt's own error, and an answer may catch it and go on."""
    output = SimpleNamespace(output_type="error", ename=ename, evalue="the sum of no numbers is 0", traceback=[])
    config = SimpleNamespace(option=SimpleNamespace(nbval_cell_timeout=30.0))
    file = SimpleNamespace(timed_out=True, config=config, answer_to=lambda part: None)
    cell = SimpleNamespace(parent=file, config=config, part="90.1", test_outputs=[output] if ename else [])
    said = JudgedCell.explain(cell, NbCellError(1, "Cell outputs differ", ""))
    assert said == "still running after 30 s: does a loop never end, or does it try every possibility?"


def test_the_report_gives_each_part_a_line_and_what_failed_a_hint(student):
    """Of judged cells as a kernel's run reports them; the last check never came, since the judging was stopped."""
    outcomes = {
        "answer-90-1": ("failed", "line 2 of your answer uses sum: that is what this part asks you to build"),
        "check-90-1": ("skipped", "90.1 has failed before"),
        "answer-90-2": ("passed", ""),
        "check-90-2": ("passed", ""),
        "check-90-2-one": ("failed", "the mean of one number is that number"),
        "answer-90-3": ("passed", ""),
        "check-90-3": ("passed", ""),
        "answer-90-4": ("failed", "not started: the answer cell is missing from your notebook"),
        "check-90-4": ("skipped", "90.4 has failed before"),
        "answer-90-5": ("passed", ""),
    }
    exercise = find_exercise("90", student.folder)
    notebook = assemble(exercise, read_submission(student.path, exercise))
    cells = [
        {"cell": name, "role": name.partition("-")[0], "part": f"90.{name.split('-')[2]}", "outcome": o, "message": m}
        for name, (o, m) in outcomes.items()
    ]
    run = Run(cells, notes=["your own cell 'x': NameError"], trouble="stopped after 9 s")
    report = report_of(exercise, notebook, run, path=student.path, seed=7)
    assert [(part.status, part.points) for part in report.parts] == [
        ("failed", 0),
        ("failed", 1),
        ("passed", 1),
        ("not started", 0),
        ("not judged", 0),
    ]
    hint = "hint: Which numbers does it start with? (more: minillm exercises hint"
    assert report.render().splitlines() == [
        "90_numbers: Numbers",
        f"  90.1  The sum       not yet: {outcomes['answer-90-1'][1]}",
        f"                      {hint} 90.1 --level 2)",
        "  90.2  The mean      not yet: the mean of one number is that number",
        f"                      {hint} 90.2 --level 2)",
        "  90.3  The largest   passed",
        "  90.4  The smallest  not started: the answer cell is missing from your notebook",
        "  90.5  The middle    not judged: stopped after 9 s",
        "  note: your own cell 'x': NameError",
        "  note: stopped after 9 s",
        "1 of 5 parts passed (seed 7).",
    ]


def _report(student, messages):
    """Of a run in which the answer cells end with these messages ("" where they pass, and then the checks do)."""
    exercise = find_exercise("90", student.folder)
    notebook = assemble(exercise, read_submission(student.path, exercise))
    cells = []
    for part in exercise.parts:
        outcome = "failed" if messages[part.number] else "passed"
        cells.append({"cell": part.answer, "role": "answer", "message": messages[part.number]})
        cells += [{"cell": name, "role": "check", "message": ""} for name in part.checks]
        for cell in cells[-1 - len(part.checks) :]:
            cell.update(part=part.number, outcome=outcome)
    return report_of(exercise, notebook, Run(cells), path=student.path, seed=7)


def test_of_parts_not_started_the_first_open_one_shows_how_to_get_a_hint(student):
    report = _report(student, {"90.1": "", **{f"90.{n}": "not started" for n in (2, 3, 4, 5)}})
    assert [line.strip() for line in report.render().splitlines() if "hint" in line] == [
        "hint: minillm exercises hint 90.2"
    ]


def test_a_slip_of_the_pen_is_no_reason_to_hint_at_the_idea(student):
    slips = (
        "line 1 of your answer is not Python ('(' was never closed): f(",
        "NameError: name 'x' is not defined (line 2 of your answer: x)",
        "your answer does not define largest: was it renamed?",
        "still running after 30 s (line 2 of your answer: while True:): does a loop never end, or does it try",
        "IndexError: list index out of range",
    )
    report = _report(student, {f"90.{n}": message for n, message in enumerate(slips, start=1)})
    assert [bool(part.hint) for part in report.parts] == [False, False, False, False, True]
    assert report.render().count("hint:") == 1


def test_an_honest_notebook_passes_however_untidy(student):
    """Helper cells, a split answer, debugging prints, a scratch cell that fails, magics, edited and deleted checks."""
    first = "def total(numbers):\n    print('debugging', numbers)\n    return _add_up(numbers)"

    def untidy(cells):
        student_cells = {cell["id"]: cell for cell in cells}
        student_cells["answer-90-1"]["source"] = first
        student_cells["check-90-1"]["source"] = "print('sum: 10')"
        student_cells["setup"]["source"] = "SEED = 12"
        for n in (2, 3, 4, 5):
            student_cells[f"answer-90-{n}"]["source"] = student.right[f"p{n}"]
        helper = "def _add_up(numbers):\n    result = 0\n    for n in numbers:\n        result += n\n    return result"
        place = cells.index(student_cells["answer-90-1"])
        own = [
            {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": 1, "source": s}
            for s in (
                helper,
                "1 / 0",
                "%timeit total([1])",
                "import statistics\nstatistics.mean([1])",
                "print('x' * 200_000)",
            )
        ]
        cells[place + 1 : place + 1] = own
        cells.remove(student_cells["check-90-3"])
        for cell in cells:
            cell.pop("id", None)

    report = check(str(student.edit(untidy)), folder=student.folder)
    assert report.passed, report.render()
    notes = "\n".join(report.notes)
    assert "not plain Python: '%timeit total([1])'" in notes
    assert "uses statistics: that is what this part asks you to build: 'import statistics'" in notes
    assert "your own cell '1 / 0': ZeroDivisionError: division by zero" in notes
    assert "missing from your notebook, so the original was run: check-90-3" in notes
    assert "note:" not in report.render()  # of interest only when something fails


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{ not json", "its JSON is broken"),
        ("<<<<<<< HEAD\n{}", "merged with conflicts"),
        ("[1, 2]", "no list of cells"),
        ('{"worksheets": []}', "no list of cells"),
        ("[" * 100_000, "is broken"),
    ],
)
def test_a_file_that_is_no_notebook_is_said_to_be_none(student, content, words):
    student.path.write_text(content)
    with pytest.raises(ValueError, match=words):
        check("90", folder=student.folder)


def test_a_notebook_that_is_not_there(student):
    student.path.unlink()
    with pytest.raises(ValueError, match="there is no notebook"):
        check("90", folder=student.folder)
    os.mkdir(student.path)
    with pytest.raises(ValueError, match="cannot be read"):
        check("90", folder=student.folder)


@pytest.mark.parametrize("timeout", [0, -5, float("nan"), float("inf")])
def test_a_timeout_that_is_none_is_refused(student, timeout):
    with pytest.raises(ValueError, match=f"timeout must be positive .*, not {timeout}"):
        check("90", folder=student.folder, timeout=timeout)
