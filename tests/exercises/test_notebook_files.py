"""Notebooks as files: one normal form, the same bytes each time."""

import json

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from minillm.course.notebooks import execute, node, normalise, notebook_bytes, read_notebook, write_notebook


def notebook(*sources, **metadata):
    cells = [
        {"cell_type": "code", "id": f"c{n}", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
        for n, source in enumerate(sources)
    ]
    return node({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


def stream(text, name="stdout"):
    return node({"output_type": "stream", "name": name, "text": text})


def test_executing_twice_gives_the_same_bytes(tmp_path):
    """Many small prints, which a kernel cuts into messages differently from run to run."""
    prints = "import sys\nfor n in range(300):\n    print(n, flush=True)\n    sys.stderr.write('e')"
    both = []
    for _ in range(2):
        made = notebook("import os", prints, "os.getcwd()", metadata={})
        both.append(notebook_bytes(execute(made, folder=tmp_path)))
    assert both[0] == both[1]
    made = nbformat.reads(both[0], as_version=4)
    assert [cell.execution_count for cell in made.cells] == [1, 2, 3]
    assert sorted(output.name for output in made.cells[1].outputs) == ["stderr", "stdout"]
    assert made.cells[2].outputs[0].data["text/plain"] == repr(str(tmp_path.resolve()))
    assert "language_info" not in made.metadata
    assert made.metadata.kernelspec.name == "python3"


def test_a_cell_that_fails_ends_the_run(tmp_path):
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(notebook("1 / 0", "print('never')"), folder=tmp_path)


def test_the_normal_form():
    made = notebook(
        "print(1)", language_info={"version": "3.11.7"}, widgets={}, kernelspec={"name": "mine"}, minillm={"title": "t"}
    )
    cell = made.cells[0]
    cell.metadata = node({"execution": {"iopub.status.busy": "2026-01-01"}, "tags": ["x"], "collapsed": False})
    cell.outputs = [stream("a"), stream("b"), stream("c", "stderr"), stream("d")]
    normalise(made)
    assert [(output.name, output.text) for output in cell.outputs] == [
        ("stdout", "ab"),
        ("stderr", "c"),
        ("stdout", "d"),
    ]
    assert cell.metadata == {"tags": ["x"]}
    assert sorted(made.metadata) == ["kernelspec", "minillm"]
    once = notebook_bytes(made)
    assert notebook_bytes(normalise(made)) == once
    nbformat.validate(json.loads(once))


def test_reading_gives_stable_ids_where_there_are_none(tmp_path):
    made = json.loads(notebook_bytes(notebook("1", "2")))
    made["nbformat_minor"] = 4
    for cell in made["cells"]:
        del cell["id"]
    (tmp_path / "old.ipynb").write_text(json.dumps(made))
    assert [cell.id for cell in read_notebook(tmp_path / "old.ipynb").cells] == ["cell-000", "cell-001"]


def test_a_round_trip_keeps_every_byte(tmp_path):
    made = normalise(notebook("x = '\u00e9\U0001f600'\n\n", "", "\n"))
    path = write_notebook(made, tmp_path / "new" / "n.ipynb")
    assert path.read_bytes() == notebook_bytes(made) == notebook_bytes(read_notebook(path))
    assert path.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "{}", '{"cells": []}', '{"cells": [1], "nbformat": 4}', '{"cells": 5}']
)
def test_what_is_no_notebook_is_refused_by_name(tmp_path, content):
    (tmp_path / "n.ipynb").write_text(content)
    with pytest.raises(ValueError, match=r"n\.ipynb is not a Jupyter notebook of format 4"):
        read_notebook(tmp_path / "n.ipynb")
    with pytest.raises(ValueError, match="there is no notebook"):
        read_notebook(tmp_path / "none.ipynb")


def test_doubled_ids_are_refused(tmp_path):
    made = notebook("1", "2")
    made.cells[1]["id"] = "c0"
    with pytest.raises(ValueError, match="share an id, and ids must differ: c0"):
        normalise(made)
    (tmp_path / "n.ipynb").write_text(json.dumps(made))
    with pytest.raises(ValueError, match="share an id, and ids must differ: c0"):
        read_notebook(tmp_path / "n.ipynb")
