"""Reading a student's notebook: which cell answers which part, however the file was treated."""

import pytest

from minillm.course.notebooks import notebook_bytes
from minillm.exercises.assemble import assemble
from minillm.exercises.folder import find_exercise
from minillm.exercises.format import role
from minillm.exercises.submission import read_submission


def code(source, **more):
    return {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "source": source} | more


def read(student, change=lambda cells: None):
    return read_submission(student.edit(change), find_exercise("90", student.folder))


def index_of(cells, cell_id):
    return next(place for place, cell in enumerate(cells) if cell["id"] == cell_id)


def test_an_untouched_notebook_has_every_answer_and_nothing_to_note(student):
    submission = read(student)
    assert sorted(submission.answers) == ["90.1", "90.2", "90.3", "90.4", "90.5"]
    assert submission.extras == []
    assert submission.notes == []


def test_sources_may_be_lists_of_lines(student):
    def change(cells):
        cells[index_of(cells, "answer-90-1")]["source"] = ["def total(numbers):\n", "    return 0"]

    assert read(student, change).answers["90.1"] == "def total(numbers):\n    return 0"


def test_without_cell_ids_nbgraders_ids_match(student):
    student.answer(**student.right)
    submission = read(student, lambda cells: [cell.pop("id") for cell in cells])
    assert submission.answers["90.3"] == student.right["p3"]
    assert submission.notes == []


def test_without_any_metadata_the_functions_match(student):
    """Some front ends drop ids and metadata alike; checks then look like cells of the student's own, and do no harm."""

    def change(cells):
        for cell in cells:
            del cell["id"]
            cell["metadata"] = {}

    student.answer(**student.right)
    submission = read(student, change)
    assert submission.answers == {f"90.{n}": student.right[f"p{n}"] for n in range(1, 6)}


def test_a_deleted_answer_written_anew_is_found_and_one_that_is_gone_is_named(student):
    def change(cells):
        cells[:] = [cell for cell in cells if cell["id"] not in ("answer-90-1", "answer-90-2")]
        cells.append(code(student.right["p1"], id="new"))

    submission = read(student, change)
    assert submission.answers["90.1"] == student.right["p1"]
    assert "90.2" not in submission.answers
    assert submission.extras == []
    assert "the answer cell of 90.2 is gone from your notebook: it counts as not started" in submission.notes


def test_of_two_cells_with_the_same_id_the_lower_one_counts(student):
    def change(cells):
        place = index_of(cells, "answer-90-1")
        cells.insert(place + 1, cells[place] | {"source": student.right["p1"]})

    submission = read(student, change)
    assert submission.answers["90.1"] == student.right["p1"]
    assert submission.notes == ["two cells are the answer to 90.1: the lower one counts"]


def test_added_cells_run_after_the_cell_they_stand_behind(student):
    def change(cells):
        cells.insert(0, code("import json"))
        cells.insert(index_of(cells[1:], "answer-90-2") + 2, code("helper = 1"))
        cells.append(code("  \n"))
        cells.append({"cell_type": "markdown", "metadata": {}, "source": "my notes"})

    notebook = assemble(find_exercise("90", student.folder), read(student, change))
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert sources[0] == "import json"
    assert sources[sources.index("helper = 1") - 1].startswith("def mean")
    assert sources[-1].startswith("print(")


def test_a_moved_answer_is_judged_in_its_place(student):
    def change(cells):
        cells.insert(0, cells.pop(index_of(cells, "answer-90-5")))

    exercise = find_exercise("90", student.folder)
    ids = [cell.id for cell in assemble(exercise, read(student, change)).cells]
    assert ids == [cell.id for cell in exercise.notebook.cells]


@pytest.mark.parametrize(
    "junk", [None, 3, "text", {"cell_type": "code"}, {"metadata": 5, "source": 7}, {"source": None}]
)
def test_cells_that_make_no_sense_are_passed_over(student, junk):
    assert len(read(student, lambda cells: cells.insert(0, junk)).answers) == 5


