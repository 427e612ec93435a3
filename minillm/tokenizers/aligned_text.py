"""A text that remembers where each of its characters came from.

Normalizers change a text (`É` becomes `e`, `ﬁ` becomes `fi`, a control character disappears) and pre-tokenizers cut it.
Whoever marks a name or an answer in the original text needs to know which of its characters a token stands for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class AlignedText:
    """A text and the origin of each of its characters.

    Attributes:
        text: The text as it is now.
        starts, ends: Character i of `text` comes from `original[starts[i]:ends[i]]`; one entry each a character.
            Several characters may come from the same stretch; one that was inserted has an empty stretch.
    """

    text: str
    starts: Sequence[int]
    ends: Sequence[int]

    def __post_init__(self) -> None:
        if not len(self.text) == len(self.starts) == len(self.ends):
            lengths = len(self.text), len(self.starts), len(self.ends)
            raise ValueError(f"text, starts and ends must be equally long, got {lengths}")

    @classmethod
    def of(cls, original: str) -> AlignedText:
        """A text that has not been changed yet."""
        return cls(original, range(len(original)), range(1, len(original) + 1))

    def slice(self, start: int, end: int) -> AlignedText:
        """`text[start:end]`, with its origin."""
        part = object.__new__(AlignedText)  # what is cut from texts that fit together fits together
        part.text, part.starts, part.ends = self.text[start:end], self.starts[start:end], self.ends[start:end]
        return part

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The stretch of the original from which `text[start:end]` comes; ValueError if that is no character."""
        if not 0 <= start < end <= len(self.text):
            raise ValueError(f"span must hold characters of a text of {len(self.text)}, got {start}:{end}")
        return self.starts[start], self.ends[end - 1]

    @classmethod
    def rebuilt(cls, parts: Iterable[tuple[str, int, int]]) -> AlignedText:
        """A text put together from (characters, start, end): all characters of a part come from original[start:end]."""
        text: list[str] = []
        starts: list[int] = []
        ends: list[int] = []
        for characters, start, end in parts:
            text.append(characters)
            starts += [start] * len(characters)
            ends += [end] * len(characters)
        return cls("".join(text), starts, ends)
