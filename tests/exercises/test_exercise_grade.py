"""A folder of submissions into a table. Each submission costs a kernel, so the few here hold many mistakes."""

import csv
import json
import os
import shutil
import threading

import pytest

from minillm.course.notebooks import write_notebook
from minillm.exercises import grade, grading
from minillm.exercises.assemble import assemble, solved
from minillm.exercises.folder import find_exercise
from minillm.exercises.run import Run, judge_notebook


@pytest.fixture
def hand_in(student, tmp_path):
    """Put a notebook with these answers into the folder of submissions."""
    pristine = student.path.read_text()
    folder = tmp_path / "submitted"

    def put(name: str, **answers: str):
        notebook = json.loads(pristine)
        for cell in notebook["cells"]:
            if cell["id"].startswith("answer"):
                cell["source"] = answers.get("p" + cell["id"][-1], cell["source"])
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(notebook))
        return path

    return put


def test_each_submission_costs_only_its_own_points(student, hand_in, tmp_path):
    marker = tmp_path / "still_alive"
    leftover = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {_touch_after_parent(marker)!r}])"
    hand_in(
        "alice/90_numbers/90_numbers.ipynb",
        **(
            student.right
            | {
                "p1": "def total(numbers):\n    return abs(_sum(numbers))\n\n\n"
                + student.right["p1"].replace("total", "_sum")
            }
        ),
    )
    hand_in(
        "bob_90_numbers.ipynb",
        p1="def total(numbers):\n    import threading\n    threading.Event().wait()",
        p2="def mean(numbers):\n    return 2.5 if len(numbers) > 1 else 0",
        p3="def largest(numbers):\n    kept = bytearray(2**40)\n    return 4",
        p4=f"{leftover}\ndef smallest(numbers):\n    return 1",
        p5="def middle(numbers):\n    open('left_behind', 'w').write('x')\n    return 2",
    )
    (tmp_path / "submitted" / "carol.ipynb").write_text("{")
    hand_in(".ipynb_checkpoints/alice.ipynb")
    before = {path: path.read_bytes() for path in (tmp_path / "submitted").rglob("*") if path.is_file()}

    grades = grade(
        tmp_path / "submitted",
        output=tmp_path / "grades.csv",
        timeout=36,
        memory_mb=4096,
        jobs=2,
        folder=student.folder,
    )

    table = list(csv.DictReader((tmp_path / "grades.csv").open(newline="")))
    assert [row["student"] for row in table] == ["alice", "bob", "carol"]
    alice, bob, carol = table
    assert alice["file"] == os.path.join("alice", "90_numbers", "90_numbers.ipynb")
    # The hidden test is what tells: a sum of absolute values passes the checks that students see.
    assert (alice["score"], alice["max_score"], alice["90.1"], alice["90.2"]) == ("4.5", "6.5", "0", "1.5")
    assert alice["reason"] == "90.1: negative numbers count too"
    assert [bob[part] for part in ("90.1", "90.2", "90.3", "90.4", "90.5")] == ["0", "1", "0", "1", "1"]
    assert bob["score"] == "3"
    assert "90.1: still running after 6 s" in bob["reason"]
    assert "90.2: the mean of one number is that number" in bob["reason"]
    assert "90.3: MemoryError" in bob["reason"]
    assert (carol["score"], carol["max_score"]) == ("0", "6.5")
    assert "JSON is broken" in carol["reason"]
    assert {row["seed"] for row in table} == {str(grades.seed)}

    assert before == {path: path.read_bytes() for path in (tmp_path / "submitted").rglob("*") if path.is_file()}
    assert not marker.exists()
    assert [path for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def _touch_after_parent(marker) -> str:
    """A program that outlives the kernel unless it is killed with it, and then leaves a mark."""
    return f"import os, time\nwhile os.getppid() > 1: time.sleep(0.01)\nopen({str(marker)!r}, 'w')"


def test_judging_ends_at_once_when_told_to(student):
    exercise = find_exercise("90", student.folder)
    stop = threading.Event()
    stop.set()
    run = judge_notebook(assemble(exercise, solved(exercise)), cell_timeout=600, timeout=600, stop=stop)
    assert run.trouble == "interrupted"
    assert run.cells == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timeout": 0}, r"timeout must be positive .*, not 0"),
        ({"timeout": float("nan")}, r"timeout must be positive .*, not nan"),
        ({"memory_mb": -1}, "memory_mb must be positive"),
        ({"jobs": 0}, "jobs must be positive"),
        ({"exercise": "91"}, "90_numbers"),
        ({"output": "nowhere/grades.csv"}, "output: there is no folder nowhere to write grades.csv to"),
        ({"output": "."}, "output: . is a folder"),
    ],
)
def test_bad_arguments_are_refused(student, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        grade(tmp_path, **({"output": tmp_path / "grades.csv", "folder": student.folder} | options))
    with pytest.raises(ValueError, match="is not a folder"):
        grade(tmp_path / "nowhere", output=tmp_path / "grades.csv", folder=student.folder)
    assert not (tmp_path / "grades.csv").exists()


def test_a_folder_without_notebooks_is_refused(student, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"submissions: there is no notebook \(\*.ipynb\) below .*empty"):
        grade(tmp_path / "empty", output=tmp_path / "grades.csv", folder=student.folder)
    assert not (tmp_path / "grades.csv").exists()


def _with(**change):
    return lambda notebook: [cell.update(change) for cell in notebook["cells"]]


SPOILT = {
    "deep_operators": lambda notebook: notebook["cells"][1].update(id="mine", source="x = " + "-" * 100_000 + "1"),
    "deep_attributes": lambda notebook: notebook["cells"][1].update(id="mine", source="x" + ".a" * 200_000),
    "no_nbgrader": _with(metadata={"nbgrader": None}),
    "list_for_nbgrader": _with(metadata={"nbgrader": ["x"]}),
    "list_for_id": _with(id=["x"]),
    "text_for_metadata": _with(metadata="x"),
    "text_for_minillm": _with(metadata={"minillm": "x"}),
    "half_a_character": _with(id="\ud800", source="'\ud800'"),
    "nothing_to_tell_by": _with(id=["x"], metadata={"nbgrader": None}),
    "numbers_for_cells": lambda notebook: notebook.update(cells=[1, 2]),
}


def test_nothing_in_a_file_costs_others_their_grade(student, hand_in, tmp_path, monkeypatch):
    """Two exercises and file names that do not tell: each file is read to find out which it answers."""
    shutil.copy(student.folder / "solutions" / "90_numbers.ipynb", student.folder / "solutions" / "90_other.ipynb")
    for name, spoil in SPOILT.items():
        path = hand_in(f"{name}/homework.ipynb")
        notebook = json.loads(path.read_text())
        spoil(notebook)
        path.write_text(json.dumps(notebook))
    (hand_in("raising/homework.ipynb").parent / "halb\udcff.ipynb").write_text("{")
    judged = []

    def judge(notebook, **_):
        write_notebook(notebook, tmp_path / "judged.ipynb")
        judged.append(notebook)
        if len(judged) == 1:
            raise OSError("no more processes")
        return Run(trouble="not judged here")

    monkeypatch.setattr(grading, "judge_notebook", judge)
    rows = grade(tmp_path / "submitted", output=tmp_path / "grades.csv", folder=student.folder).rows
    assert len(rows) == len(SPOILT) + 2
    reasons = [row.reason for row in rows]
    assert sum("which exercise is this?" in reason for reason in reasons) == 2
    assert sum(reason == "could not be judged: OSError: no more processes" for reason in reasons) == 1
    assert sum("JSON is broken" in reason for reason in reasons) == 1
    assert len(list(csv.reader((tmp_path / "grades.csv").open(newline="")))) == len(rows) + 1
