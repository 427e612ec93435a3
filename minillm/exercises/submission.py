"""A student's notebook, read with forgiveness: which cell answers which part, and what else the student wrote.

Answers are matched by cell id, then by nbgrader's ``grade_id`` (front ends older than notebook format 4.5 drop ids),
then, for an answer that was deleted and written anew elsewhere, by the functions it must define. Checks and setup cells
are never taken from the student's file. Code cells that the student added run where they stand, because an honest
answer may lean on a helper cell or have been split in two; a cell that cannot run there (magics, an unfinished line) is
left out and mentioned.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillm.exercises.format import Exercise, Part, definitions, parse, role

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Extra:
    """A code cell that the student added; it runs after the cell ``after`` (an id, or None for the very top)."""

    source: str
    after: str | None


@dataclass(frozen=True)
class Submission:
    """What a student's notebook contributes to the one that is judged."""

    path: Path
    answers: dict[str, str]  # by part number; a part whose cell is gone is missing here
    extras: list[Extra] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was restored or left out, in sentences


def read_json(path: Path) -> dict[str, Any]:
    """A notebook file of any format 4 version as it stands; ``ValueError`` says in what way it is not a notebook."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no notebook {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:  # beside broken JSON: numbers of too many digits
        raise ValueError(
            f"{path} is not a notebook: its JSON is broken ({error}); was it half saved or merged with conflicts?"
        ) from None
    if not isinstance(data, dict) or not isinstance(data.get("cells"), list):
        raise ValueError(
            f"{path} is not a notebook of format 4: it has no list of cells; open it in JupyterLab and save it"
        )
    return data


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The cells of :func:`read_json` as dictionaries whose source is one string and whose metadata is a dictionary.

    JSON can hold half of a surrogate pair, which no file and no kernel takes: U+FFFD stands in for it.
    """
    read = []
    for cell in read_json(path)["cells"]:
        if isinstance(cell, dict):
            source = cell.get("source", "")
            text = "".join(str(piece) for piece in source) if isinstance(source, list) else str(source)
            text = _LONE_SURROGATE.sub("\ufffd", text)
            metadata = cell.get("metadata")
            read.append({**cell, "source": text, "metadata": metadata if isinstance(metadata, dict) else {}})
    return read


def read_submission(path: Path | str, exercise: Exercise) -> Submission:
    """Match the cells of ``path`` with those of ``exercise``."""
    path = Path(path)
    pristine = {cell.id: cell for cell in exercise.notebook.cells}
    answers: dict[str, str] = {}
    extras: list[Extra] = []
    notes: list[str] = []
    seen: set[str] = set()
    anchor: str | None = None
    by_answer = {part.answer: part for part in exercise.parts}
    for cell in read_cells(path):
        cell_id = _pristine_id(cell, pristine)
        if cell_id is None:
            if cell.get("cell_type") == "code" and cell["source"].strip():
                extras.append(Extra(cell["source"], anchor))
            continue
        anchor = cell_id
        if cell_id in by_answer:
            number = by_answer[cell_id].number
            if cell_id in seen and cell["source"] != answers[number]:
                notes.append(f"two cells are the answer to {number}: the lower one counts")
            answers[number] = cell["source"]
        seen.add(cell_id)
    for part in exercise.parts:
        if part.answer not in seen and not _found_elsewhere(part, extras, answers, notes):
            notes.append(f"the answer cell of {part.number} is gone from your notebook: it counts as not started")
    runnable = [extra for extra in extras if _can_run(extra, notes)]
    missing = [c.id for c in pristine.values() if role(c) in ("check", "setup") and c.id not in seen]
    if missing:
        notes.append(f"missing from your notebook, so the original was run: {', '.join(missing)}")
    return Submission(path, answers, runnable, notes)


def names_of(cell: dict[str, Any]) -> list[str]:
    """What a cell of :func:`read_cells` is called: its id and nbgrader's, as far as it has them."""
    nbgrader = cell["metadata"].get("nbgrader")
    names = [cell.get("id"), nbgrader.get("grade_id") if isinstance(nbgrader, dict) else None]
    return [name for name in names if isinstance(name, str)]


def _pristine_id(cell: dict[str, Any], pristine: dict[str, Any]) -> str | None:
    return next((name for name in names_of(cell) if name in pristine), None)


def _found_elsewhere(part: Part, extras: list[Extra], answers: dict[str, str], notes: list[str]) -> bool:
    """An answer whose cell was deleted, or lost its id, and whose functions stand in another cell."""
    for extra in reversed(extras):
        if part.defines and part.defines <= definitions(extra.source):
            answers[part.number] = extra.source
            extras.remove(extra)
            notes.append(f"the answer to {part.number} was found in a cell without its id")
            return True
    return False


def _can_run(extra: Extra, notes: list[str]) -> bool:
    try:
        parse(extra.source)
    except SyntaxError:
        notes.append(f"a cell of your own was left out, it is not plain Python: {first_line(extra.source)!r}")
        return False
    return True


def first_line(source: str) -> str:
    """The first line that says something, shortened: enough to recognise a cell by."""
    line = next((line.strip() for line in source.splitlines() if line.strip()), "")
    return line if len(line) <= 60 else line[:57] + "..."
