"""Cutting a text wherever a pattern of one's own matches."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from minillm.tokenizers.aligned_text import AlignedText
from minillm.tokenizers.text_pattern import Regex, compile_pattern, find_matches, pattern_to_json

# By name: how files spell it.
BEHAVIORS = {
    "removed": "Removed",
    "isolated": "Isolated",
    "merged_with_previous": "MergedWithPrevious",
    "merged_with_next": "MergedWithNext",
    "contiguous": "Contiguous",
}
Span = tuple[int, int]


class Split:
    """Cuts a text at the matches of a pattern.

    Of `the-final--countdown`, cut at `-`:

        removed               the final countdown
        isolated              the - final - - countdown
        merged_with_previous  the- final- - countdown
        merged_with_next      the -final - -countdown
        contiguous            the - final -- countdown

    Args:
        pattern: A str as it is, or a `Regex`.
        behavior: What becomes of the matches, see above.
        invert: Take what lies between matches for the matches, and the matches for what lies between them.

    Raises:
        TypeError: `pattern` is of another type.
        ValueError: `behavior` is unknown.
    """

    def __init__(self, pattern: str | Regex, behavior: str, *, invert: bool = False) -> None:
        pieces = character_pieces(behavior)
        self._compiled = compile_pattern(pattern)
        self.pattern = pattern
        self.behavior = behavior
        self.invert = invert
        # Two fast ways. At one character: the pieces are the matches of another pattern.
        self._cut_at_character = None
        if isinstance(pattern, str) and len(pattern) == 1 and not invert:
            self._cut_at_character = re.compile(pieces.format(re.escape(pattern))).findall
        # Patterns made to match every piece of a text, as those of GPT are: the pieces are their matches.
        keeps_matches = (behavior, invert) in (("isolated", False), ("removed", True))
        self._find_all = self._compiled.findall if keeps_matches and self._compiled.groups == 0 else None

    def split(self, text: str, *, at_start: bool = True) -> Iterator[list[str]]:
        """Yield the pieces of `text` in order, all at once; `at_start` is of no consequence here."""
        if self._cut_at_character:
            yield self._cut_at_character(text)
            return
        if self._find_all:
            pieces = self._find_all(text)
            if "" not in pieces and sum(map(len, pieces)) == len(text):
                yield pieces
                return
        yield [text[start:end] for start, end in self._spans(text)]

    def align(self, text: AlignedText) -> list[AlignedText]:
        """The same pieces, and where their characters come from."""
        return [text.slice(start, end) for start, end in self._spans(text.text)]

    def _spans(self, text: str) -> list[Span]:
        parts: list[tuple[Span, bool]] = []  # everything, in order: matches (True) and what lies between them
        end_of_last = 0
        for start, end in find_matches(self._compiled, text):
            if start > end_of_last:
                parts.append(((end_of_last, start), self.invert))
            parts.append(((start, end), not self.invert))
            end_of_last = end
        if end_of_last < len(text):
            parts.append(((end_of_last, len(text)), self.invert))
        return [(start, end) for start, end in _join(parts, self.behavior) if start < end]

    def to_json(self) -> dict[str, Any]:
        """Its part of a tokenizer.json."""
        return {
            "type": "Split",
            "pattern": pattern_to_json(self.pattern),
            "behavior": BEHAVIORS[self.behavior],
            "invert": self.invert,
        }


def _join(parts: list[tuple[Span, bool]], behavior: str) -> list[Span]:
    if behavior == "removed":
        return [span for span, is_match in parts if not is_match]
    if behavior == "merged_with_next":
        parts = parts[::-1]
    spans: list[Span] = []
    after_match = False
    for (start, end), is_match in parts:
        if behavior == "contiguous":
            merges = is_match == after_match
        else:
            merges = behavior != "isolated" and is_match and not after_match
        if merges and spans:
            start, end = min(start, spans[-1][0]), max(end, spans[-1][1])
            spans[-1] = start, end
        else:
            spans.append((start, end))
        after_match = is_match
    return spans[::-1] if behavior == "merged_with_next" else spans


def character_pieces(behavior: str) -> str:
    """The pattern of the pieces, if what matches is one character: "{0}" stands for its class, written in brackets.

    Raises:
        ValueError: `behavior` is not one of those that `Split` knows.
    """
    if behavior not in BEHAVIORS:
        raise ValueError(f"behavior must be one of {', '.join(map(repr, BEHAVIORS))}, got {behavior!r}")
    return {
        "removed": "[^{0}]+",
        "isolated": "[^{0}]+|[{0}]",
        "merged_with_previous": "[^{0}]+[{0}]?|[{0}]",
        "merged_with_next": "[{0}]?[^{0}]+|[{0}]",
        "contiguous": "[^{0}]+|[{0}]+",
    }[behavior]
