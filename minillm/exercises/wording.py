"""What happened in a cell, in one sentence for the student."""

import difflib
import re
from collections.abc import Collection

from minillm.exercises.submission import first_line

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_ARROW = re.compile(r"^-+> ?\d+ (.*)$", re.MULTILINE)
_SLIP = re.compile(
    r"(Name|UnboundLocal|Syntax|Indentation|Tab)Error:|still running after|printed more than"
    r"|your answer does not define|(line \d+ of )?your answer is (not Python|a notebook command)"
)
LONGEST = 400
"""Characters of any sentence that is shown: a whole tensor in a message must not bury it."""


def without_colours(text: str) -> str:
    """``text`` without the terminal colours that IPython puts into tracebacks."""
    return _ANSI.sub("", text)


def shorten(message: str) -> str:
    """One line of at most ``LONGEST`` characters, which any terminal and file can take: no half surrogate pairs.

    Spaces within a line are kept: where a text has a space too many, the sentence must show it.
    """
    message = message.encode("utf-8", "backslashreplace").decode()
    message = " ".join(line.strip() for line in message.splitlines() if line.strip())
    return message if len(message) <= LONGEST else message[: LONGEST - 3] + "..."


def of_exception(name: str, text: str, *, defines: Collection[str] = (), place: str = "") -> str:
    """The sentence for an exception that a check or an answer raised.

    Args:
        name: the exception's class name.
        text: what it says.
        defines: names that the answer must define: a ``NameError`` about one of them means that it was renamed.
        place: where in the answer, from :func:`place_in`.
    """
    text = text.strip()
    if name == "Mistake":
        return text
    if name == "NotImplementedError" and (not text or text.startswith("Exercise ")):  # nbgrader's own stub says nothing
        return f"still raises NotImplementedError{place}: replace that line by your code"
    missing = re.fullmatch(r"name '(\w+)' is not defined", text)
    if missing and missing[1] in defines:
        return f"your answer does not define {missing[1]}: was it renamed?"
    if name == "SystemExit":
        return f"ends the notebook (exit or sys.exit){place}: return instead"
    return f"{name}: {text.splitlines()[0] if text else 'without a message'}{place}"


def is_slip(message: str) -> bool:
    """Whether a sentence made here or by :mod:`~minillm.exercises.assemble` is about how the code is written, and does
    not say that its idea is wrong: a syntax error, a name that is nowhere, a loop that never ends."""
    return _SLIP.match(message) is not None


def place_in(answer: str, traceback: str) -> str:
    """The line of ``answer`` that an IPython traceback ends in, to put behind a message; empty if it passes none."""
    lines = [line.strip() for line in answer.splitlines()]
    for arrow in reversed(_ARROW.findall(without_colours(traceback))):
        code = arrow.strip()
        if code and code in lines:
            return f" (line {lines.index(code) + 1} of your answer: {first_line(code)})"
    return ""


def of_difference(printed: str, expected: str) -> str | None:
    """The sentence for a check that printed ``printed`` where the source's printed ``expected``; None if it is as it
    should be.

    Every expected line must come, in order. Lines between them are a student's own debugging prints and do no harm.
    """
    left = iter(printed.splitlines())
    missing = next((line for line in expected.splitlines() if line not in left), None)
    if missing is None:
        return None
    near = difflib.get_close_matches(missing, printed.splitlines(), n=1, cutoff=0.4)
    instead = f"printed {near[0][:150]!r}" if near else "did not print it"
    return f"the check should print {missing[:150]!r}, but {instead}"
