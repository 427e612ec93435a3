"""Holds an exercise's source to the format: every broken rule is named, in words that say which cell and what to do."""

import json
import re

from nbformat import NotebookNode

from minillm.exercises.format import HIDDEN, SEED_LINE, SOLUTION, Part, definitions, parse, replace_regions, role

_NBGRADER_KEYS = {"schema_version", "grade_id", "grade", "solution", "locked", "task", "cell_type"}
_NBGRADER_OPTIONAL = {"points", "checksum"}
_ROLES = {
    (False, True, False),
    (True, False, True),
    (False, False, True),
}  # (grade, solution, locked): answer, check, setup
_ANSWER_KEYS = {"part": str, "title": str, "minutes": int, "task": str, "hints": list, "forbidden": list}


def problems_of(notebook: NotebookNode, chapter: int) -> tuple[list[Part], list[str]]:
    """The parts of a source and the rules it breaks; the parts are only meaningful when there are no problems."""
    problems: list[str] = []
    if not isinstance(notebook.metadata.get("minillm", {}).get("title"), str):
        problems.append('the notebook\'s metadata.minillm has no "title"')
    cells = notebook.cells
    names = [cell.metadata["nbgrader"].get("grade_id") for cell in cells if "nbgrader" in cell.metadata]
    problems += [
        f"grade_id {name!r} is used twice" for name in sorted({n for n in names if names.count(n) > 1}, key=str)
    ]
    for cell in cells:
        problems += [f"cell {cell.get('id')!r}: {problem}" for problem in _problems_of_cell(cell)]
    seeds = sum(len(SEED_LINE.findall(cell.source)) for cell in cells if role(cell) == "setup")
    if seeds != 1 or any(SEED_LINE.search(cell.source) for cell in cells if role(cell) in ("answer", "check")):
        problems.append(
            f"exactly one setup cell must hold the line 'SEED = 0' (found {seeds}), and no answer or check may"
        )
    unrun = [str(cell.get("id")) for cell in cells if cell.cell_type == "code" and cell.get("execution_count") is None]
    if unrun:
        problems.append(f"not executed, run `minillm exercises build --execute`: {', '.join(unrun)}")
    if problems:
        return [], problems
    parts, more = _parts(cells, chapter)
    return parts, problems + more


def _problems_of_cell(cell: NotebookNode) -> list[str]:
    metadata = cell.metadata.get("nbgrader")
    if cell.cell_type != "code":
        return ["text cells are not graded: remove metadata.nbgrader"] if metadata is not None else []
    if metadata is None:
        return ["a code cell needs metadata.nbgrader: make it an answer, a check or a setup cell"]
    problems = _schema_problems(metadata)
    if problems:
        return problems
    kind = role(cell)
    try:
        parse(cell.source)
    except SyntaxError as error:
        problems.append(f"line {error.lineno} is not Python ({error.msg}); magics and ! are not used in exercises")
    for markers, where in ((SOLUTION, "answer"), (HIDDEN, "check")):
        try:
            marked = replace_regions(cell.source, markers, None) != cell.source.rstrip("\n")
        except ValueError as error:
            problems.append(str(error))
            continue
        if marked and kind != where:
            problems.append(f"{markers[0]} belongs in {where} cells only")
        if kind == "answer" == where and not marked:
            problems.append(f"the answer has no {SOLUTION[0]} ... {SOLUTION[1]}")
    problems += _metadata_problems(cell.metadata.get("minillm", {}), kind)
    if any(output.output_type == "error" for output in cell.outputs):
        problems.append("its saved output is an error: the solution does not pass")
    elif kind == "check" and any(o.output_type != "stream" or o.name != "stdout" for o in cell.outputs):
        problems.append("a check only prints to stdout: no display, no figure, no warning")
    return problems


