"""A folder of submissions into a table. Each submission costs a kernel, so the few here hold many mistakes."""

import csv
import json
import os
import threading

import pytest

from minillm.exercises import grade
from minillm.exercises.assemble import assemble, solved
from minillm.exercises.folder import find_exercise
from minillm.exercises.run import judge_notebook


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
        ({"timeout": 0}, "timeout must be positive, not 0"),
        ({"memory_mb": -1}, "memory_mb must be positive"),
        ({"jobs": 0}, "jobs must be positive"),
        ({"exercise": "91"}, "90_numbers"),
    ],
)
def test_bad_arguments_are_refused(student, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        grade(tmp_path, output=tmp_path / "grades.csv", folder=student.folder, **options)
    with pytest.raises(ValueError, match="is not a folder"):
        grade(tmp_path / "nowhere", output=tmp_path / "grades.csv", folder=student.folder)
    assert not (tmp_path / "grades.csv").exists()
