"""Normalizers that replace what a pattern finds, put something in front, or take white space away at both ends."""

from __future__ import annotations

from typing import Any

from minillm.tokenizers.added_tokens import WHITE_SPACE
from minillm.tokenizers.aligned_text import AlignedText
from minillm.tokenizers.text_pattern import Regex, compile_pattern, find_matches, pattern_to_json


class Strip:
    """Without white space at the text's begin and end.

    Args:
        left, right: On which sides.
    """

    def __init__(self, left: bool = True, right: bool = True) -> None:
        self.left = left
        self.right = right

    def __call__(self, text: str) -> str:
        start, end = self._kept(text)
        return text[start:end]

    def align(self, text: AlignedText) -> AlignedText:
        return text.slice(*self._kept(text.text))

    def _kept(self, text: str) -> tuple[int, int]:
        start = len(text) - len(text.lstrip(WHITE_SPACE)) if self.left else 0
        end = len(text.rstrip(WHITE_SPACE)) if self.right else len(text)
        return start, max(start, end)

    def to_json(self) -> dict[str, Any]:
        return {"type": "Strip", "strip_left": self.left, "strip_right": self.right}


class Replace:
    """Every match of a pattern replaced.

    A replacement comes from all of its match, or, if that is empty, from the empty stretch behind the character before
    it. (`tokenizers` gives it the place of the last character of the match; of the character before it.)

    Args:
        pattern: A str as it is, or a `Regex`.
        content: What to put in place of each match; nothing in it is read as a reference.

    Raises:
        TypeError: `pattern` or `content` has another type.
    """

    def __init__(self, pattern: str | Regex, content: str) -> None:
        self._compiled = compile_pattern(pattern)
        if not isinstance(content, str):
            raise TypeError(f"content must be a str, got {type(content).__name__}")
        self.pattern = pattern
        self.content = content

    def __call__(self, text: str) -> str:
        if self.pattern and isinstance(self.pattern, str):
            return text.replace(self.pattern, self.content)
        parts: list[str] = []
        done = 0
        for start, end in find_matches(self._compiled, text):
            parts += text[done:start], self.content
            done = end
        parts.append(text[done:])
        return "".join(parts)

    def align(self, text: AlignedText) -> AlignedText:
        parts: list[str] = []
        starts: list[int] = []
        ends: list[int] = []
        done = 0
        for start, end in find_matches(self._compiled, text.text):
            if start < end:
                origin = text.span(start, end)
            else:
                place = text.ends[start - 1] if start else min(text.starts[:1], default=0)
                origin = place, place
            parts += text.text[done:start], self.content
            starts += *text.starts[done:start], *[origin[0]] * len(self.content)
            ends += *text.ends[done:start], *[origin[1]] * len(self.content)
            done = end
        parts.append(text.text[done:])
        return AlignedText("".join(parts), [*starts, *text.starts[done:]], [*ends, *text.ends[done:]])

    def to_json(self) -> dict[str, Any]:
        return {"type": "Replace", "pattern": pattern_to_json(self.pattern), "content": self.content}


class Prepend:
    """Something put in front of a text, unless the text is empty; it comes from where the first character does.

    Args:
        content: What to put there.
    """

    def __init__(self, content: str) -> None:
        if not isinstance(content, str):
            raise TypeError(f"content must be a str, got {type(content).__name__}")
        self.content = content

    def __call__(self, text: str) -> str:
        return self.content + text if text else text

    def align(self, text: AlignedText) -> AlignedText:
        if not text.text:
            return text
        n = len(self.content)
        starts, ends = [text.starts[0]] * n, [text.ends[0]] * n
        return AlignedText(self.content + text.text, [*starts, *text.starts], [*ends, *text.ends])

    def to_json(self) -> dict[str, Any]:
        return {"type": "Prepend", "prepend": self.content}


def remove_control_characters() -> Replace:
    """Without the control characters of ASCII and Latin-1 (Unicode's Cc), but for tab, line feed, carriage return."""
    return Replace(Regex(r"[\x00-\x08\x0B\x0C\x0E-\x1F\u007F-\u009F]"), "")


def collapse_white_space() -> Replace:
    """Each run of white space, of whatever kind, made one plain space."""
    return Replace(Regex(r"\s{2,}|[^\S ]"), " ")