def _schema_problems(metadata: NotebookNode) -> list[str]:
    """nbgrader's schema 3, as far as exercises use it."""
    keys = set(metadata)
    if not keys >= _NBGRADER_KEYS or keys - _NBGRADER_KEYS - _NBGRADER_OPTIONAL:
        wrong = sorted(_NBGRADER_KEYS - keys) or sorted(keys - _NBGRADER_KEYS - _NBGRADER_OPTIONAL)
        return [f"metadata.nbgrader has missing or unknown keys: {', '.join(wrong)}"]
    problems = []
    if metadata.schema_version != 3:
        problems.append(f"nbgrader's schema_version must be 3, not {metadata.schema_version!r}")
    if (metadata.grade, metadata.solution, metadata.locked) not in _ROLES or metadata.task is not False:
        problems.append("must be an answer (solution), a check (grade, locked) or setup (locked), and no task")
    if metadata.cell_type != "code":
        problems.append('nbgrader\'s cell_type must be "code"')
    if not re.fullmatch(r"[A-Za-z0-9_-]+", str(metadata.grade_id)):
        problems.append(f"grade_id {metadata.grade_id!r} may hold letters, digits, - and _ only")
    points = metadata.get("points")
    if metadata.grade and (isinstance(points, bool) or not isinstance(points, int | float) or points <= 0):
        problems.append(f"a check needs points > 0, not {points!r}")
    return problems


def _metadata_problems(metadata: NotebookNode, kind: str) -> list[str]:
    if kind == "setup":
        return []
    if kind == "check":
        return [] if isinstance(metadata.get("part"), str) else ['metadata.minillm has no "part"']
    problems = []
    for key, expected in _ANSWER_KEYS.items():
        value = metadata.get(key)
        if not isinstance(value, expected) or (value in ("", 0) and key != "forbidden"):
            problems.append(f'metadata.minillm needs "{key}" ({expected.__name__}), not {json.dumps(value)}')
        elif isinstance(value, list) and not all(isinstance(item, str) and item for item in value):
            problems.append(f'metadata.minillm "{key}" must be a list of non-empty strings')
    if not problems and len(metadata["hints"]) < 2:
        problems.append("a part needs at least two hints")
    if not problems and "\n" in metadata["task"]:
        problems.append('"task" is one line')
    return problems


def _parts(cells: list[NotebookNode], chapter: int) -> tuple[list[Part], list[str]]:
    """Answers with their checks, in order; each part's answer must come first and have a check that prints."""
    parts: list[Part] = []
    problems: list[str] = []
    answers = [cell for cell in cells if role(cell) == "answer"]
    numbers = [cell.metadata["minillm"]["part"] for cell in answers]
    expected = [f"{chapter}.{n}" for n in range(1, len(answers) + 1)]
    if numbers != expected:
        problems.append(
            f"the answers' parts must be {', '.join(expected) or 'at least one'}, in this order; found {numbers}"
        )
    for cell in cells:
        if role(cell) == "check" and cell.metadata["minillm"]["part"] not in numbers:
            problems.append(
                f"check {cell.id!r} judges part {cell.metadata['minillm']['part']}, which has no answer cell"
            )
    for answer in answers:
        told = answer.metadata["minillm"]
        checks = [c for c in cells if role(c) == "check" and c.metadata["minillm"]["part"] == told["part"]]
        if not checks:
            problems.append(f"part {told['part']} has no check cell")
        elif cells.index(checks[0]) < cells.index(answer):
            problems.append(f"part {told['part']}: the check {checks[0].id!r} stands before the answer")
        elif not any(check.outputs for check in checks):
            problems.append(f"part {told['part']}: no check prints anything for nbval to compare")
        parts.append(
            Part(
                number=told["part"],
                title=told["title"],
                minutes=told["minutes"],
                task=told["task"],
                hints=tuple(told["hints"]),
                forbidden=tuple(told["forbidden"]),
                answer=answer.id,
                checks=tuple(check.id for check in checks),
                points={check.id: check.metadata["nbgrader"]["points"] for check in checks},
                defines=definitions(answer.source),
            )
        )
    return parts, problems
