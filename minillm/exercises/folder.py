"""Where the exercises are, and which one is meant by "02", "02_tokenizers" or the path of a notebook."""

import re
from pathlib import Path

from minillm.course.notebooks import read_notebook
from minillm.exercises.format import Exercise
from minillm.exercises.validation import problems_of


def find_folder(folder: Path | str | None = None) -> Path:
    """The exercises folder (the one that holds ``solutions/``): the one given, ``./exercises``, or the clone's own.

    ``ValueError`` names the places that were looked at.
    """
    if folder is not None:
        candidates = [Path(folder)]
    else:
        here = Path.cwd()
        candidates = [here / "exercises", here, Path(__file__).resolve().parents[2] / "exercises"]
    for candidate in candidates:
        if (candidate / "solutions").is_dir():
            return candidate.resolve()
    places = " or ".join(str(candidate) for candidate in candidates)
    raise ValueError(f"no exercises folder (one with solutions/ in it) at {places}: run this in the repository")


def sources(folder: Path) -> list[Path]:
    """All sources, by chapter."""
    return sorted(path for path in (folder / "solutions").glob("*.ipynb") if not path.name.startswith("."))


def find_source(exercise: str, folder: Path) -> Path:
    """The source of "2", "02", "02_tokenizers", or of a notebook that bears the name or number of one.

    ``ValueError`` names the exercises there are.
    """
    name = Path(exercise).name.removesuffix(".ipynb")
    known = sources(folder)
    exact = [path for path in known if path.stem == name]
    number = re.match(r"(\d{1,2})(?![\d.])", name)
    same_chapter = [path for path in known if number is not None and int(path.stem[:2]) == int(number[1])]
    found = exact or same_chapter
    if len(found) != 1:
        names = ", ".join(path.stem for path in (found or known)) or "none"
        said = f"{exercise!r} can be any of" if found else f"no exercise {exercise!r}; the exercises are"
        raise ValueError(f"{said}: {names}")
    return found[0]


def load(source: Path | str) -> Exercise:
    """Read and validate ``exercises/solutions/NN_name.ipynb``; ``ValueError`` lists all that is wrong with it."""
    source = Path(source)
    if not re.fullmatch(r"\d\d_[a-z0-9_]+", source.stem):
        raise ValueError(
            f"{source.name}: an exercise is named NN_name.ipynb after its chapter, e.g. 02_tokenizers.ipynb"
        )
    notebook = read_notebook(source)
    parts, problems = problems_of(notebook, chapter=int(source.stem[:2]))
    if problems:
        raise ValueError(f"{source.name} is not a valid exercise source:\n" + "\n".join(f"  - {p}" for p in problems))
    return Exercise(source, notebook, notebook.metadata["minillm"]["title"], tuple(parts))


def find_exercise(exercise: str, folder: Path | str | None = None) -> Exercise:
    """:func:`find_folder`, :func:`find_source` and :func:`load` in one."""
    return load(find_source(exercise, find_folder(folder)))
