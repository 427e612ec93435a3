"""``minillm exercises hint 2.1``: help in stages, from a question to nearly the code.

Which hints a student has seen is not recorded anywhere: the first is the answer to ``hint 2.1``, and each says how to
ask for the next. So there is no file to get out of step, and a classmate at the same machine starts at the first hint.
"""

import re
from pathlib import Path

from minillm.exercises.folder import find_exercise


def hint(number: str, level: int | None = None, *, folder: Path | str | None = None) -> str:
    """The hints of part ``number`` ("2.1") up to ``level`` (1 if None), and how many are left.

    ``ValueError`` if there is no such part or level, naming those there are.
    """
    match = re.fullmatch(r"0?(\d{1,2})\.(\d{1,2})", number.strip())
    if match is None:
        raise ValueError(f"a part is named by chapter and number, like 2.1; {number!r} is not")
    exercise = find_exercise(match[1], folder)
    part = exercise.part(f"{int(match[1])}.{int(match[2])}")
    level = 1 if level is None else level
    if not 1 <= level <= len(part.hints):
        raise ValueError(f"part {part.number} has hints 1 to {len(part.hints)}, not {level}")
    lines = [f"{part.number} {part.title} (about {part.minutes} minutes): {part.task}"]
    lines += [f"  hint {n} of {len(part.hints)}: {text}" for n, text in enumerate(part.hints[:level], start=1)]
    left = len(part.hints) - level
    if left:
        lines.append(f"  {left} more: minillm exercises hint {part.number} --level {level + 1}")
    else:
        lines.append(f"  That was the last; the solution is in exercises/solutions/{exercise.source.name}.")
    return "\n".join(lines)
