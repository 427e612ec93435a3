"""``pytest --nbval exercises/``, as a student and the course's own tests run it. One run, since each takes seconds."""

import subprocess
import sys
from pathlib import Path


def test_nbval_judges_by_the_pristine_cells(student):
    """A student ran and saved wrong outputs: plain nbval would compare them with themselves and pass."""

    def save_wrong_outputs(cells):
        for cell in cells:
            if cell["id"] == "check-90-3":
                cell["source"] = "print('largest: 3')"
                cell["outputs"][0]["text"] = "largest: 3\n"

    student.answer(
        p1="def total(numbers):\n    return sum(numbers)",
        p2=student.right["p2"],
        p3="def largest(numbers):\n    print('hm')\n    return 3",
        p4="def tiniest(numbers):\n    return min(numbers",
    )
    student.edit(save_wrong_outputs)
    source = student.folder / "solutions" / "90_numbers.ipynb"
    source.with_name("91_broken.ipynb").write_text(source.read_text().replace('"90.', '"91.'))
    (student.folder / "91_broken.ipynb").write_text("{")

    command = [sys.executable, "-m", "pytest", "--nbval", "-v", "--color=no", "--continue-on-collection-errors"]
    command += ["-p", "no:cacheprovider", "-c", str(Path(__file__).parents[2] / "pyproject.toml"), "--rootdir", "."]
    command += ["90_numbers.ipynb", "91_broken.ipynb", "solutions/90_numbers.ipynb"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=student.folder)
    out = run.stdout

    assert "90.1 The sum: line 2 of your answer uses sum: that is what this part asks you to build" in out
    assert "90.3 The largest: the check should print 'largest: 4', but printed 'largest: 3'" in out
    assert "::90.2 check-90-2 PASSED" in out  # with the source's `total`, since the student's is refused
    assert "90.4 The smallest: line 2 of your answer is not Python ('(' was never closed): return min(numbers" in out
    assert "90.5 The middle: not started\n" in out
    assert "::90.5 check SKIPPED" in out
    assert "its JSON is broken" in out
    assert "Traceback" not in out
    assert "ipynb::Cell 11 PASSED" in out  # the sources themselves are plain nbval's
    assert "4 failed, 17 passed, 3 skipped, 1 error" in out
