"""Constructors for the cells of an exercise's source: they write the metadata, so that an author writes text and code.

>>> source = new_exercise([setup_cell("setup", "SEED = 0"), answer_cell("2.1", ...), check_cell("2.1", ...)],
title="Byte-level BPE")
>>> write(source, "exercises/solutions/02_tokenizers.ipynb")
"""

from collections.abc import Sequence
from pathlib import Path

from nbformat import NotebookNode

from minillm.course.notebooks import node, normalise, write_notebook


def _nbgrader(
    cell_id: str, *, grade: bool, solution: bool, locked: bool, points: float | None = None
) -> dict[str, object]:
    """nbgrader's cell metadata, schema 3."""
    metadata: dict[str, object] = {
        "schema_version": 3,
        "grade_id": cell_id,
        "grade": grade,
        "solution": solution,
        "locked": locked,
        "task": False,
        "cell_type": "code",
    }
    return metadata if points is None else metadata | {"points": points}


def _code_cell(cell_id: str, code: str, metadata: dict[str, object]) -> NotebookNode:
    cell = {"cell_type": "code", "id": cell_id, "metadata": metadata, "source": code.strip()}
    return node(cell | {"execution_count": None, "outputs": []})


def text_cell(cell_id: str, text: str) -> NotebookNode:
    """Markdown: the question, the explanation, how long a part should take."""
    return node({"cell_type": "markdown", "id": cell_id, "metadata": {}, "source": text.strip()})


def setup_cell(cell_id: str, code: str) -> NotebookNode:
    """Code that the student reads and runs but does not edit: imports, ``SEED = 0``, data, demonstrations."""
    metadata: dict[str, object] = {"nbgrader": _nbgrader(cell_id, grade=False, solution=False, locked=True)}
    return _code_cell(cell_id, code, metadata)


def answer_cell(
    part: str,
    code: str,
    *,
    title: str,
    minutes: int,
    task: str,
    hints: Sequence[str],
    forbidden: Sequence[str] = (),
) -> NotebookNode:
    """The solved answer of ``part`` ("2.1"), solutions between ``### BEGIN SOLUTION`` and ``### END SOLUTION``.

    ``task`` completes ``NotImplementedError("Exercise 2.1: ...")``; ``hints`` go from a question to nearly the code;
    ``forbidden`` names what the student is to build (see :mod:`minillm.exercises.rules`).
    """
    cell_id = "answer-" + part.replace(".", "-")
    metadata: dict[str, object] = {
        "nbgrader": _nbgrader(cell_id, grade=False, solution=True, locked=False),
        "minillm": {
            "part": part,
            "title": title,
            "minutes": minutes,
            "task": task,
            "hints": list(hints),
            "forbidden": list(forbidden),
        },
    }
    return _code_cell(cell_id, code, metadata)


def check_cell(part: str, code: str, *, points: float = 1, name: str | None = None) -> NotebookNode:
    """A check of ``part``, worth ``points``; further checks of the same part need a ``name`` (cell id) of their own."""
    cell_id = name if name is not None else "check-" + part.replace(".", "-")
    metadata: dict[str, object] = {
        "nbgrader": _nbgrader(cell_id, grade=True, solution=False, locked=True, points=points),
        "minillm": {"part": part},
    }
    return _code_cell(cell_id, code, metadata)


def new_exercise(cells: Sequence[NotebookNode], *, title: str) -> NotebookNode:
    """The notebook of these cells, in the committed form but not executed."""
    return normalise(
        node({"cells": list(cells), "metadata": {"minillm": {"title": title}}, "nbformat": 4, "nbformat_minor": 5})
    )


def write(notebook: NotebookNode, path: Path | str) -> Path:
    """Write the source; ``minillm exercises build --execute`` then runs it and generates the student's notebook."""
    return write_notebook(notebook, path)
