"""One source, two builds: from the solved notebook to the one that students get.

Solutions become ``raise NotImplementedError("Exercise 2.1: ...")`` at the solution's indentation, with the code around
it kept; hidden tests go; answers lose their outputs, everything else keeps them (nbval compares what checks print with
these). Front ends let a student run checks and setup but not edit them, as nbgrader has it. The same source gives the
same bytes, and a student's work is never overwritten unless asked, and then kept beside.
"""

import copy
from pathlib import Path

from nbformat import NotebookNode

from minillm.course.notebooks import execute as run_notebook
from minillm.course.notebooks import node, notebook_bytes, read_notebook, write_atomically, write_notebook
from minillm.exercises.folder import find_folder, find_source, load, sources
from minillm.exercises.format import HIDDEN, Exercise, fingerprint, replace_regions, role, stub
from minillm.exercises.submission import read_cells, read_json
from minillm.exercises.wording import without_colours


def generate(exercise: Exercise) -> NotebookNode:
    """The student's notebook of a validated source."""
    notebook = copy.deepcopy(exercise.notebook)
    for cell in notebook.cells:
        kind = role(cell)
        if kind != "text":
            cell.metadata["deletable"] = False
            if kind != "answer":
                cell.metadata["editable"] = False
        if kind == "answer":
            part = exercise.part(cell.metadata["minillm"]["part"])
            cell.source = stub(cell.source, part)
            cell.outputs, cell.execution_count = [], None
            # Hints come one at a time from `minillm exercises hint`, so the notebook does not carry them.
            cell.metadata["minillm"] = node({"part": part.number, "title": part.title, "minutes": part.minutes})
        elif kind == "check":
            cell.source = replace_regions(cell.source, HIDDEN, None)
    notebook.metadata["minillm"]["generated"] = fingerprint(notebook.cells)
    return notebook


def build(
    name: str | None = None, *, execute: bool = False, force: bool = False, folder: Path | str | None = None
) -> list[Path]:
    """Write ``exercises/NN_name.ipynb`` from ``exercises/solutions/NN_name.ipynb`` and return the written paths.

    Args:
        name: "02", "02_tokenizers" or a path; all exercises if None.
        execute: run the source first (in the exercises folder) and save its outputs.
        force: overwrite a notebook in which a student has worked; it is kept as ``NN_name.ipynb.bak`` (``.bak2``, ...).
        folder: the exercises folder; by default ``./exercises`` or the clone's own.

    Raises:
        ValueError: a source breaks the format, or a notebook on disk holds somebody's work and ``force`` is not given.
    """
    place = find_folder(folder)
    written = []
    for source in sources(place) if name is None else [find_source(name, place)]:
        if execute:
            _execute(source, place)
        exercise = load(source)
        content = notebook_bytes(generate(exercise))
        target = exercise.student_path
        if target.exists() and target.read_bytes() != content:
            work = students_work(target)
            if work and not force:
                raise ValueError(
                    f"{target} holds work of its own ({work}) and would be overwritten: "
                    "move it away, or build with --force (a copy is kept beside it)"
                )
            if work:
                write_atomically(_free_backup(target), target.read_bytes())
        write_atomically(target, content)
        written.append(target)
    return written


def _execute(source: Path, folder: Path) -> None:
    from nbclient.exceptions import CellControlSignal, DeadKernelError  # half a second to import

    try:
        write_notebook(run_notebook(read_notebook(source), folder=folder), source)
    except (CellControlSignal, DeadKernelError) as error:
        said = without_colours(str(error)).strip().splitlines()[-1]
        raise ValueError(f"{source.name}: the solution does not run: {said}") from error


def students_work(path: Path) -> str:
    """Whether somebody has written in the notebook at ``path``: a sentence about it, or nothing.

    Anything that differs from what was generated is work, whichever cell it is in. What cannot be told counts as work.
    """
    try:
        told = read_json(path).get("metadata")
        cells = read_cells(path)
    except ValueError:
        return "it cannot be read as a notebook"
    minillm = told.get("minillm") if isinstance(told, dict) else None
    generated = minillm.get("generated") if isinstance(minillm, dict) else None
    if generated is None:
        return "nothing in it tells what was generated"
    return "" if generated == fingerprint(cells) else "its cells are not those that were generated"


def _free_backup(path: Path) -> Path:
    number = 1
    while True:
        backup = path.with_name(f"{path.name}.bak{number if number > 1 else ''}")
        if not backup.exists():
            return backup
        number += 1
