"""The vocabulary of a model in a tokenizer.json: an object, token -> id."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any


def vocabulary_to_json(vocabulary: Mapping[str, int]) -> dict[str, int]:
    """The tokens in the order of their ids."""
    return dict(sorted(vocabulary.items(), key=itemgetter(1)))


def vocabulary_from_json(entries: Mapping[str, Any]) -> dict[str, int]:
    """The same, read; ValueError names an id that is no integer."""
    for token, i in entries.items():
        if not isinstance(i, int) or isinstance(i, bool):
            raise ValueError(f"the id of token {token!r} must be an integer, got {i!r}")
    return dict(entries)
