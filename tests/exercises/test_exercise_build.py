"""One source, two builds."""

import ast
import json
import stat

import pytest

from minillm.course.notebooks import notebook_bytes, read_notebook, write_notebook
from minillm.exercises import build
from minillm.exercises.building import generate
from minillm.exercises.folder import find_exercise
from minillm.exercises.format import role


def test_solutions_become_stubs_that_say_what_to_write(student):
    cells = {cell.id: cell for cell in read_notebook(student.path).cells}
    assert cells["answer-90-1"].source == (
        'def total(numbers):\n    """The sum of the numbers."""\n'
        '    raise NotImplementedError("Exercise 90.1: return the sum of the \\"numbers\\"")'
    )
    for cell in cells.values():
        if cell.cell_type == "code":
            ast.parse(cell.source)
            assert "SOLUTION" not in cell.source
            assert "HIDDEN" not in cell.source
            assert "negative numbers" not in cell.source
            assert cell.metadata["deletable"] is False
            assert cell.metadata.get("editable", True) is (role(cell) == "answer")
        if role(cell) == "answer":
            assert (cell.outputs, cell.execution_count) == ([], None)
            assert "hints" not in cell.metadata["minillm"]
    assert cells["check-90-1"].outputs[0].text == "sum: 10\n"
    assert cells["check-90-1"].execution_count is not None


def test_the_same_source_gives_the_same_bytes(student):
    before = student.path.read_bytes()
    assert build("90", folder=student.folder) == [student.path]
    assert student.path.read_bytes() == before == notebook_bytes(generate(find_exercise("90", student.folder)))
    assert build(folder=student.folder) == [student.path]
    assert json.loads(before)["nbformat_minor"] == 5


def test_executing_the_source_saves_its_outputs(exercises):
    """The fixture's outputs were saved without a kernel; a kernel must save the very same bytes, and twice."""
    source = exercises / "solutions" / "90_numbers.ipynb"
    before = source.read_bytes()
    notebook = read_notebook(source)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    write_notebook(notebook, source)
    with pytest.raises(ValueError, match="not executed"):
        build("90", folder=exercises)
    build("90", execute=True, folder=exercises)
    assert source.read_bytes() == before


def test_a_solution_that_does_not_run_is_named_and_nothing_is_written(student):
    source = student.folder / "solutions" / "90_numbers.ipynb"
    source.write_text(source.read_text().replace("return total(numbers) / len(numbers)", "return total(numbers) / 0"))
    before = source.read_bytes()
    with pytest.raises(ValueError, match=r"90_numbers.ipynb: the solution does not run: ZeroDivisionError"):
        build("90", execute=True, folder=student.folder)
    assert source.read_bytes() == before


def test_a_students_answer_is_not_overwritten(student):
    path = student.answer(p1=student.right["p1"])
    work = path.read_bytes()
    with pytest.raises(ValueError, match=r"holds work of its own .*--force"):
        build("90", folder=student.folder)
    assert path.read_bytes() == work
    build("90", force=True, folder=student.folder)
    assert path.with_name("90_numbers.ipynb.bak").read_bytes() == work
    assert b"NotImplementedError" in path.read_bytes()
    student.answer(p2="second")
    build("90", force=True, folder=student.folder)
    assert b"second" in path.with_name("90_numbers.ipynb.bak2").read_bytes()
    assert path.with_name("90_numbers.ipynb.bak").read_bytes() == work


def _text(source):
    return {"cell_type": "markdown", "id": "mine", "metadata": {}, "source": source}


def _code(source):
    return {"cell_type": "code", "id": "mine", "metadata": {}, "source": source, "outputs": [], "execution_count": None}


def _strip_metadata(cells):
    for cell in cells:
        if cell["id"].startswith("answer"):
            cell["metadata"].pop("minillm")
            cell["source"] = "my answer"


def _copy_check(cells):
    check = next(cell for cell in cells if cell["id"] == "check-90-1")
    cells.append(check | {"id": "copy", "source": "my experiment"})


def _update(cell_id, **change):
    return lambda cells: next(cell for cell in cells if cell["id"] == cell_id).update(change)


WORK = {
    "a text cell of one's own": lambda cells: cells.append(_text("my own derivation")),
    "a code cell of one's own": lambda cells: cells.append(_code("my = 1")),
    "half a character": lambda cells: cells.append(_code("my = '\ud800'")),
    "an edited text": _update("title", source="my notes"),
    "an edited check": _update("check-90-2-one", source="my experiments"),
    "an edited setup": _update("setup", source="helper = 1"),
    "a copied check": _copy_check,
    "a raw answer": _update("answer-90-1", cell_type="raw", source="my answer", metadata={}),
    "answers without metadata": _strip_metadata,
    "a deleted answer": lambda cells: cells.pop(2),
    "another order": lambda cells: cells.append(cells.pop(2)),
}


@pytest.mark.parametrize("change", WORK.values(), ids=WORK)
def test_other_work_is_not_overwritten_either(student, change):
    work = student.edit(change).read_bytes()
    with pytest.raises(ValueError, match="holds work of its own"):
        build("90", folder=student.folder)
    assert student.path.read_bytes() == work
    build("90", force=True, folder=student.folder)
    assert student.path.with_name("90_numbers.ipynb.bak").read_bytes() == work


@pytest.mark.parametrize(
    "content", ["<<<<<<< HEAD", '{"cells": []}', '{"cells": [], "metadata": {"minillm": 3}}', "[]"]
)
def test_a_file_that_tells_nothing_counts_as_work(student, content):
    student.path.write_text(content)
    with pytest.raises(ValueError, match="holds work of its own"):
        build("90", folder=student.folder)
    assert student.path.read_text() == content


def test_a_notebook_that_was_only_run_is_not_work(student):
    """As JupyterLab saves it: counts, outputs, times, its own metadata, lines in a list, an empty cell at the end."""
    notebook = json.loads(student.path.read_text())
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"]).splitlines(keepends=True)
        cell["metadata"]["jp-MarkdownHeadingCollapsed"] = True
        if cell["cell_type"] == "code":
            cell["execution_count"] = 99
            cell["outputs"] = []
            cell["metadata"]["execution"] = {"iopub.execute_input": "2030-01-01T00:00:00Z"}
    notebook["cells"].append(_code(""))
    notebook["metadata"]["language_info"] = {"name": "python", "version": "3.99"}
    student.path.write_text(json.dumps(notebook, indent=4))
    build("90", folder=student.folder)
    assert b'"execution_count": 99' not in student.path.read_bytes()


def test_a_stub_of_an_older_source_is_not_work(student):
    source = student.folder / "solutions" / "90_numbers.ipynb"
    source.write_text(source.read_text().replace("return the mean", "return the arithmetic mean"))
    build("90", folder=student.folder)
    assert b"Exercise 90.2: return the arithmetic mean" in student.path.read_bytes()


def test_writing_is_atomic_and_keeps_the_file_mode(student, monkeypatch):
    from pathlib import Path

    source = student.folder / "solutions" / "90_numbers.ipynb"
    source.write_text(source.read_text().replace("return the mean", "return the arithmetic mean"))
    student.path.chmod(0o640)
    before = student.path.read_bytes()

    def fail(self, target):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="full"):
            build("90", folder=student.folder)
    assert student.path.read_bytes() == before
    assert not [path for path in student.folder.iterdir() if path.suffix == ".tmp"]
    build("90", folder=student.folder)
    assert stat.S_IMODE(student.path.stat().st_mode) == 0o640
