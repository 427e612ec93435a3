"""A small exercise of five parts, in a folder of its own, for the machine to be tried on."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from minillm.course.notebooks import node
from minillm.exercises import build
from minillm.exercises.authoring import answer_cell, check_cell, new_exercise, setup_cell, text_cell, write

HINTS = ["Which numbers does it start with?", "Two lines are enough."]


def _cells():
    yield text_cell("title", "# Exercise 90: numbers\n\nFive small things to build.")
    yield setup_cell(
        "setup", "import random\n\nfrom minillm.exercises import check_that\n\nSEED = 0\nnumbers = [1, 2, 3, 4]"
    )
    yield text_cell("text-90-1", "## 90.1 The sum (3 minutes)")
    yield answer_cell(
        "90.1",
        '''def total(numbers):
    """The sum of the numbers."""
    ### BEGIN SOLUTION
    result = 0
    for number in numbers:
        result += number
    return result
    ### END SOLUTION
''',
        title="The sum",
        minutes=3,
        task='return the sum of the "numbers"',
        hints=[*HINTS, "result += number"],
        forbidden=["sum", "numpy.sum", "math"],
    )
    yield check_cell(
        "90.1",
        """from minillm.exercises import check_that

drawn = [random.Random(SEED).randrange(100) for _ in range(20)]
check_that(total([]) == 0, "the sum of no numbers is 0")
check_that(total(drawn) == sum(drawn), f"your sum of 20 numbers is {total(drawn)}, it should be {sum(drawn)}")
print("sum:", total(numbers))
### BEGIN HIDDEN TESTS
check_that(total([-1]) == -1, "negative numbers count too")
### END HIDDEN TESTS
""",
        points=2,
    )
    yield text_cell("text-90-2", "## 90.2 The mean (3 minutes)")
    yield answer_cell(
        "90.2",
        '''def mean(numbers):
    """The mean of the numbers."""
    ### BEGIN SOLUTION
    return total(numbers) / len(numbers)
    ### END SOLUTION
''',
        title="The mean",
        minutes=3,
        task="return the mean",
        hints=HINTS,
        forbidden=["statistics"],
    )
    yield check_cell("90.2", 'print("mean:", mean(numbers))')
    yield check_cell(
        "90.2", 'check_that(mean([2]) == 2, "the mean of one number is that number")', name="check-90-2-one", points=0.5
    )
    for n, name, value in ((3, "largest", 4), (4, "smallest", 1), (5, "middle", 2)):
        yield text_cell(f"text-90-{n}", f"## 90.{n} The {name} (1 minutes)")
        yield answer_cell(
            f"90.{n}",
            f"def {name}(numbers):\n    ### BEGIN SOLUTION\n    return {value}\n    ### END SOLUTION",
            title=f"The {name}",
            minutes=1,
            task=f"return the {name} number",
            hints=HINTS,
        )
        yield check_cell(f"90.{n}", f'print("{name}:", {name}(numbers))')


def save_outputs(notebook):
    """Give the cells the execution counts and outputs that a kernel would, without one."""
    namespace = {}
    for count, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), start=1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(cell.source, namespace)
        cell.execution_count = count
        if printed.getvalue():
            cell.outputs = [node({"output_type": "stream", "name": "stdout", "text": printed.getvalue()})]
    return notebook


@pytest.fixture
def source_notebook():
    """The solved and executed notebook of the exercise, to be changed at will."""
    return save_outputs(new_exercise(list(_cells()), title="Numbers"))


@pytest.fixture(scope="session")
def _exercises(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("course") / "exercises"
    write(save_outputs(new_exercise(list(_cells()), title="Numbers")), folder / "solutions" / "90_numbers.ipynb")
    shutil.copy(Path(__file__).parents[2] / "exercises" / "conftest.py", folder)
    build("90", folder=folder)
    return folder


@pytest.fixture
def exercises(_exercises: Path, tmp_path: Path) -> Path:
    """A folder with ``solutions/90_numbers.ipynb`` and what was generated from it."""
    return Path(shutil.copytree(_exercises, tmp_path / "exercises"))


@pytest.fixture
def student(exercises: Path) -> SimpleNamespace:
    """A student at work on ``exercises/90_numbers.ipynb``: reads and edits the file as a front end would."""
    path = exercises / "90_numbers.ipynb"

    def edit(change: Callable[[list[dict]], object]) -> Path:
        notebook = json.loads(path.read_text())
        change(notebook["cells"])
        path.write_text(json.dumps(notebook))
        return path

    def answer(**answers: str) -> Path:
        def change(cells: list[dict]) -> None:
            for name, source in answers.items():
                next(c for c in cells if c["id"] == f"answer-90-{name[1:]}")["source"] = source

        return edit(change)

    right = {
        "p1": "def total(numbers):\n    result = 0\n    for n in numbers:\n        result += n\n    return result",
        "p2": "def mean(numbers):\n    return total(numbers) / len(numbers)",
        "p3": "def largest(numbers):\n    return sorted(numbers)[-1]",
        "p4": "def smallest(numbers):\n    return sorted(numbers)[0]",
        "p5": "def middle(numbers):\n    return sorted(numbers)[1]",
    }
    return SimpleNamespace(path=path, folder=exercises, edit=edit, answer=answer, right=right)