def test_the_judged_notebook_takes_only_answers_from_the_student(student):
    """Checks, setup and reference outputs are the source's, the seed is the machine's, and hidden tests stay away."""

    def change(cells):
        for cell in cells:
            if cell["id"].startswith(("check", "setup")):
                cell["source"] = "print('forged')"
                cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "forged\n"}]

    exercise = find_exercise("90", student.folder)
    submission = read(student, change)
    for hidden in (False, True):
        notebook = assemble(exercise, submission, seed=77, hidden=hidden)
        text = "\n".join(cell.source for cell in notebook.cells)
        assert "forged" not in str(notebook)
        assert "\nSEED = 77\n" in text
        assert ("negative numbers" in text) == hidden
    assert [c.outputs for c in notebook.cells if role(c) == "check"] == [
        c.outputs for c in exercise.notebook.cells if role(c) == "check"
    ]


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ("", "not started"),
        ("  \n", "not started"),
        ("def total(n):\n    return 1", "written"),
        ("%timeit total([1])", "line 1 of your answer is a notebook command, not Python: %timeit total([1])"),
        ("x = 1\n!ls", "line 2 of your answer is a notebook command, not Python: !ls"),
        ("total?", "line 1 of your answer is a notebook command, not Python: total?"),
        ("def total(n)\n    pass", "line 1 of your answer is not Python (expected ':'): def total(n)"),
        ("x = '\\d'", "written"),
        ("\0", "is not Python"),
        ("x = " + "-" * 100_000 + "1", "your answer is not Python: it is nested too deeply for Python to read"),
        ("x" + ".a" * 200_000, "your answer is not Python: it is nested too deeply for Python to read"),
        ("def total(n):\n    return '\ud800'", "written"),
        ("\ud800", "line 1 of your answer is not Python"),
        ("SEED = 0", "your answer sets SEED, which belongs to the checks: choose another name"),
        ("import math", "line 1 of your answer uses math: that is what this part asks you to build"),
    ],
)
def test_the_status_of_an_answer_is_known_before_it_runs(student, answer, status):
    path = student.answer(p1=answer)
    exercise = find_exercise("90", student.folder)
    notebook = assemble(exercise, read_submission(path, exercise))
    cell = next(cell for cell in notebook.cells if cell.id == "answer-90-1")
    assert status in cell.metadata["judge"]["status"]


@pytest.mark.parametrize("source", ["x = " + "-" * 100_000 + "1", "x" + ".a" * 200_000, "\0", "\ud800"])
def test_a_cell_that_python_cannot_read_is_left_out(student, source):
    submission = read(student, lambda cells: cells.insert(1, code(source)))
    assert submission.extras == []
    assert len(submission.notes) == 1
    assert "it is not plain Python" in submission.notes[0]
    exercise = find_exercise("90", student.folder)
    notebook_bytes(assemble(exercise, submission))


def test_an_answer_written_elsewhere_or_deleted_is_told_apart_from_none(student):
    def change(cells):
        cells.append(code("def largest(numbers):\n    return 4"))
        cells.pop(index_of(cells, "answer-90-2"))

    exercise = find_exercise("90", student.folder)
    notebook = assemble(exercise, read(student, change))
    statuses = [cell.metadata["judge"]["status"] for cell in notebook.cells if role(cell) == "answer"]
    elsewhere = "but another cell defines largest, move it into the answer cell"
    assert statuses == [
        "not started",
        "not started: the answer cell is missing from your notebook",
        f"not started: the answer cell is as you found it, {elsewhere}",
        "not started",
        "not started",
    ]


def test_an_exercise_that_is_not_there_is_said_to_be_none(student):
    with pytest.raises(ValueError, match="no exercise '91'; the exercises are: 90_numbers"):
        find_exercise("91", student.folder)
