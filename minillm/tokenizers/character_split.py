"""Cutting a text at each punctuation character, or between numbers and all else."""

from __future__ import annotations

import re
from typing import Any

import regex

from minillm.tokenizers.bert_text import ASCII_PUNCTUATION, PUNCTUATION_CLASS
from minillm.tokenizers.piece_pattern import PiecePattern
from minillm.tokenizers.split import BEHAVIORS, character_pieces


class _CharacterSplit(PiecePattern):
    """Cuts at each character of a class, in one of the ways that `Split` has.

    Args:
        unicode_class, ascii_class: The class, as `regex` and as `re` write it between brackets. Letters and the space
            are not in it.
        behavior: See `Split`.
    """

    def __init__(self, unicode_class: str, ascii_class: str, behavior: str) -> None:
        pieces = character_pieces(behavior)
        super().__init__(
            regex.compile(pieces.format(unicode_class)).findall,
            re.compile(pieces.format(ascii_class)).findall,
            f"[A-Za-z ](?=[{ascii_class}])" if behavior == "merged_with_next" else f"[{ascii_class}](?=[A-Za-z ])",
        )


class Punctuation(_CharacterSplit):
    """Cuts at each punctuation character, as BERT understands punctuation (see `bert_text`).

    Args:
        behavior: What becomes of it, see `Split`.
    """

    def __init__(self, behavior: str = "isolated") -> None:
        super().__init__(PUNCTUATION_CLASS, re.escape(ASCII_PUNCTUATION), behavior)
        self.behavior = behavior

    def to_json(self) -> dict[str, Any]:
        return {"type": "Punctuation", "behavior": BEHAVIORS[self.behavior]}


class Digits(_CharacterSplit):
    """Cuts between numbers and all else; a number is made of Unicode's digits, fractions, Roman numerals and so on.

    Args:
        individual_digits: Also cuts between digits, so that all numbers are spelled in the same way.
    """

    def __init__(self, individual_digits: bool = False) -> None:
        super().__init__(r"\p{N}", "0-9", "isolated" if individual_digits else "contiguous")
        self.individual_digits = individual_digits

    def to_json(self) -> dict[str, Any]:
        return {"type": "Digits", "individual_digits": self.individual_digits}
