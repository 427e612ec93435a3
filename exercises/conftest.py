"""Under ``pytest --nbval`` an exercise is judged as its original cells with the student's answers in them, matched by
cell id.

So outputs that a student saved never become the reference, and edited or deleted checks are the original ones again.
"""

from pathlib import Path

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path, parent: pytest.Collector):
    collected = yield
    source = Path(__file__).parent / "solutions" / file_path.name
    if collected and file_path.suffix == ".ipynb" and file_path != source and source.exists():
        from minillm.exercises.judge import ExerciseFile

        return [ExerciseFile.from_parent(parent, path=file_path)]
    return collected
