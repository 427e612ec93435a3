"""What can go wrong with many ranks: one vocabulary for simulated ranks and for real processes."""

import traceback
from collections.abc import Sequence

_LOST_PEER = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")  # gloo's words, and NCCL's


class RankError(RuntimeError):
    """A rank's function raised, or its process died: ``rank 2 failed: ValueError: ...``.

    Where the exception itself is at hand it is the ``__cause__``.

    Attributes:
        rank: the global rank that failed first; its peers mostly fail after it, because it is gone.
        error_type: the name of what was raised there ("ValueError"), None where the process died without a word.
        traceback_text: the rank's own traceback as text, "" where there is none to add to that of ``__cause__``.
    """

    def __init__(self, message: str, rank: int, error_type: str | None = None, traceback_text: str = "") -> None:
        super().__init__(message, rank, error_type, traceback_text)  # all of them, so that it can be pickled
        self.message = message
        self.rank = rank
        self.error_type = error_type
        self.traceback_text = traceback_text

    @classmethod
    def of(cls, rank: int, error: BaseException, traceback_text: str = "") -> "RankError":
        """The error for an exception that `rank` raised; `error` becomes its ``__cause__``."""
        said = "".join(traceback.format_exception_only(error)).strip()
        failure = cls(f"rank {rank} failed: {said}", rank, type(error).__name__, traceback_text)
        failure.__cause__ = error
        return failure

    def __str__(self) -> str:
        if not self.traceback_text:
            return self.message
        return f"{self.message}\n\nOn rank {self.rank}:\n{self.traceback_text.rstrip()}"


class DeadlockError(RuntimeError):
    """Every rank waits for another one, or for one that has ended: ``rank 0 waits for recv from rank 1; ...``."""


class MismatchError(RuntimeError):
    """Ranks of one group met in different operations, or in one with different shapes, dtypes or roots."""


def lost_peer(message: str) -> bool:
    """Whether an error says no more than that another rank's process is gone."""
    return any(sign in message for sign in _LOST_PEER)


def named_ranks(ranks: Sequence[int]) -> str:
    """In words: "rank 3", "ranks 0 and 2", "ranks 1, 2 and 5"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
