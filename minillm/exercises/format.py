"""What an exercise is: a solved, executed notebook whose cells say which part they belong to and what they are for.

Every code cell carries nbgrader's metadata (schema 3) and is one of

- **answer** (``solution``): what the student writes, between ``### BEGIN SOLUTION`` and ``### END SOLUTION``; one a
  part;
- **check** (``grade``, ``locked``, ``points``): judges a part; may end in ``### BEGIN HIDDEN TESTS`` ... ``### END
  HIDDEN TESTS``;
- **setup** (``locked``): everything else that runs; one of these holds the line ``SEED = 0``.

``metadata.minillm`` names the part ("2.1") of answers and checks; an answer's also holds title, minutes, task, hints
and forbidden names. :mod:`minillm.exercises.validation` holds a source to these rules.
"""

import ast
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from nbformat import NotebookNode

Role = Literal["answer", "check", "setup", "text"]

SOLUTION = ("### BEGIN SOLUTION", "### END SOLUTION")
HIDDEN = ("### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS")
SEED_LINE = re.compile(r"^SEED = \d+$", re.MULTILINE)


@dataclass(frozen=True)
class Part:
    """One thing to build: its answer cell, its check cells and what the student is told about it."""

    number: str  # "2.1": chapter and part
    title: str
    minutes: int
    task: str
    hints: tuple[str, ...]
    forbidden: tuple[str, ...]
    answer: str  # id of the answer cell
    checks: tuple[str, ...]  # ids of the check cells
    points: dict[str, float]  # by check id
    defines: frozenset[str]  # functions and classes that the answer must leave behind


@dataclass(frozen=True)
class Exercise:
    """A validated source and what was read from it."""

    source: Path  # exercises/solutions/NN_name.ipynb
    notebook: NotebookNode  # the source as it stands, solved
    title: str
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        return self.source.stem

    @property
    def chapter(self) -> int:
        return int(self.name.partition("_")[0])

    @property
    def student_path(self) -> Path:
        return self.source.parent.parent / self.source.name

    def part(self, number: str) -> Part:
        """The part of that number; ``ValueError`` names those there are."""
        for part in self.parts:
            if part.number == number:
                return part
        raise ValueError(
            f"exercise {self.name} has no part {number}; its parts: {', '.join(p.number for p in self.parts)}"
        )


def role(cell: NotebookNode) -> Role:
    """What the cell is for, by its nbgrader metadata."""
    if cell.cell_type != "code":
        return "text"
    nbgrader = cell.metadata.get("nbgrader", {})
    if nbgrader.get("solution"):
        return "answer"
    return "check" if nbgrader.get("grade") else "setup"


@lru_cache(maxsize=256)
def parse(source: str) -> ast.Module:
    """``ast.parse`` without the warnings that Python has for doubtful literals: they must not fail a student's cell.

    Whatever a student wrote, ``SyntaxError`` is all that it raises: also for null bytes (``ValueError`` in Python) and
    for code nested too deeply for Python (``RecursionError`` or ``MemoryError``, by the kind of nesting).

    The same cells are asked for again and again, for every answer that is judged, so trees are kept: read them only.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (RecursionError, MemoryError):
            raise SyntaxError("it is nested too deeply for Python to read") from None
        except ValueError as error:
            raise SyntaxError(str(error)) from None


def definitions(source: str) -> frozenset[str]:
    """Names of the functions and classes that ``source`` defines at its top level (none if it does not parse)."""
    try:
        tree = parse(source)
    except SyntaxError:
        return frozenset()
    return frozenset(n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef))


def replace_regions(source: str, markers: tuple[str, str], replacement: str | None) -> str:
    """``source`` with each region between ``markers`` (both lines included) replaced by one line, indented as the
    region was.

    ``None`` removes the region. ``ValueError`` if the markers do not pair up.
    """
    begin, end = markers
    lines: list[str] = []
    inside = False
    for line in source.split("\n"):
        if line.strip() in markers:
            if (line.strip() == begin) == inside:
                raise ValueError(f"{line.strip()!r} without its partner ({begin!r} ... {end!r})")
            inside = not inside
            if inside and replacement is not None:
                lines.append(line[: len(line) - len(line.lstrip())] + replacement)
        elif not inside:
            lines.append(line)
    if inside:
        raise ValueError(f"{begin!r} without {end!r}")
    return "\n".join(lines).rstrip("\n")


def stub(source: str, part: Part) -> str:
    """The answer cell as the student finds it: each solution region raises and says what to write."""
    message = f"Exercise {part.number}: {part.task}".replace("\\", "\\\\").replace('"', '\\"')
    return replace_regions(source, SOLUTION, f'raise NotImplementedError("{message}")')


def fingerprint(cells: Iterable[Mapping[str, Any]]) -> str:
    """Of all that somebody could write in a notebook: the cells' types and sources, in order.

    Recorded in each generated notebook, so that a later build can tell whether somebody has worked in it. Outputs,
    counts, ids, metadata and empty cells are left out: front ends change those when a notebook is only run and saved.
    """
    written = [[cell.get("cell_type"), cell["source"].strip()] for cell in cells if cell["source"].strip()]
    return hashlib.sha256(json.dumps(written).encode()).hexdigest()[:16]
