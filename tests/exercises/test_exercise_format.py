"""The source's format: what is refused, and that nbgrader's rules hold."""

import re

import jsonschema
import pytest

from minillm.exercises.authoring import write
from minillm.exercises.folder import find_exercise, find_folder, find_source, load
from minillm.exercises.format import SOLUTION, replace_regions

# nbgrader's cell schema 3, as its documentation lists the fields (nbgrader 0.9: "Cell metadata").
NBGRADER_3 = {
    "type": "object",
    "properties": {
        "schema_version": {"type": "integer", "minimum": 3, "maximum": 3},
        "grade": {"type": "boolean"},
        "solution": {"type": "boolean"},
        "locked": {"type": "boolean"},
        "task": {"type": "boolean"},
        "grade_id": {"type": "string", "pattern": r"^[a-zA-Z0-9_\-]+$"},
        "points": {"type": "number", "minimum": 0},
        "checksum": {"type": "string"},
        "cell_type": {"type": "string", "enum": ["code", "markdown"]},
    },
    "required": ["schema_version", "grade", "solution", "locked", "task", "grade_id"],
    "additionalProperties": False,
}


def cell_of(notebook, cell_id):
    return next(cell for cell in notebook.cells if cell.id == cell_id)


def problems(notebook, tmp_path):
    write(notebook, tmp_path / "90_numbers.ipynb")
    with pytest.raises(ValueError, match="not a valid exercise source") as raised:
        load(tmp_path / "90_numbers.ipynb")
    return str(raised.value)


def test_source_and_generated_notebook_carry_nbgrader_schema_3(exercises):
    exercise = find_exercise("90", exercises)
    for path in (exercise.source, exercise.student_path):
        from minillm.course.notebooks import read_notebook

        cells = [cell for cell in read_notebook(path).cells if cell.cell_type == "code"]
        assert cells
        for cell in cells:
            jsonschema.validate(cell.metadata["nbgrader"], NBGRADER_3)
            assert cell.metadata["nbgrader"]["grade_id"] == cell.id
        graded = [cell for cell in cells if cell.metadata["nbgrader"]["grade"]]
        assert all("points" in cell.metadata["nbgrader"] for cell in graded)


def test_parts_are_read_in_order(exercises):
    exercise = find_exercise("90", exercises)
    assert [part.number for part in exercise.parts] == ["90.1", "90.2", "90.3", "90.4", "90.5"]
    assert exercise.parts[1].points == {"check-90-2": 1, "check-90-2-one": 0.5}
    assert exercise.parts[0].defines == {"total"}
    assert exercise.chapter == 90
    with pytest.raises(ValueError, match=r"no part 90.9; its parts: 90.1, 90.2"):
        exercise.part("90.9")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda nb: cell_of(nb, "answer-90-1").metadata["minillm"].pop("part"), 'answer-90-1.*needs "part"'),
        (lambda nb: cell_of(nb, "answer-90-1").metadata["minillm"].update(hints=["one"]), "at least two hints"),
        (lambda nb: cell_of(nb, "answer-90-1").metadata["minillm"].update(hints=["", ""]), "non-empty strings"),
        (lambda nb: cell_of(nb, "answer-90-1").metadata["minillm"].update(part="90.2"), "must be 90.1, 90.2"),
        (lambda nb: cell_of(nb, "answer-90-1").update(source="def total(n): ..."), "has no ### BEGIN SOLUTION"),
        (lambda nb: cell_of(nb, "answer-90-1").update(source="### BEGIN SOLUTION\n1"), "without '### END SOLUTION'"),
        (lambda nb: cell_of(nb, "answer-90-1").update(source="### END SOLUTION\n1"), "without its partner"),
        (lambda nb: cell_of(nb, "check-90-1").update(source="### BEGIN SOLUTION\n### END SOLUTION"), "in answer cells"),
        (lambda nb: cell_of(nb, "check-90-1").update(source="%timeit 1"), "line 1 is not Python"),
        (lambda nb: cell_of(nb, "check-90-1").metadata.pop("nbgrader"), "needs metadata.nbgrader"),
        (lambda nb: cell_of(nb, "check-90-1").metadata["minillm"].pop("part"), 'check-90-1.*no "part"'),
        (lambda nb: cell_of(nb, "check-90-1").metadata["minillm"].update(part="90.8"), "has no answer cell"),
        (lambda nb: cell_of(nb, "check-90-1").metadata["nbgrader"].update(points=0), "points > 0"),
        (lambda nb: cell_of(nb, "check-90-1").metadata["nbgrader"].pop("points"), "points > 0, not None"),
        (lambda nb: cell_of(nb, "check-90-1").metadata["nbgrader"].update(locked=False), "must be an answer"),
        (lambda nb: cell_of(nb, "check-90-1").metadata["nbgrader"].update(schema_version=2), "must be 3, not 2"),
        (lambda nb: cell_of(nb, "check-90-1").metadata["nbgrader"].update(colour=1), "unknown keys: colour"),
        (lambda nb: cell_of(nb, "check-90-1").metadata["nbgrader"].update(grade_id="setup"), "'setup' is used twice"),
        (lambda nb: cell_of(nb, "check-90-1").update(execution_count=None), "not executed.*: check-90-1"),
        (lambda nb: cell_of(nb, "check-90-1").update(outputs=[]), "no check prints anything"),
        (lambda nb: cell_of(nb, "check-90-1").outputs[0].update(name="stderr"), "only prints to stdout"),
        (lambda nb: cell_of(nb, "setup").update(source="numbers = []"), "exactly one setup cell.*found 0"),
        (lambda nb: cell_of(nb, "setup").update(source="SEED = 0\nSEED = 0"), "found 2"),
        (lambda nb: nb.metadata.pop("minillm"), 'has no "title"'),
        (lambda nb: nb.cells.remove(cell_of(nb, "check-90-3")), "part 90.3 has no check cell"),
        (
            lambda nb: nb.cells.insert(0, nb.cells.pop(nb.cells.index(cell_of(nb, "check-90-1")))),
            "stands before the answer",
        ),
    ],
)
def test_broken_sources_are_refused_by_rule(source_notebook, tmp_path, change, words):
    change(source_notebook)
    assert re.search(words, problems(source_notebook, tmp_path), re.DOTALL)


