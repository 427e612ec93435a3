"""What a message is for: a word that the log of messages and the count of traffic carry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_label: ContextVar[str] = ContextVar("what the messages are for", default="")


@contextmanager
def annotate(label: str) -> Iterator[None]:
    """While this is open, the calling thread's messages bear the label, such as "gradients of block 3"; inner wins."""
    token = _label.set(label)
    try:
        yield
    finally:
        _label.reset(token)


def current_label() -> str:
    """The label of the innermost `annotate` that is open, or ""."""
    return _label.get()
