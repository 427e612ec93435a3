"""What a check cell says when an answer is wrong: one sentence about the mistake, no traceback through the checker."""

_LONGEST = 300
"""Characters shown of a message: a check that interpolates a whole tensor must not bury its own sentence."""


class Mistake(AssertionError):  # noqa: N818 - a check reads "raise Mistake(...)", and so does its traceback
    """An answer is wrong, and the message says how in one sentence ("your mask lets a token see the next one").

    IPython shows an exception through ``_render_traceback_`` where the class has it, so a student sees the sentence
    alone. Lines become one; spaces within a line stay as they are, for two texts may differ in nothing else.
    """

    def __init__(self, message: str) -> None:
        message = " ".join(line.strip() for line in str(message).splitlines() if line.strip())
        super().__init__(message if len(message) <= _LONGEST else message[: _LONGEST - 3] + "...")

    def _render_traceback_(self) -> list[str]:
        return [f"Not yet: {self}"]


def check_that(condition: object, message: str) -> None:
    """Raise ``Mistake(message)`` unless ``condition`` is true.

    >>> check_that(sum([0.25, 0.75]) == 1, "your probabilities do not add up to one")
    """
    if not condition:
        raise Mistake(message)