def test_every_broken_rule_is_named_at_once(source_notebook, tmp_path):
    cell_of(source_notebook, "check-90-1").metadata["nbgrader"]["points"] = -1
    cell_of(source_notebook, "answer-90-2").metadata["minillm"]["title"] = ""
    said = problems(source_notebook, tmp_path)
    assert "points > 0, not -1" in said
    assert 'needs "title"' in said


def test_a_source_is_named_after_its_chapter(source_notebook, tmp_path):
    write(source_notebook, tmp_path / "numbers.ipynb")
    with pytest.raises(ValueError, match=r"NN_name.ipynb"):
        load(tmp_path / "numbers.ipynb")


def test_a_file_that_is_no_notebook(tmp_path):
    (tmp_path / "90_numbers.ipynb").write_text("{")
    with pytest.raises(ValueError, match=r"90_numbers.ipynb is not a Jupyter notebook"):
        load(tmp_path / "90_numbers.ipynb")


def test_regions_keep_indentation_and_surroundings():
    source = "def f(x):\n    y = 1\n    ### BEGIN SOLUTION\n    y = 2\n    ### END SOLUTION\n    return y"
    assert replace_regions(source, SOLUTION, "raise X") == "def f(x):\n    y = 1\n    raise X\n    return y"
    assert replace_regions(source, SOLUTION, None) == "def f(x):\n    y = 1\n    return y"


@pytest.mark.parametrize(
    "name", ["90", "90_numbers", "90_numbers.ipynb", "anywhere/90_numbers.ipynb", "90_numbers-alice"]
)
def test_an_exercise_is_found_by_number_name_or_path(exercises, name):
    assert find_source(name, exercises).name == "90_numbers.ipynb"


@pytest.mark.parametrize("name", ["91", "numbers", "", "900"])
def test_an_unknown_exercise_names_the_known(exercises, name):
    with pytest.raises(ValueError, match="90_numbers"):
        find_source(name, exercises)


def test_the_folder_is_found_from_the_repository_and_from_inside(exercises, monkeypatch):
    monkeypatch.chdir(exercises.parent)
    assert find_folder() == exercises.resolve()
    monkeypatch.chdir(exercises)
    assert find_folder() == exercises.resolve()
    monkeypatch.chdir("/")
    assert (find_folder() / "conftest.py").exists()  # the clone's own
    with pytest.raises(ValueError, match="no exercises folder"):
        find_folder(exercises / "solutions")
